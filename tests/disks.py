"""A disk that a test makes for itself: a small one that fills up, or that nobody may write to."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BALLAST = "ballast"


class Disk:
    """A file system of its own in memory, mounted at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def free(self) -> int:
        """Bytes that are free."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    @contextmanager
    def with_room_for(self, size: int) -> Iterator[None]:
        """In the block `size` bytes are free, and no more."""
        ballast = self.path / BALLAST
        with ballast.open("wb") as file:
            if self.free > size:
                os.posix_fallocate(file.fileno(), 0, self.free - size)
        try:
            yield
        finally:
            ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """In the block nothing can be written, as after a fault of the disk."""
        self._mount("-o", "remount,ro")
        try:
            yield
        finally:
            self._mount("-o", "remount,rw")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.path)], check=True, capture_output=True)


@contextmanager
def disk(path: Path, megabytes: int = 64) -> Iterator[Disk]:
    """Mount a disk at the new folder `path`; the test is skipped where nobody may."""
    path.mkdir()
    how = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    found = subprocess.run(how, capture_output=True, text=True) if os.geteuid() == 0 else None
    if found is None or found.returncode:
        pytest.skip("mounting a file system in memory needs root, and a kernel that lets it")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
