"""Back up a coordinator to one file while it runs, and restore it on another machine.

    manifest.json        format, study, when, and sha256 of every file below
    study.toml           the plan; also the public files in its folder that it names
    coordinator/         the home: CA, keys, registry, audit log; no files of a running SuperLink
    runs/NAME/           the run, as it was between two transactions of its checkpoint

Guarantee: the run's files belong to one state that a crash could have left, so `--resume` continues
from it. Charges that sites entered after the backup stay in their ledgers; a round that sites
trained after the backup is ordered again. A backup holds the consortium's private keys: its mode is
0600, and it must be kept as safe as the keys."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

from cryptography.exceptions import InvalidSignature

from fedtune.core.config import Study
from fedtune.core.config.address import host_and_port
from fedtune.core.errors import InfrastructureError, InputError
from fedtune.core.files import reading
from fedtune.core.files.writing import drafted, replace
from fedtune.core.ledger.audit_log import TEXT
from fedtune.core.processes import private_folder
from fedtune.doctor import tls
from fedtune.evidence.sign import INDEX, VERSIONS
from fedtune.flower import certs
from fedtune.server.store import DATABASE, FOLDER, sqlite_errors
from fedtune.server.versions import LINK

FORMAT = "fedtune-backup-1"
MANIFEST = "manifest.json"
PLAN = "study.toml"
HOME = "coordinator"
RESTORED = "restored.json"
NOT_KEPT = {"flower", "status.json", "status.lock", "lock", "audit.lock"}
TRIES, PAUSE = 30, 0.5
TODO = "name a file that `fedtune backup` wrote; if this is one, name an older one"
Files = dict[str, bytes]


def backup(study: Study, plan: Path, home: Path, run: Path | None, to: Path) -> dict[str, Any]:
    """Write the coordinator's state to one new file that only its owner can read.

    - study: the study as loaded from `plan`. Public files that it names are included if they lie in
      the plan's folder.
    - plan: the file study.toml
    - home: the coordinator's home, with CA, keys and registry
    - run: the run's folder; None if there is no run yet
    - to: the file to write

    Returns the manifest: the backup's format, the study's name, the time, the sha256 of every
    file, and the target of the released adapter's link.

    Errors: InputError if `to` exists, the home has no CA, or `run` is not a run; ConfigError if
    the CA cannot be read; CheckpointError if the run cannot be read; InfrastructureError if the
    backup cannot be written, or the run keeps changing."""
    if os.path.lexists(to):
        raise InputError(f"{to}: exists", "a new file", "choose another with --to")
    home_with_ca(home)
    files = _collect_public(study, plan) | _home(home)
    links: dict[str, str] = {}
    if run is not None:
        _check_run(run)
        kept, link = _at_rest(run)
        files |= {f"runs/{run.name}/{name}": content for name, content in kept.items()}
        links = {f"runs/{run.name}/{LINK}": link} if link else {}
    manifest = {
        "format": FORMAT,
        "study": study.study.name,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "links": links,
    }
    content = json.dumps(manifest, indent=1, sort_keys=True).encode()
    with drafted(to) as draft, open(draft, "xb", opener=_open_private) as sink:
        with tarfile.open(fileobj=sink, mode="w") as archive:
            for name, body in ({MANIFEST: content} | files).items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(body), 0o600
                archive.addfile(entry, io.BytesIO(body))
        sink.flush()
        os.fsync(sink.fileno())
    return manifest


def restore(file: Path, into: Path) -> dict[str, Any]:
    """Write a backup's files to `into`, a new folder: study.toml, and coordinator/ and runs/ beside
    it.

    Every file is checked before any is written. Returns the backup's manifest (format, study, time,
    sha256 of the files, links). Errors: InputError if `file` is not a complete backup, or `into`
    exists; InfrastructureError if the disk refuses."""
    if os.path.lexists(into):
        raise InputError(f"{into}: exists", "a new folder", "choose another with --to")
    manifest, files = _read(file)
    with drafted(into) as draft:
        private_folder(draft)
        for name, content in files.items():
            replace(draft / name, content, private=True)
        for name, target in manifest["links"].items():
            os.symlink(target, draft / name)
        mark = {name: manifest[name] for name in ("study", "at")}
        replace(draft / HOME / RESTORED, json.dumps(mark).encode(), private=True)
    return manifest


def refuse_second(home: Path) -> None:
    """Refuse to start from a restored home while another coordinator answers at the consortium's
    address: the coordinator that was backed up, or another that was restored from the same backup.

    A coordinator that this machine cannot reach, or that has another address, is not noticed.
    Errors: InfrastructureError if a coordinator of this consortium answers."""
    if not (home / RESTORED).exists() or not (home / "address").is_file():
        return
    address = reading.text(home / "address", "where sites connect", "give it with --name").strip()
    try:
        host, port = host_and_port(address)
        leaf = tls.fetch_certificate(
            lambda context: asyncio.open_connection(host, port, ssl=context), address
        )
        leaf.verify_directly_issued_by(certs.ca(home)[1])
    except (ValueError, TypeError, InvalidSignature, InfrastructureError):
        return  # nobody answers there, or somebody who is not of this consortium
    raise InfrastructureError(
        f"another coordinator of this consortium answers at {address}",
        "one coordinator at a time",
        "stop that coordinator, even if it was only cut off for a while; then start this one again",
    )


def _check_run(run: Path) -> None:
    """Check that `run` is the folder of a run. Errors: InputError if it is not."""
    if not any(os.path.lexists(run / name) for name in (FOLDER, "plan.json", "status.json")):
        raise InputError(
            f"{run}: not a run folder",
            "the folder of a run that has begun",
            "name it with --out; the default is the newest runs/NAME beside study.toml",
        )


def home_with_ca(home: Path) -> Path:
    """Check that the coordinator's home `home` holds a CA that can be read, and return `home`. A
    missing CA is not made.

    Errors: InputError if there is no CA; ConfigError if it cannot be read."""
    if not (home / "ca.pem").is_file():
        raise InputError(
            f"{home}: not a coordinator's home",
            "a folder with ca.pem, as `fedtune server` makes it",
            "name the home with --home",
        )
    certs.ca(home)
    return home


def _collect_public(study: Study, plan: Path) -> Files:
    """Read the file `plan`, a study.toml, and those of the study's public files that lie in the
    same folder. Return path in this folder -> content."""
    named = [t.path for t in (study.evaluation, study.selection, study.public) if t]
    folder = plan.resolve().parent
    inside = [path.resolve() for path in named if path.resolve().is_relative_to(folder)]
    files = {str(p.relative_to(folder)): p.read_bytes() for p in inside if p.is_file()}
    return {PLAN: plan.read_bytes()} | files


def _home(home: Path) -> Files:
    return {f"{HOME}/{name}": content for name, content in _tree(home)}


def _tree(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield a pair for each regular file in `folder`: its path in the folder, and its content.
    Drafts, locks, the files of a running process and whatever lies behind a symbolic link are
    passed over. An incomplete last line of a log is left out."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if NOT_KEPT & set(parts) or path.suffix == ".new" or not path.is_file():
            continue
        if any(parent.is_symlink() for parent in [path, *path.parents][: len(parts)]):
            continue
        content = path.read_bytes()
        if path.suffix == ".jsonl":
            content = content[: content.rfind(b"\n") + 1]
        yield str(PurePosixPath(*parts)), content


def _at_rest(run: Path) -> tuple[Files, str]:
    """Read the files of a run so that all of them belong to one state of the run, even if the run
    is still going on. The arrays that are read are those that the checkpoint's database names, and
    the database did not change meanwhile. Return path in the run's folder -> content, and the
    target of the released adapter's link, "" if there is none.

    Errors: InfrastructureError if the run changed during each of TRIES readings."""
    database = run / FOLDER / DATABASE
    for _ in range(TRIES):
        before = _snapshot(database)
        link = os.readlink(run / LINK) if (run / LINK).is_symlink() else ""
        try:
            index = {p: p.read_bytes() for p in [run / VERSIONS / INDEX] if p.is_file()}
            files = {
                name: content
                for name, content in _tree(run)
                if not name.startswith(f"{FOLDER}/") or name.endswith(".safetensors")
            }
        except FileNotFoundError:  # a round was saved meanwhile, and an older one's arrays removed
            index, files = {}, {}
        if files and before == _snapshot(database) and _has_all_arrays(database, files, before):
            # The index was read before the folders, so it may be older, as after a crash.
            files |= {str(p.relative_to(run)): content for p, content in index.items()}
            return files | ({f"{FOLDER}/{DATABASE}": before} if before else {}), link
        time.sleep(PAUSE)
    raise InfrastructureError(
        f"{run}: changed during each of {TRIES} attempts to read it",
        "a run that does not change while it is read, as between two rounds",
        "try again later",
    )


def _snapshot(database: Path) -> bytes:
    """Return the database's content after its last transaction; b"" if there is no database.

    Errors: CheckpointError if the database is damaged."""
    if not os.path.lexists(database):
        return b""
    reading.regular(database, "a run's checkpoint", "restore it from a copy")
    where = f"file:{database}?mode=ro"
    with (
        sqlite_errors(database, ValueError),
        closing(sqlite3.connect(where, uri=True, timeout=30)) as sql,
    ):
        if not (copy := sql.serialize()):
            raise ValueError
        return copy


def _has_all_arrays(path: Path, files: Files, database: bytes) -> bool:
    """Return whether `files` (path in the run's folder -> content) holds every array file that the
    database names, with its sha256. database: the database's content; b"" names no file. path: the
    database's file, for error texts.

    Errors: CheckpointError if `database` is not a checkpoint's database."""
    if not database:
        return True
    with sqlite_errors(path, ValueError, TypeError, AttributeError):
        with closing(sqlite3.connect(":memory:")) as sql:
            sql.deserialize(database)
            ((text,),) = sql.execute("SELECT files FROM run")
        named = json.loads(text)
        return all(
            hashlib.sha256(files.get(f"{FOLDER}/{name}", b"")).hexdigest() == sha256
            for name, sha256 in named.items()
        )


def _read(file: Path) -> tuple[dict[str, Any], Files]:
    """Read the backup `file` and check it completely. Return the backup's manifest, and path ->
    content for the files in it. Errors: InputError if the file is damaged, is no backup, or was
    written by another release."""
    expected = "a whole backup of a coordinator"
    size, total = reading.regular(file, expected, TODO).stat().st_size, 0
    try:
        with tarfile.open(file, mode="r:") as archive:
            files: Files = {}
            for entry in archive:
                total += entry.size
                if not entry.isfile() or entry.sparse is not None or not _plain(entry.name):
                    raise ValueError
                if total > size:  # a sparse file could claim more bytes than the archive has
                    raise ValueError
                body = archive.extractfile(entry)
                files[entry.name] = body.read() if body else b""
        manifest = json.loads(files.pop(MANIFEST))
        if manifest["format"] != FORMAT:
            raise InputError(
                f"{file}: written by another release (format {str(manifest['format'])[:40]})",
                f"format {FORMAT}",
                "restore it with the release that wrote it",
            )
        sums = {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}
        links = manifest["links"]
        folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
        if folders & set(files) or set(links) & set(files):
            raise ValueError  # a file and a folder, or a link, of one name
        if sums != manifest["files"] or not {PLAN, f"{HOME}/ca.pem"} <= set(files):
            raise ValueError
        for name, target in links.items():
            if not _plain(name) or not _plain(target):
                raise ValueError
            if name in folders or str(PurePosixPath(name).parent) not in folders:
                raise ValueError
        if not all(manifest[key] and TEXT.fullmatch(manifest[key]) for key in ("study", "at")):
            raise ValueError
    except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, EOFError, OSError,
            RecursionError, OverflowError):  # fmt: skip
        raise InputError(f"{file}: damaged, or not a backup", expected, TODO) from None
    return manifest, files


def _plain(name: str) -> bool:
    """Return whether the name of a file in a backup is safe to restore: it is printable, and a
    relative path that stays inside the folder to which the backup is restored."""
    path = PurePosixPath(name)
    if reading.refuse_path(name) or not name.isprintable():
        return False
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
