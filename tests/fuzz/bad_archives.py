"""Backups that nobody wrote: of other members, other manifests, other bytes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case, Damage

BACKUP = "hub.backup"
RESTORE = ("restore", BACKUP, "--to", "new")
Bodies = dict[str, bytes]


def _unpacked(path: Path) -> Bodies:
    with tarfile.open(path) as archive:
        found = {entry.name: archive.extractfile(entry) for entry in archive}
        return {name: body.read() for name, body in found.items() if body}


def _packed(path: Path, bodies: Bodies, odd: Callable[[tarfile.TarFile], None] | None) -> None:
    with tarfile.open(path, "w") as archive:
        for name, body in bodies.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
        if odd:
            odd(archive)


def _again(
    change: Callable[[Bodies], Bodies | None] = lambda bodies: None,
    manifest: Callable[[dict[str, Any]], Any] = lambda body: None,
    odd: Callable[[tarfile.TarFile], None] | None = None,
    sums: bool = True,
) -> Damage:
    """Another backup, whose sums are right where `sums` says so."""

    def damage(world: Path) -> None:
        bodies = _unpacked(world / BACKUP)
        body = json.loads(bodies.pop("manifest.json"))
        bodies = change(bodies) or bodies
        if sums:
            body["files"] = {n: hashlib.sha256(text).hexdigest() for n, text in bodies.items()}
        body = manifest(body) or body
        _packed(world / BACKUP, {"manifest.json": json.dumps(body).encode()} | bodies, odd)

    return damage


def _member(kind: bytes, name: str, link: str = "") -> Callable[[tarfile.TarFile], None]:
    def add(archive: tarfile.TarFile) -> None:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, link
        archive.addfile(entry)

    return add


WRONG: tuple[Any, ...] = (
    None,
    5,
    [],
    {},
    "",
    "x",
    "\x1b[31m",
    "a\0b",
    "\udc80",
    [[{}]],
    True,
    1e308,
)
NAMES = ("../x", "/etc/x", "a/../../x", "", ".", "a\0b", "\x1b[31m", "x" * 300, "d/" * 3000 + "x",
         "study.toml/x", "coordinator", "coordinator/nodes/\nx.json")  # fmt: skip
KINDS = {"hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE, "device": tarfile.CHRTYPE,
         "disk": tarfile.BLKTYPE, "folder": tarfile.DIRTYPE, "pipe": tarfile.FIFOTYPE,
         "continued": tarfile.CONTTYPE, "unknown": b"Z"}  # fmt: skip


def _cut(share: float) -> Damage:
    def damage(world: Path) -> None:
        path = world / BACKUP
        body = path.read_bytes()
        path.write_bytes(body[: int(len(body) * share)])

    return damage


def _flipped(at: int) -> Damage:
    def damage(world: Path) -> None:
        path = world / BACKUP
        body = bytearray(path.read_bytes())
        body[at % len(body)] ^= 0xFF
        path.write_bytes(body)

    return damage


def archives() -> Iterator[Case]:
    """Every kind of member, name and manifest."""
    for name, kind in KINDS.items():
        yield Case(
            f"archive member: {name}", _again(odd=_member(kind, "run", "/etc/passwd")), RESTORE
        )
    for number, name in enumerate(NAMES):
        body = {name: b"x"}
        yield Case(f"archive name: {number}", _again(lambda b, m=body: b | m), RESTORE)
        link = {"links": {"runs/run/adapter": name}}
        yield Case(f"archive link to: {number}", _again(manifest=lambda b, m=link: b | m), RESTORE)
        link = {"links": {name: "versions/0"}}
        yield Case(f"archive link of: {number}", _again(manifest=lambda b, m=link: b | m), RESTORE)
    for key in ("format", "study", "at", "files", "links"):
        for number, value in enumerate(WRONG):
            if (key, value) in (("links", {}), ("study", "x"), ("at", "x")):
                continue
            changed = {key: value}
            name = f"archive {key}: {number}"
            yield Case(name, _again(manifest=lambda b, m=changed: b | m), RESTORE)
    for share in (0.0, 0.01, 0.3, 0.7, 0.95):
        yield Case(f"archive: cut at {share}", _cut(share), RESTORE)
    for at in (0, 100, 130, 156, 257, 345, 512, 600, 5000, 12345):
        yield Case(f"archive: byte {at}", _flipped(at), RESTORE, frozenset({0, 2}))
    yield Case(
        "archive: other sums", _again(lambda b: b | {"study.toml": b""}, sums=False), RESTORE
    )
    yield Case("archive: no plan", _again(lambda b: {n: t for n, t in b.items() if n[0] != "s"}),
               RESTORE)  # fmt: skip
