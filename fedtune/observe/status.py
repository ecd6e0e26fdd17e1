"""Write and read the status file of a run or a site. Each event updates it; `fedtune status` reads
it.

    status.json   the loggable fields (log.cleaned) of the events so far; replaced atomically
    status.lock   locked by the process that writes the status, until it ends

Guarantee: only one process writes a status file. A reader never sees a partial file, and never
takes a killed process for a running one, since the lock is released however the process ends.
| state    | meaning                                                                      |
| waiting  | the process runs, and waits for the other side                               |
| running  | the process runs, and works                                                  |
| done     | the study has ended, with a report                                           |
| stopped  | the process ended before the study; `error`: an error's class, `reason`: why |
| queued   | at a coordinator's home: the study begins when another has ended             |
| gone     | the process was killed: nobody holds the lock, and the state was not final   |
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.errors import InfrastructureError, InputError
from fedtune.core.files import reading, writing
from fedtune.core.files.room import between_orders
from fedtune.core.registry.reasons import HELD, WAITING
from fedtune.observe.log import FIELDS, SCREEN, Record, Role, by, cleaned, logger, now, strict_here

FILE, LOCK = "status.json", "status.lock"
LAST = 12  # number of newest events that the file holds
OF_SITE = 2**14  # the length of a site's status file is a multiple of so many bytes
ENDED = frozenset({"done", "stopped"})
KEPT = ENDED | {"queued"}  # states that remain true after the process has ended
BY = {"stopped by SIGINT": "Ctrl-C", "stopped by SIGTERM": "SIGTERM"}  # reason -> who stopped it
GONE = "its process is no more; start it again (a coordinator: with --resume)"
LINKS = frozenset({"listening", "admitted", "revoked", "connected", "disconnected"})
TOTALS = ("bytes_up", "bytes_down")
# Fields that the status takes over from every event that has them.
CARRIED = (
    "study",
    "plan_digest",
    "private",
    "rounds",
    "address",
    "fingerprint",
    "next",
    "champion",
    "signed",
    "confined",
    "open",
)


class StatusFile:
    """Replaces folder/status.json at each event. An object can be used as `on_event`. `close`
    releases the lock.

    - folder: a run's folder, a coordinator's home, or a site's state folder; it is made at the
      first write if it is missing
    - role: who writes, a coordinator or a site; the status names it
    - strict: whether a field that may not be logged raises NotLoggable, in place of being left out;
      None asks the environment (FEDTUNE_STRICT=1)
    - ledger: the folder of the site's ledger; None if it is `folder`

    Guarantee: a site's status file is replaced only while the site is answering no order (an order
    is any request of the coordinator except one for admission). The file's length is a multiple of
    OF_SITE. The reason is that the file lies on the ledger's disk, and that the courier (the site's
    process that uses the network) influences when events come. With these rules the courier can
    neither take disk space during an order, nor change the free space by small amounts. Events
    during an order are written together with the next event after the order."""

    def __init__(
        self,
        folder: Path,
        *,
        role: Role = "coordinator",
        strict: bool | None = None,
        ledger: Path | None = None,
    ) -> None:
        self._ledger = ledger or folder
        self.folder, self._strict = folder, strict_here() if strict is None else strict
        self._status: Record = {"role": role, "state": "waiting", "pid": os.getpid()}
        self._status |= {"started": now(), "round": 0, "sites": {}, "last": []}
        self._lock: int | None = None
        self._warned = False

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        record = cleaned(event, data, strict=self._strict)
        if event in SCREEN:
            return
        self._status = updated(self._status, {"time": now(), **record})
        self.write()

    def write(self) -> None:
        """Write the status so far, also before the first event."""
        draft = self.folder / f"{FILE}.{os.getpid()}.new"
        text = json.dumps({**self._status, "updated": now()}, allow_nan=False).encode()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._holds():
                return
            if self._status["role"] != "site":
                self._replace(draft, text)
                return
            with between_orders(self._ledger) as is_now:
                if is_now:
                    self._replace(draft, text.ljust(math.ceil(len(text) / OF_SITE) * OF_SITE))
        except (OSError, InfrastructureError) as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            if not self._warned:
                why = error.strerror if isinstance(error, OSError) else error.happened
                logger.warning("%s: %s; no status is kept", self.folder, why)
            self._warned = True

    def _replace(self, draft: Path, text: bytes) -> None:
        with open(draft, "wb", opener=_private) as file:
            file.write(text)
        draft.replace(self.folder / FILE)

    def _holds(self) -> bool:
        """Take the lock if it is free, and return whether this process holds it. If another live
        process holds the lock, that process writes the status."""
        if self._lock is None:
            lock = writing.open_own(self.folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return False
            self._lock = lock
        return True

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def updated(status: Record, record: Record) -> Record:
    """Return the status of a run or a site after one more event. status: the content of the status
    file, which is not changed. record: the event's loggable fields (log.cleaned), with its time."""
    event, sites = record["event"], {name: dict(s) for name, s in status["sites"].items()}
    new: Record = {**status, "sites": sites}
    new |= {key: record[key] for key in CARRIED if key in record}
    new["last"] = [*status["last"], _brief(record)][-LAST:]
    if new.get("plan_digest") != status.get("plan_digest"):  # a site may begin another study
        new["round"] = 0
    if event == "start":
        done = record.get("done", 0)
        new |= {"state": "running", "round": done, "first_round": done + 1}
        for key in ("error", "reason", "seconds"):
            new.pop(key, None)
    elif event == "planned":
        for name, epsilon in record.get("planned", {}).items():
            sites.setdefault(name, {})["planned"] = epsilon
    elif event in LINKS and new["role"] == "coordinator":
        _link(new, record)
    elif event == "site" and "site" in record:
        told = {"status": record.get("status", ""), "reason": record.get("reason", "")}
        sites.setdefault(record["site"], {}).update(told)
    elif event == "round":
        new["state"] = "running"
        _round(new, record)
    elif event in ENDED:
        new["state"] = event
        new |= {key: record[key] for key in ("error", "reason") if key in record}
    elif event in ("joined", "connected", "answered"):
        new["state"] = "running"
        _answer(new, record)
    elif event in ("waiting", "reconnecting"):
        new["state"] = "waiting"
        new.pop("done", None)
        new |= {key: record[key] for key in ("done",) if key in record}
    return new


def _link(new: Record, record: Record) -> None:
    """Enter in a coordinator's status which sites were admitted or revoked, and which are
    connected. new: the status, which is changed. record: an event about the link to one site or
    several."""
    event, names = record["event"], list(record.get("participants", ()))
    for name in [*names, record["site"]] if "site" in record else names:
        site = new["sites"].setdefault(name, {})
        site["connected"] = event == "connected"
        if event == "revoked":
            site["status"] = event


def _answer(new: Record, record: Record) -> None:
    """Enter in a status what an event says about a site's answer to a plan, to a request for a
    round, or to a query. new: the status, which is changed. record: the event's loggable fields."""
    new["round"] = record.get("round", new["round"])
    if record.get("status") == WAITING:
        new["state"] = "waiting"
    if "site" in record:
        name = record["site"]
        site = new["sites"].setdefault(name, {})
        site |= {key: record[key] for key in ("status", "reason") if key in record}
        for key in ("epsilon", "planned", "fallback", "declared"):
            if name in record.get(key, {}):
                site[key] = record[key][name]
    _add_bytes(new, record)


def _round(new: Record, record: Record) -> None:
    for key in ("round", "quality", "participants", "missing"):
        if key in record:
            new[key] = record[key]
    # The first round is left out: it also runs the records through the frozen layers once.
    if "seconds" in record and record.get("round") != new.get("first_round"):
        new["seconds"] = record["seconds"]
    sites = new["sites"]
    for name in record.get("participants", ()):
        sites.setdefault(name, {}).update(status="trained", reason="")
    for name, reason in record.get("missing", {}).items():
        site = sites.setdefault(name, {})
        site.update(reason=reason, missed=site.get("missed", 0) + 1)
        if site.get("status") == "trained":
            site["status"] = "missing"
    for key in ("epsilon", "declared"):
        for name, value in record.get(key, {}).items():
            sites.setdefault(name, {})[key] = value
    _add_bytes(new, record)


def _add_bytes(new: Record, record: Record) -> None:
    """Add the bytes that an event says were sent and received to each site's totals since the
    status began. new: the status, which is changed. record: the event's loggable fields."""
    for key in TOTALS:
        for name, count in record.get(key, {}).items():
            site = new["sites"].setdefault(name, {})
            site[key] = site.get(key, 0) + count


def _brief(record: Record) -> Record:
    first = ("time", "event", "site", "round", "status", "reason", "kind", "error", "seconds")
    keys = (*first, "next", "champion", "promoted")
    return {key: record[key] for key in keys if record.get(key) not in (None, "")}


# ---------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Snapshot:
    """The content of a status file when it was read. alive: whether the process that writes the
    file was running then."""

    folder: Path
    status: Record
    alive: bool

    @property
    def state(self) -> str:
        state = str(self.status.get("state", ""))
        return state if self.alive or state in KEPT else "gone"

    @property
    def over(self) -> bool:
        return self.state in KEPT or self.state == "gone"

    @property
    def words(self) -> str:
        """The state as a text for people. It names who stopped the process, or the event for which
        the process waits."""
        if self.state == "stopped" and self.status.get("reason") in BY:
            return f"stopped ({BY[self.status['reason']]})"
        if self.state == "waiting" and self.status["role"] == "site" and self.status.get("done"):
            return "finished; waiting for another study"
        if not self.over and self.failed:
            return f"{self.state}; the last request failed here ({self.failed})"
        if not self.over and (names := self.unsigned):
            who = "a person here" if self.status["role"] == "site" else f"people at {names}"
            return f"waiting for {who} to sign the plan"
        if not self.over and (names := self.held):
            who = "a person here" if self.status["role"] == "site" else f"people at {names}"
            return f"waiting for {who} to let an answer go"
        return self.state

    @property
    def failed(self) -> str:
        """The class of the error because of which a site could not answer its last request,
        "unknown" if no class is noted; "" if the site answered, and in a coordinator's status."""
        last = (self.status.get("last") or [{}])[-1]
        failed = "failed" in (last.get("event"), last.get("status"))
        return str(last.get("error", "unknown")) if failed and self.status["role"] == "site" else ""

    @property
    def unsigned(self) -> str:
        """The sites where nobody has signed the plan yet, joined by commas."""
        return self._waiting(held=False)

    @property
    def held(self) -> str:
        """The sites where an answer waits until a person releases it, joined by commas."""
        return self._waiting(held=True)

    def _waiting(self, *, held: bool) -> str:
        sites = self.status["sites"].items()
        waiting = {n: str(site.get("reason")) for n, site in sites if site.get("status") == WAITING}
        return ", ".join(sorted(n for n, why in waiting.items() if (HELD in why) == held))

    @property
    def studies(self) -> dict[str, Snapshot]:
        """The studies of a coordinator's home, the oldest first: name -> what the home's status
        file says of the study."""
        rows = self.status.get("studies") or {}
        return {n: Snapshot(self.folder, row, self.alive) for n, row in rows.items()}

    @property
    def seconds_left(self) -> float:
        """The duration in seconds of the remaining rounds, if each takes as long as the last one; 0
        if it is not known, as after the first round."""
        status = self.status
        left = int(status.get("rounds") or 0) - int(status.get("round") or 0)
        running = self.state == "running" and left > 0
        return left * float(status.get("seconds") or 0) if running else 0.0


def reasons(study: Snapshot) -> list[str]:
    """List the reasons why a study of a coordinator's home was stopped. The first is the error,
    unless a person stopped the study; then follows "SITE: reason" for each site that refused or
    failed. Return [] if the study was not stopped."""
    if study.state != "stopped":
        return []
    told = (study.status.get(key) for key in ("error", "reason"))
    sites = sorted(study.status["sites"].items())
    return [
        *(str(why) for why in told if why and why not in BY),
        *(f"{name}: {site['reason']}" for name, site in sites if site.get("reason")),
    ]


def standing(site: Record) -> str:
    """Return a text that says how a site stands in a study: its last answer, whether its data is
    declared public or generated, and whether it is connected. site: the site's entry in a
    status."""
    declared = f"data declared {site['declared']}" if site.get("declared") else ""
    told = ", ".join(filter(None, [str(site.get("status", "")), declared]))
    if site.get("connected") is None:
        return told
    if not site["connected"]:
        return ", ".join(filter(None, [told, "not connected"]))
    return told or "connected"


def folder_of(path: Path) -> Path:
    """Return the folder in which the status file of `path` lies: `path` itself if it is a folder (a
    run or a coordinator's home), or the state folder of the site if it is a site.toml.

    Errors: InputError if `path` is neither; ConfigError if the site.toml cannot be used."""
    if path.is_dir():
        return path
    if path.suffix == ".toml":
        from fedtune.core.config import load_site

        return load_site(path).site.state
    raise InputError(
        f"{path}: not there",
        "a run's folder, a coordinator's home, or a site.toml",
        "check the path",
    )


def read_status(folder: Path) -> Snapshot:
    """Read the status file in `folder`.

    Errors: InputError if no status was ever written, or fedtune did not write it."""
    path, expected = folder / FILE, "a status as fedtune writes it"
    if not os.path.lexists(path):
        raise InputError(
            f"{folder}: no {FILE} there",
            "a folder that a run, a coordinator or a site has begun to work in",
            "check the path, or start the run, the coordinator or the site first",
        )
    todo = "delete this file: the next event writes it anew"
    status = reading.json_in(path, expected, todo)
    try:
        checked = _STATUS(status)
    except (KeyError, TypeError, OverflowError):
        checked = {}
    rows = (checked.get("studies") or {}).values()
    whole = all(row and {"role", "state", "sites"} <= row.keys() for row in rows)
    if not whole or any(checked.get(key) is None for key in ("role", "state", "sites", "last")):
        what = "not the status of a run, a coordinator or a site"
        raise InputError(f"{path}: {what}", expected, todo)
    return Snapshot(folder, checked, held(folder / LOCK))


Rule = Callable[[Any], Any]


def _word(value: Any) -> str:
    """Check that a value from a status file has the form of a fixed word, such as an error's class,
    and return it. So no control characters reach a terminal. Errors: TypeError if it has another
    form."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_ .]{0,64}", value):
        raise TypeError
    return value


def _keys(rules: Mapping[str, Rule]) -> Rule:
    def check(value: Any) -> Record:
        if not isinstance(value, dict):
            raise TypeError
        return {key: entry if entry is None else rules[key](entry) for key, entry in value.items()}

    return check


def _list(rule: Rule) -> Rule:
    def check(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise TypeError
        return [rule(entry) for entry in value]

    return check


_COUNT, _MOMENT = FIELDS["round"], FIELDS["next"]
_WORDS = dict.fromkeys(("role", "state", "error", "event"), _word)
_EVENT = _keys({**FIELDS, **_WORDS, "time": _MOMENT})
_NUMBER = FIELDS["seconds"]
_SITE = _keys(
    {
        **FIELDS,
        **dict.fromkeys(("missed", *TOTALS), _COUNT),
        **dict.fromkeys(("epsilon", "planned", "fallback"), _NUMBER),
        "connected": FIELDS["private"],
        "declared": _word,
    }
)
_ROW = _keys(  # of a study, in the status of a coordinator's home
    {
        **FIELDS,
        **_WORDS,
        **dict.fromkeys(("epsilon", "planned"), _NUMBER),
        "deadline": _MOMENT,
        "quality": by(_word, lambda value: None if value is None else _NUMBER(value)),
        "sites": by(FIELDS["site"], _SITE),
    }
)
# The rule for each key of a status file, as strict as log.cleaned was when the file was written.
_STATUS = _keys(
    {
        **FIELDS,
        **_WORDS,
        **dict.fromkeys(("started", "updated"), _MOMENT),
        **dict.fromkeys(("pid", "first_round"), _COUNT),
        "quality": by(_word, lambda value: None if value is None else _NUMBER(value)),
        "sites": by(FIELDS["site"], _SITE),
        "last": _list(_EVENT),
        "studies": by(FIELDS["study"], _ROW),
    }
)


def held(path: Path) -> bool:
    """Return whether a live process holds the lock file `path`."""
    try:
        file = reading.descriptor(path)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
