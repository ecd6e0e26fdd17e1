"""Save a run's checkpoint: its state in SQLite, and its arrays in files beside the database.

    out/checkpoint/run.db                the run, its rounds and its sites; a transaction per phase
    out/checkpoint/frozen.safetensors    the frozen arrays, and the adapter before the first round;
                                         written once
    out/checkpoint/round-K.safetensors   adapter and strategy state after round K

Guarantee: arrays are on disk before the transaction that names their file and sha256, and older
arrays are removed after the transaction. So after a crash at any time either the old or the new
state is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from fedtune.core.config import Study, study_from_json
from fedtune.core.errors import InfrastructureError, InputError
from fedtune.core.files.writing import replace
from fedtune.core.run_folder import PLACES
from fedtune.core.strategy import State
from fedtune.core.wire.codec import Arrays
from fedtune.runs.choice import check_vacant

if TYPE_CHECKING:
    from flwr.app import RecordDict

FORMAT = "fedtune-run-3"
BUSY = 60.0  # seconds to wait for another process that has locked the database
FOLDER = "checkpoint"
DATABASE = "run.db"
FROZEN = "frozen.safetensors"
PRAGMAS = ("synchronous = EXTRA", "trusted_schema = OFF")  # EXTRA: as in core/ledger/chain.py
PER_SITE = ("sizes", "keys", "receipts", "events", "queries", "admission")
SCHEMA = (
    "CREATE TABLE run (format TEXT, phase TEXT, round INTEGER, asked TEXT, study TEXT, "
    "before TEXT, files TEXT, sha256 TEXT)",  # one row; sha256 of all other values of all tables
    "CREATE TABLE rounds (round INTEGER PRIMARY KEY, entry TEXT NOT NULL)",
    f"CREATE TABLE sites (name TEXT PRIMARY KEY, {' TEXT, '.join(PER_SITE)} TEXT)",
)
DISK = {
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL),
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY),
}
Rows = tuple[list[Any], list[list[Any]], list[list[Any]]]  # run, rounds, sites


class CheckpointError(InputError):
    """A checkpoint is damaged, or belongs to another study."""


class Phase(StrEnum):
    """What a run has done last, as saved in its checkpoint. Here k is the last saved round.

    started → asked → kept [→ queried] → asked → … → finished

    | phase    | meaning                                                          |
    | started  | the run began, and no round was ordered yet                      |
    | asked    | sites were ordered to train round k + 1                          |
    | kept     | round k was saved                                                |
    | queried  | round k was saved, and the query about held-out records was made |
    | finished | the run has ended                                                |"""

    STARTED = "started"
    ASKED = "asked"
    KEPT = "kept"
    QUERIED = "queried"
    FINISHED = "finished"


FOLLOWS = {
    Phase.STARTED: {Phase.ASKED},
    Phase.ASKED: {Phase.KEPT},
    Phase.KEPT: {Phase.ASKED, Phase.QUERIED, Phase.FINISHED},
    Phase.QUERIED: {Phase.ASKED, Phase.FINISHED},
    Phase.FINISHED: {Phase.FINISHED},
}


@dataclass
class Progress:
    """The state of a run, which its checkpoint holds.

    - asked: digest of the study as given by the user
    - study: the study with base digest, rounds and the digests of public arrays filled in
    - adapter: the newest adapter, its trainable arrays by name
    - frozen: the arrays that sites receive and do not train
    - origin: with [selection] or a public start, the adapter before the first round; else {}
    - phase: what the run has done last
    - round: the last saved round; adapter and strategy change only together with it
    - strategy: the strategy's state after the last saved round
    - sizes: site -> its declared size
    - keys: site -> its public signing key
    - events: site -> the step log of its training in this study so far
    - queries: site -> the step log of its answers to queries
    - receipts: site -> its newest receipt, which the next order to the site carries
    - before: metric -> value of the base, measured before the first round
    - started: metric -> value of the public start, measured before the first round
    - expected: the forecast of the gain that the sites' records add to the start
    - admission: site -> a text about its last answer to the plan
    - history: one entry for each saved round
    - attempt: with secure aggregation, the attempt at the round in progress

    Guarantee: every field is public, or was noised at a site before the site sent it."""

    asked: str
    study: Study
    adapter: Arrays
    frozen: Arrays
    origin: Arrays = field(default_factory=dict)
    phase: Phase = Phase.STARTED
    round: int = 0
    strategy: State = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    queries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    started: dict[str, float] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)
    admission: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    attempt: dict[str, Any] = field(default_factory=dict)

    def enter(self, phase: Phase) -> None:
        assert phase in FOLLOWS[self.phase], f"{phase} does not follow {self.phase}"
        self.phase = phase


def save(out: Path, progress: Progress) -> None:
    """Save the run's state `progress` in the checkpoint of the run's folder `out`. When the
    function returns, the state survives a crash of the machine.

    Errors: InfrastructureError if the disk refuses, which leaves the previous state intact;
    CheckpointError if the database is damaged."""
    folder = out / FOLDER
    groups: dict[str, dict[str, Any]] = {
        FROZEN: {"frozen": progress.frozen, "origin": progress.origin},
        _arrays(progress.round): {"adapter": progress.adapter, "strategy": progress.strategy},
    }
    saved = _files(folder / DATABASE)
    files = {n: saved.get(n) or _put(folder / n, arrays) for n, arrays in groups.items()}
    _commit(folder / DATABASE, _rows(progress, files))
    _prune(folder, files)


def load(out: Path, study: Study) -> Progress | None:
    """Load the run of `study` from `out`; None if no run was saved there.

    Errors: CheckpointError if the checkpoint is damaged or belongs to another study;
    InfrastructureError if the database cannot be opened."""
    folder = out / FOLDER
    path = folder / DATABASE
    if not path.exists():
        first = {FROZEN, _arrays(0), PLACES.name}  # files that a crash in the first save may leave
        if folder.exists() and any(
            p.name not in first and p.suffix != ".new" for p in folder.iterdir()
        ):
            _refuse_damaged(path)
        return None
    with sqlite_errors(path, OSError, SafetensorError, ValueError):
        run, rounds, sites = _read(path)
        _, phase, round_, asked, resolved, before, files = run
        arrays: dict[str, Any] = {"adapter": {}, "frozen": {}, "origin": {}, "strategy": {}}
        for name, sha256 in json.loads(files).items():
            for key, array in _get(folder / name, sha256).items():
                group, _, inner = key.partition("/")
                arrays[group][inner] = array
    measured = json.loads(before)
    if asked != study.digest:
        raise CheckpointError(
            f"{path}: belongs to another study ({asked[:19]}…)",
            f"the study that is to run ({study.digest[:19]}…)",
            "continue the study with which it was made, or choose another --out",
        )
    names = ("public", "selection", "evaluation")
    tables = {name: getattr(study, name) for name in names}  # with the public files' present paths
    return Progress(
        asked=asked,
        study=study_from_json(resolved).model_copy(update=tables),
        phase=Phase(phase),
        round=round_,
        before=measured.get("base", measured),  # stored by itself if there is no other entry
        started=measured.get("start", {}),
        expected=measured.get("expected", {}),
        attempt=measured.get("attempt", {}),
        history=[json.loads(entry) for _, entry in rounds],
        **arrays,
        **{
            key: {row[0]: json.loads(row[n]) for row in sites if row[n] is not None}
            for n, key in enumerate(PER_SITE, 1)
        },
    )


def open_folder(out: Path, study: Study, *, resume: bool) -> Progress | None:
    """Create the folder `out`, readable only by this user, if it does not exist. With `resume`,
    load the run in it.

    Returns the run's state; None without `resume`, or if no run was saved there. Errors:
    ConfigError if `out` holds a run and `resume` is false; InfrastructureError if `out` cannot be
    made, or the database cannot be opened; CheckpointError if the checkpoint is damaged or belongs
    to another study."""
    if not resume:
        check_vacant(out)
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InfrastructureError(
            f"{out}: cannot be made ({error.strerror})",
            todo="free disk space or fix the permissions",
        ) from None
    return load(out, study) if resume else None


def keep_plan(path: Path | None, message: RecordDict) -> None:
    """Store the plan and the coordinator's signature in a JSON file for `fedtune admit`. message:
    the message that carries the plan to the sites. path: the file; None to store nothing.

    Errors: InfrastructureError if the disk refuses."""
    if path is not None:
        plan = message.config_records["plan"]
        text = json.dumps({"study": plan["study"], "signature": plan["signature"]})
        replace(path, text.encode(), private=True)


EVIDENCE = ("evidence", "query_evidence")  # the parts of a round's entry that hold signatures


def figures(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a round: its entry in the history, without the sites' signed
    evidence."""
    return {key: value for key, value in entry.items() if key not in EVIDENCE}


def write_metrics(out: Path, history: list[dict[str, Any]]) -> None:
    """Write all of metrics.jsonl, a line for each round in `history`, so that the file agrees with
    the checkpoint also after a crash."""
    lines = [json.dumps(figures(entry), sort_keys=True) + "\n" for entry in history]
    replace(out / "metrics.jsonl", "".join(lines).encode())


class Receipts:
    """A file that holds each site's newest receipt over all runs, by the site's public key. path:
    the file; None to store nothing.

    The first order to a site in the next study carries the site's receipt. If the site's ledger was
    restored from an old copy, the site learns from the receipt that entries are missing. Errors:
    CheckpointError if the file is damaged."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._stamp: tuple[int, ...] = ()  # inode, time of change and size of the file last read
        self._read: dict[str, dict[str, Any]] = {}  # what this file held

    def read(self) -> dict[str, dict[str, Any]]:
        """Read the file: a site's public key -> its receipt; {} if there is no file. This is called
        for each site of a round, so the file is read again only if it was replaced since the last
        call."""
        if self.path is None or not self.path.exists():
            return {}
        try:
            found = self.path.stat()
            stamp = found.st_ino, found.st_mtime_ns, found.st_size
            if stamp == self._stamp:
                return self._read
            receipts = json.loads(self.path.read_text())
            if isinstance(receipts, dict) and all(isinstance(r, dict) for r in receipts.values()):
                self._stamp, self._read = stamp, receipts
                return receipts
        except (OSError, ValueError, RecursionError):
            pass
        raise CheckpointError(
            f"{self.path}: damaged",
            "the receipts as they were written",
            "restore it from a copy; if you delete it instead, a site whose ledger was rolled back "
            "is noticed later",
        )

    def keep(self, receipts: dict[str, dict[str, Any]]) -> None:
        """Enter receipts in the file, atomically; a site's new receipt replaces its old one.
        receipts: a site's public key -> its receipt.

        Errors: InfrastructureError."""
        if self.path is not None and receipts:
            saved = self.read()
            if saved | receipts != saved:
                text = json.dumps(saved | receipts, sort_keys=True)
                replace(self.path, text.encode(), private=True)


# ------------------------------------------------------------------------------------ database


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection to the SQLite file `path`. On this connection a transaction begins only
    where the code says so, and what is committed survives a crash of the machine."""
    connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None)
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _rows(progress: Progress, files: dict[str, str]) -> Rows:
    """Build what the database stores of a run: the rows of its three tables (run, rounds, sites),
    without the sha256 over all rows, which is added later. files: array file -> sha256."""
    measured = {"base": progress.before, "start": progress.started, "attempt": progress.attempt}
    measured |= {"expected": progress.expected} if progress.expected else {}
    more = progress.started or progress.attempt or progress.expected
    before = json.dumps(measured if more else progress.before)
    study = progress.study.model_dump_json()
    run = [FORMAT, str(progress.phase), progress.round, progress.asked, study, before]
    rounds = [[n, json.dumps(entry)] for n, entry in enumerate(progress.history, 1)]
    columns = [getattr(progress, key) for key in PER_SITE]
    names = sorted({name for column in columns for name in column})
    sites = [
        [name, *(json.dumps(column[name]) if name in column else None for column in columns)]
        for name in names
    ]
    return [*run, json.dumps(files)], rounds, sites


def _commit(path: Path, rows: Rows) -> None:
    """Commit the rows to the database. The first commit builds the file elsewhere and moves it to
    `path`, so that a database at `path` always holds a complete state."""
    if not path.exists():
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as sql:
            for statement in SCHEMA:
                sql.execute(statement)
            _fill(sql, rows)
            replace(path, sql.serialize())
        return
    with sqlite_errors(path), closing(connect(path)) as sql:
        sql.execute("BEGIN IMMEDIATE")
        _fill(sql, rows)
        sql.execute("COMMIT")


def _fill(sql: sqlite3.Connection, rows: Rows) -> None:
    run, rounds, sites = rows
    ((stored,),) = sql.execute("SELECT count(*) FROM rounds")
    sql.execute("DELETE FROM run")
    sql.execute("INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [*run, _sha256(rows)])
    # A query may have changed the newest stored round since; older ones never change.
    sql.executemany("INSERT OR REPLACE INTO rounds VALUES (?, ?)", rounds[max(stored - 1, 0) :])
    places = ", ".join("?" * (1 + len(PER_SITE)))
    sql.executemany(f"INSERT OR REPLACE INTO sites VALUES ({places})", sites)


def _read(path: Path) -> Rows:
    with closing(connect(path)) as sql:
        if [*sql.execute("PRAGMA integrity_check")] != [("ok",)]:
            _refuse_damaged(path)
        ((*run, sha256),) = sql.execute("SELECT * FROM run")
        rounds = [list(row) for row in sql.execute("SELECT * FROM rounds ORDER BY round")]
        sites = [list(row) for row in sql.execute("SELECT * FROM sites ORDER BY name")]
    rows = run, rounds, sites
    if sha256 != _sha256(rows):
        _refuse_damaged(path)
    if run[0] != FORMAT:
        raise CheckpointError(
            f"{path}: written by another release of fedtune (format {run[0]})",
            FORMAT,
            "resume it with the release that wrote it; nothing was changed",
        )
    return rows


def _sha256(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# -------------------------------------------------------------------------------------- arrays


def _arrays(round_: int) -> str:
    return f"round-{round_}.safetensors"


def _files(path: Path) -> dict[str, str]:
    """Return, from the database `path`, file -> sha256 for the array files that its last
    transaction names; {} if there was no transaction yet."""
    if not path.exists():
        return {}
    with sqlite_errors(path, ValueError, TypeError), closing(connect(path)) as sql:
        ((files,),) = sql.execute("SELECT files FROM run")
        digests: dict[str, str] = json.loads(files)
        return digests


def _put(path: Path, groups: dict[str, Any]) -> str:
    """Write arrays to the file `path`, so that they survive a crash of the machine, and return the
    file's sha256. groups: name of a group -> (name -> array)."""
    data = to_bytes(
        {
            f"{group}/{name}": np.asarray(array, order="C")
            for group, arrays in groups.items()
            for name, array in arrays.items()
        }
    )
    replace(path, data)
    return hashlib.sha256(data).hexdigest()


def _get(path: Path, sha256: str) -> dict[str, Any]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        _refuse_damaged(path)
    return from_bytes(data)


def _prune(folder: Path, files: dict[str, str]) -> None:
    """Remove two kinds of files from the checkpoint's folder: array files that `files` does not
    name, which belong to earlier rounds, and incomplete files that a crash left."""
    for path in folder.iterdir():
        if path.suffix in (".safetensors", ".new") and path.name not in files:
            with suppress(OSError):  # the next save tries again
                os.unlink(path)


@contextmanager
def sqlite_errors(path: Path, *damage: type[Exception]) -> Iterator[None]:
    """A context manager that replaces sqlite's errors in its block: by InfrastructureError if the
    disk refuses, else by CheckpointError. damage: further exceptions that mean a damaged file, and
    become CheckpointError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in DISK:
            raise InfrastructureError(
                f"{path}: cannot be written ({error})",
                todo="free disk space, fix the permissions or stop the other process, then "
                "use --resume",
            ) from None
        _refuse_damaged(path)
    except sqlite3.Error:
        _refuse_damaged(path)
    except damage:
        _refuse_damaged(path)


def _refuse_damaged(path: Path) -> NoReturn:
    raise CheckpointError(
        f"{path}: damaged, or not a checkpoint of this version of fedtune",
        "the file as it was written",
        "restore it from a copy, or start again in another --out",
    ) from None
