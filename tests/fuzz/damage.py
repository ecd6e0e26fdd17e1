"""What may have become of a file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.fuzz.case import (
    Damage,
)


def _gone(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _as(body: bytes) -> Damage:
    def damage(path: Path) -> None:
        _gone(path)
        path.write_bytes(body)

    return damage


def _folder(path: Path) -> None:
    _gone(path)
    path.mkdir()


def _fifo(path: Path) -> None:
    _gone(path)
    os.mkfifo(path)


def _link(target: str) -> Damage:
    def damage(path: Path) -> None:
        _gone(path)
        path.symlink_to(target)

    return damage


def _half(path: Path) -> None:
    body = path.read_bytes()
    path.write_bytes(body[: len(body) // 2])


def _huge(path: Path) -> None:
    os.truncate(path, 2**42)


def _utf16(path: Path) -> None:
    path.write_bytes(path.read_bytes().decode("utf-8", "replace").encode("utf-16"))


def _latin(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n\xe9\xff\n")


def _nul(path: Path) -> None:
    path.write_bytes(b"\0" * 64 + path.read_bytes())


def _loop(path: Path) -> None:
    _gone(path)
    path.symlink_to(path.name)
