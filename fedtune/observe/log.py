"""Log one JSON line per event, with fields of an allow-list only. A record's text cannot be logged.

    {"time": "2026-05-04T09:30:00Z", "role": "coordinator", "event": "round", "round": 3, ...}

Guarantee: every value written is a number, a truth value, a digest, an address, a time, a name (at
most 64 letters, digits, dots, dashes; no spaces), or one of fedtune's fixed phrases and words.
There is no field for free text: a reason is replaced by the fixed phrase that it contains.
| found                           | what happens                                                 |
| a field that is not listed      | in strict mode NotLoggable is raised; else the field is left |
|                                 | out, and its name is listed under "dropped"                  |
| a value of another type or form | as above; the value is neither written nor in the error      |
| a reason with no known phrase   | "other" is written                                           |
| a number that is not finite     | null is written                                              |
| the log cannot be written       | one warning is given, and the study goes on                  |
Tests run in strict mode: FEDTUNE_STRICT=1 in the environment. Times are whole seconds, since the
duration of a batch depends on how many records were drawn into it.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from fedtune.core.errors import InfrastructureError
from fedtune.core.files import writing
from fedtune.core.files.room import between_orders, reserve
from fedtune.core.isolation import WALL
from fedtune.core.registry.metrics import METRICS
from fedtune.core.registry.reasons import OTHER, reason_of

Role = Literal["coordinator", "site"]
Record = dict[str, Any]

STRICT = "FEDTUNE_STRICT"
LIMIT = 16 * 2**20  # bytes after which a log is renamed to FILE.1, which replaces the previous one
OF_SITE = 2**20  # in place of LIMIT for a site's log, whose disk space is reserved beforehand
OF_A_LINE = 2**16  # largest number of bytes of a line in a site's log
MANY = 10_000  # largest number of sites in one event
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}|node \d{1,20}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}(:evaluation)?")
ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):\d{1,5}")
HEX = re.compile(r"[0-9A-Fa-f](?:[ :-]?[0-9A-Fa-f]){0,127}")
KEY = re.compile(r"[a-z_]{1,40}")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

logger = logging.getLogger("fedtune.observe")

# fmt: off
EVENTS = frozenset({
    "start", "planned", "begin", "site", "round", "version", "done", "stopped", "step",  # a run
    "records",
    "joined", "answered", "refused", "failed", "waiting", "reconnecting",  # a site's link
    "isolation",
    "listening", "ready",  # a coordinator: the port is open; the plan is made
    "connected", "disconnected", "admitted", "revoked", "renewed", "restarted",
})
STATUSES = frozenset({
    "admitted", "trained", "answered", "refused", "unprepared", "void", "failed", "dropped",
    "missing", "ready", "masked", "waiting",
    "late", "finished", "revoked", "joined", "connected", "disconnected", "retry", "below quorum",
})
KINDS = frozenset({
    "query.prepare", "query.evaluate", "query", "train", "train.ready", "train.masked",
    "prepare", "ready", "masked", "evaluate",
    "connection", "serverapp", "superlink", "supernode", "gateway", "forwarder",
})
LOGGABLE = frozenset(name for name, metric in METRICS.items() if metric.loggable)
# fmt: on
SCREEN = frozenset({"begin", "step", "records"})  # events for this machine's screen alone
NEVER = frozenset(  # fields that are known and never logged: they are for the screen or the report
    {"text", "out", "privacy", "total", "private_quality", "log", "path", "idempotency", "ended"}
)
ELSEWHERE = {("done", "quality")}  # (event, field), not logged: the rounds and the report have it
RENAMED = {"name": "site"}


class NotLoggable(TypeError):
    """An event has a field that is not listed, or a value of the wrong type or form for its field.
    Raised in strict mode only. The message names the field, never the value."""


def strict_here() -> bool:
    return os.environ.get(STRICT) == "1"


# ------------------------------------------------------------------------------ one value each


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise TypeError
    return int(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    number = float(value)
    return round(number, 6) if math.isfinite(number) else None


def _epsilon(value: Any) -> float | None:
    """Round an ε upwards, to 6 decimal places, so that the written value is never too small. Return
    None if the ε is not finite."""
    number = _number(value)
    return None if number is None else math.ceil(float(value) * 1e6) / 1e6


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise TypeError
        return value

    return check


def _one_of(allowed: frozenset[str]) -> Callable[[Any], str]:
    """Return a function that checks a text: it returns a word that is in `allowed` as it is, and
    "other" for any other text. For a value that is no text it raises TypeError."""

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        return value if value in allowed else OTHER

    return check


def _exception(value: Any) -> str:
    """Return the name `value` if this process has an exception class of that name, else "other"."""
    if not isinstance(value, str):
        raise TypeError
    names, pending = set(), [BaseException]
    while pending:
        for kind in type.__subclasses__(pending.pop()):
            if kind.__name__ not in names:
                names.add(kind.__name__)
                pending.append(kind)
    return value if value in names else OTHER


def _names(value: Any) -> list[str]:
    if not isinstance(value, list | tuple | set | frozenset) or len(value) > MANY:
        raise TypeError
    return sorted(_name(name) for name in value)


def by(key: Callable[[Any], str], rule: Callable[[Any], Any]) -> Callable[[Any], Record]:
    def check(value: Any) -> Record:
        if not isinstance(value, Mapping) or len(value) > MANY:
            raise TypeError
        return {key(name): rule(entry) for name, entry in value.items()}

    return check


def _walls(value: Any) -> list[str]:
    """Return the list `value` with every text replaced by "other" unless isolation.py uses it to
    say how a site's vault or courier is confined. The courier uses the network, so the texts that
    it sends cannot be trusted."""
    if not isinstance(value, list):
        raise TypeError
    return [wall if isinstance(wall, str) and WALL.fullmatch(wall) else OTHER for wall in value]


_name, _digest = _matching(NAME), _matching(DIGEST)
FIELDS: dict[str, Callable[[Any], Any]] = {
    "study": _name,
    "plan_digest": _digest,
    "private": _flag,
    "round": _count,
    "rounds": _count,
    "done": _count,
    "attempt": _count,
    "name": _name,
    "site": _name,
    "status": _one_of(STATUSES),
    "reason": reason_of,
    "kind": _one_of(KINDS),
    "error": _exception,
    "participants": _names,
    "free_query": _names,
    "missing": by(_name, reason_of),
    "late": by(_name, reason_of),
    "quality": by(_one_of(LOGGABLE), _number),
    "selection": by(_one_of(LOGGABLE), _number),
    "step": _number,
    "keep": _number,
    "epsilon": by(_name, _epsilon),
    "planned": by(_name, _epsilon),
    "fallback": by(_name, _epsilon),
    "bytes": _count,
    "bytes_up": by(_name, _count),
    "bytes_down": by(_name, _count),
    "seconds": _number,
    "address": _matching(ADDRESS),
    "port": _count,
    "fingerprint": _matching(HEX),
    "next": _matching(MOMENT),
    "slot": _count,
    "lora_ranks": by(_name, _count),
    "weights": by(_name, _count),
    "declared": by(_name, _one_of(frozenset({"public", "generated"}))),
    "signed": _flag,
    "champion": _count,
    "promoted": _flag,
    "confined": by(_one_of(frozenset({"vault", "courier"})), _walls),
    "open": _count,
}


# ------------------------------------------------------------------------------- one event


def cleaned(event: str, data: Mapping[str, Any], *, strict: bool) -> Record:
    """Return the fields of an event that may be logged. A field that is not listed, or whose value
    has the wrong form, is left out, and its name is entered in the field "dropped". Fields that are
    never logged, and those with the value None, are left out and not named.

    event: the event's name; a name that is not in EVENTS becomes "other". data: its fields. Errors:
    NotLoggable, if strict, in place of leaving a field out."""
    record: Record = {"event": event if event in EVENTS else OTHER}
    dropped = set() if event in EVENTS else {"event"}
    for key, value in data.items():
        if key in NEVER or value is None or (event, key) in ELSEWHERE:
            continue
        try:
            record[RENAMED.get(key, key)] = FIELDS[key](value)
        except (KeyError, TypeError):
            dropped.add(key if isinstance(key, str) and KEY.fullmatch(key) else "unnamed")
    if dropped and strict:
        raise NotLoggable(
            f"fields that are not listed, or of a wrong type or form: {', '.join(sorted(dropped))}"
        )
    return {**record, "dropped": sorted(dropped)} if dropped else record


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class JsonLog:
    """Appends each event to the file `path`, which only this user can read. An object can be used
    as `on_event`. Events of SCREEN, such as steps of a progress bar, are left out.

    Guarantee: a site's log takes or frees disk space only while the site is answering no order (an
    order is any request of the coordinator except one for admission). It does so at the log's first
    event, and when the log is renamed at OF_SITE bytes. The reason is that the courier influences
    when events are logged, and how many, and could take space that the ledger needs for an order. A
    line for which no space is reserved is left out. If the disk does not have the space, nothing is
    logged.

    - path: the log; it is made, with its folder, at the first event
    - role: written into each line; None writes none
    - strict: whether a field that may not be logged raises NotLoggable, in place of being left out;
      None asks the environment (FEDTUNE_STRICT=1)
    - ledger: the folder of the site's ledger; by default the folder in which `path` lies"""

    def __init__(
        self,
        path: Path,
        *,
        role: Role | None = None,
        strict: bool | None = None,
        ledger: Path | None = None,
    ) -> None:
        self.path, self._role = path, role
        self._ledger = ledger or path.parent
        self._earlier = path.with_name(path.name + ".1")
        self._strict = strict_here() if strict is None else strict
        self._mutex, self._warned = threading.Lock(), False
        # Whether a site's log has space reserved for itself and FILE.1; None: not tried yet.
        self._has_space: bool | None = None

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        record = cleaned(event, data, strict=self._strict)
        if event in SCREEN:
            return
        line = {"time": now(), **({"role": self._role} if self._role else {}), **record}
        try:
            with self._mutex:
                self._append(json.dumps(line, allow_nan=False, ensure_ascii=True) + "\n")
        except (OSError, InfrastructureError) as error:
            if not self._warned:
                why = error.strerror if isinstance(error, OSError) else error.happened
                logger.warning("%s: %s; events are not logged", self.path, why)
            self._warned = True

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        length = self.path.stat().st_size if self.path.exists() else 0
        if self._role == "site":
            if self._has_space is None or (self._has_space and length > OF_SITE):
                self._take_space(length)
                length = self.path.stat().st_size if self.path.exists() else 0
            if not self._has_space or length + len(line) > OF_SITE + OF_A_LINE:
                return
        elif length > LIMIT:
            self.path.replace(self._earlier)
        file = writing.open_own(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def _take_space(self, length: int) -> None:
        """Rename a full log to FILE.1, and reserve the disk space of a site's log and of FILE.1. Do
        nothing while the site is answering an order, that is, any request of the coordinator except
        one for admission. length: the present size of the log in bytes. Errors: OSError if the disk
        does not have the space; then nothing is logged until the next start."""
        with between_orders(self._ledger) as is_now:
            if not is_now:
                return
            self._has_space = False
            if length > OF_SITE:
                self.path.replace(self._earlier)
            for path in (self._earlier, self.path):
                self._reserve(path)
            self._has_space = True

    def _reserve(self, path: Path) -> None:
        """Reserve the disk space that a log file may take, without changing the file's length.
        Errors: OSError if the disk does not have the space."""
        file = writing.open_own(path, os.O_WRONLY | os.O_APPEND)
        try:
            if not reserve(file, OF_SITE + OF_A_LINE):
                raise OSError(errno.ENOSPC, "no disk space to reserve for a log")
        finally:
            os.close(file)
