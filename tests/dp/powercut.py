"""A disk that remembers every write, sync and rename, and can be cut off after any of them.

The ledger runs on a real folder through a recording SQLite file layer (an apsw VFS) and a recording
`os`. `images` then builds what a disk may hold after a power cut: synced content is there, unsynced
writes are there, missing or torn at a sector, renames and deletions that the folder's sync did not
cover are there up to some point. A lying disk forgets syncs as well.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw
import pytest

from fedtune.core.files import writing
from fedtune.core.ledger import chain
from fedtune.core.ledger import files as ledger_files

SECTOR = 512
Op = tuple[Any, ...]  # (what, path relative to the folder, …), or a mark of the test's own


class Disk:
    """Records what happens below `folder`, from `with recording(...)` on."""

    def __init__(self, folder: Path, pragmas: Sequence[str] = chain.PRAGMAS) -> None:
        self.folder, self.pragmas = folder, pragmas
        self.base = {str(p.relative_to(folder)): p.read_bytes() for p in _files(folder)}
        self.log: list[Op] = []
        self.name = f"recorder-{id(self)}"
        self._vfs = _Vfs(self)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(chain, "connect", self.connect)
        recorder = Recorder(self)
        for module in (writing, ledger_files):
            patch.setattr(module, "os", recorder)

    def connect(self, path: Path, **_: bool) -> apsw.Connection:
        connection = apsw.Connection(str(path), vfs=self.name)
        for pragma in self.pragmas:
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def note(self, what: str, path: str | Path, *rest: Any) -> None:
        self.log.append((what, os.path.relpath(path, self.folder), *rest))


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file())


class _Vfs(apsw.VFS):  # type: ignore[misc]
    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        super().__init__(disk.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> _File:
        return _File(self._disk, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self._disk.note("unlink", filename)
        if syncdir:
            self._disk.note("syncdir", Path(filename).parent)


class _File(apsw.VFSFile):  # type: ignore[misc]
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._new = not os.path.exists(self._path)
        super().__init__("", name, flags)
        if self._new:
            disk.note("create", self._path)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._disk.note("write", self._path, offset, bytes(data))

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        self._disk.note("truncate", self._path, size)

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self._disk.note("sync", self._path)
        if self._new:  # as SQLite's unix layer does at a new file's first sync
            self._disk.note("syncdir", Path(self._path).parent)
            self._new = False


class Recorder:
    """The functions of `os` that change a disk, recorded."""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._open = disk, dict[int, tuple[str, int]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        before = os.path.exists(path)
        descriptor = os.open(path, flags, mode)
        self._open[descriptor] = str(path), 0
        if not before:
            self._disk.note("create", path)
        elif flags & os.O_TRUNC:
            self._disk.note("truncate", path, 0)
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        path, at = self._open[descriptor]
        count = os.write(descriptor, data)
        self._disk.note("write", path, at, bytes(data[:count]))
        self._open[descriptor] = path, at + count
        return count

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        self._disk.note("syncdir" if folder else "sync", self._open[descriptor][0])

    def close(self, descriptor: int) -> None:
        os.close(descriptor)
        self._open.pop(descriptor)

    def replace(self, source: Path, to: Path) -> None:
        os.replace(source, to)
        self._disk.note("rename", source, os.path.relpath(to, self._disk.folder))

    def unlink(self, path: Path) -> None:
        os.unlink(path)
        self._disk.note("unlink", path)


@dataclass
class _Inode:
    content: bytes = b""
    pending: list[Op] = field(default_factory=list)


class _Platter:
    """What is on disk for certain, and what may be."""

    def __init__(self, base: dict[str, bytes]) -> None:
        self.names = {path: _Inode(content) for path, content in base.items()}
        self.live = dict(self.names)
        self.pending: dict[str, list[Op]] = {}

    def take(self, op: Op) -> None:
        what, path = op[0], op[1]
        if what in ("write", "truncate"):
            self.live[path].pending.append(op)
        elif what == "sync":
            self.live[path].content = _after(self.live[path])
            self.live[path].pending = []
        elif what == "syncdir":
            for change in self.pending.pop("" if path == "." else path, []):
                _change(self.names, change)
        else:
            change = ("create", path, _Inode()) if what == "create" else op
            _change(self.live, change)
            self.pending.setdefault(os.path.dirname(path), []).append(change)

    def image(self, draw: random.Random, style: str) -> dict[str, bytes]:
        """style: "kept" (all that was written), "lost" (all that was not synced), or "mixed"."""
        names = dict(self.names)
        for changes in self.pending.values():
            count = {"kept": len(changes), "lost": 0}.get(style, draw.randint(0, len(changes)))
            for change in changes[:count]:
                _change(names, change)
        return {path: _after(inode, draw, style) for path, inode in names.items()}


def _change(names: dict[str, _Inode], op: Op) -> None:
    what, path, *rest = op
    if what == "create":
        names[path] = rest[0]
    elif what == "rename":
        if path in names:
            names[rest[0]] = names.pop(path)
    else:
        names.pop(path, None)


def _after(inode: _Inode, draw: random.Random | None = None, style: str = "kept") -> bytes:
    content = bytearray(inode.content)
    for what, _, *rest in inode.pending:
        if style == "lost" or (style == "mixed" and draw and draw.random() < 0.5):
            continue
        if what == "truncate":
            del content[rest[0] :]
            continue
        offset, data = rest
        if style == "mixed" and draw and draw.random() < 0.3:
            data = data[: draw.randrange(0, len(data) + 1, SECTOR)]
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset : offset + len(data)] = data
    return bytes(content)


def images(
    disk: Disk, draw: random.Random, lies: float = 0.0, each: int = 2
) -> Iterator[tuple[list[Op], dict[str, bytes]]]:
    """(what had happened, what the disk holds) for a cut after every operation, in several styles.

    lies: the share of syncs that the disk claims and does not do."""
    platter = _Platter(disk.base)
    for number, op in enumerate(disk.log, 1):
        if op[0] in FILE_OPS and not (op[0].startswith("sync") and draw.random() < lies):
            platter.take(op)
        for style in ("kept", "lost", *["mixed"] * each):
            yield disk.log[:number], platter.image(draw, style)


FILE_OPS = {"create", "write", "truncate", "sync", "syncdir", "rename", "unlink"}


def put(image: dict[str, bytes], folder: Path) -> None:
    """Write the image into the empty or new `folder`."""
    for path, content in image.items():
        to = folder / path
        to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        to.write_bytes(content)
        to.chmod(0o600)
