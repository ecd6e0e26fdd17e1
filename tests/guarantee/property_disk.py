"""A disk that takes so many bytes of a site, and then is full."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core.files import room
from fedtune.core.ledger import chain
from fedtune.core.models.prefix_store import PREFIX_STORE
from tests.guarantee.property_plans import Disk

PAGE = 512  # bytes of a ledger's page, the least there is: a few members more are seen in its size


class LimitedDisk:
    """Stands in for the disk of one world; what was needed on it is counted even where it is not
    limited. Writes go through `os` or SQLite: the first get as much as there is room for, and
    ENOSPC, as on a real disk; the second a database that may have no page more.

    The file of states has a limit of its own in each process of a team."""

    def __init__(self, folder: Path, disk: Disk | None, limit: int | None) -> None:
        self._folder, self._disk, self._limit = folder, disk, limit
        self._end = 0  # of the file of states
        self.needed = 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Everything that is written in the block is on this disk."""
        if self._disk is None:
            yield
            return
        PREFIX_STORE._file = None  # another world's states may be in it still
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "BLOCK", 1)  # a file takes as many bytes here as it is long
            patch.setattr(os, "pwrite", self._pwrite(os.pwrite))
            patch.setattr(os, "write", self._write(os.write))
            patch.setattr(os, "posix_fallocate", self._allocate(os.posix_fallocate))
            patch.setattr(os, "fstatvfs", self._fstatvfs(os.fstatvfs))
            patch.setattr(chain, "connect", self._connect(chain.connect))
            yield
        PREFIX_STORE._file = None

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Nothing is limited in the block, in which somebody looks at the site."""
        limit, self._limit = self._limit, None
        try:
            yield
        finally:
            self._limit = limit

    @property
    def is_limited(self) -> bool:
        return self._limit is not None

    def _has(self, what: str) -> bool:
        return self._disk is not None and self._disk.holds in (what, "both")

    @property
    def _files(self) -> list[os.stat_result]:
        """Those of the state folder, where it is on this disk."""
        found = []
        for folder, _, names in os.walk(self._folder) if self._has("state") else ():
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found.append(os.stat(os.path.join(folder, name)))
        return found

    def _room(self, used: int, wanted: int) -> int:
        """How many of the wanted bytes fit beside the used ones. Errors: OSError where none do."""
        self.needed = max(self.needed, used + wanted)
        room = wanted if self._limit is None else min(wanted, self._limit - used)
        if wanted and room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return room

    def _pwrite(self, honest: Callable[..., int]) -> Callable[..., int]:
        def pwrite(descriptor: int, block: Any, at: int) -> int:
            if not self._has("states"):
                return honest(descriptor, block, at)
            beside = sum(found.st_size for found in self._files)
            done = honest(descriptor, block[: self._room(beside + at, len(block))], at)
            self._end = max(self._end, at + done)
            return done

        return pwrite

    def _write(self, honest: Callable[..., int]) -> Callable[..., int]:
        def write(descriptor: int, content: Any) -> int:
            file, files = os.fstat(descriptor), self._files
            if not any(os.path.samestat(file, found) for found in files):
                return honest(descriptor, content)
            used = sum(found.st_size for found in files) + self._states
            return honest(descriptor, content[: self._room(used, len(content))])

        return write

    def _allocate(self, honest: Callable[..., None]) -> Callable[..., None]:
        """All of it or none."""

        def allocate(descriptor: int, offset: int, size: int) -> None:
            file, files = os.fstat(descriptor), self._files
            if any(os.path.samestat(file, found) for found in files):
                used = sum(found.st_size for found in files) + self._states - file.st_size
                if self._room(used, offset + size) < offset + size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            honest(descriptor, offset, size)

        return allocate

    def _fstatvfs(self, honest: Callable[..., Any]) -> Callable[..., Any]:
        """What is left, to the file of states where both share this disk, and to the ledger."""

        def fstatvfs(descriptor: int) -> Any:
            file = os.fstat(descriptor)
            mine = self._folder.exists() and os.path.samestat(file, self._folder.stat())
            limited = self._has("state") and (mine or self._has("states"))
            if self._limit is None or not limited:
                return honest(descriptor)
            used = sum(found.st_size for found in self._files) + self._states
            return SimpleNamespace(f_frsize=1, f_bavail=max(0, self._limit - used))

        return fstatvfs

    @property
    def _states(self) -> int:
        return self._end if self._has("states") else 0

    def _connect(self, honest: Callable[..., Any]) -> Callable[..., Any]:
        def connect(path: Path, **options: bool) -> sqlite3.Connection:
            connection: sqlite3.Connection = honest(path, **options)
            if not self._has("state"):
                return connection
            connection.execute(f"PRAGMA page_size = {PAGE}")  # of a new one alone
            used = sum(found.st_size for found in self._files) + self._states
            self.needed = max(self.needed, used)
            if self._limit is not None:
                pages = (self._limit - used + path.stat().st_size) // PAGE
                connection.execute(f"PRAGMA max_page_count = {max(1, pages)}")
            return connection

        return connect
