"""Keep the audit log of a site or a coordinator: who did what, when and under which rule. Each
entry is signed, and names the hash of the entry before it.

    audit.jsonl          in a site's state folder or the coordinator's home: one entry a line
    audit-000000123.jsonl  an earlier file, named by its first entry; never deleted
    audit.lock           its length is 1 + the number of the first entry in audit.jsonl; 0: no entry

An entry is canonical JSON, so that each content has one spelling:

| seq, time       | its number from 0; UTC, whole seconds                                   |
| event           | one of EVENTS                                                           |
| login, person   | who the system says ran it; whom $FEDTUNE_PERSON names ("" if nobody)   |
| rule            | the policy's key, option or plan under which it was done                |
| facts           | numbers, truth values, and names or digests: never text of a record     |
| prev            | sha256 of the line before it; 64 zeros in the first                     |
| signature       | by the signing key of the site or coordinator, over all of the above    |

Guarantee: `verify` finds an entry that was changed, moved, or taken out from between others. It
finds that the log was taken away, unless audit.lock was taken away too; a log that is begun in its
place begins with an entry of the event "cut". It does not find that the last entries were cut off,
or that somebody with the signing key wrote another log: only a head (number and hash of the newest
entry) that is kept elsewhere shows this. A coordinator keeps a site's head, sealed, with every
update that it counted; anybody else can note the head that `fedtune log` prints."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pwd
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.errors import ConfigError, InfrastructureError, InputError, NotGenuine
from fedtune.core.files import locks, reading, writing
from fedtune.core.wire.keys import SigningKey, canonical, verifies

log = logging.getLogger("fedtune.audit")
FILE, LOCK = "audit.jsonl", "audit.lock"
KEY_FILES = ("site.key", "signing.key")  # a site's, a coordinator's
PERSON = "FEDTUNE_PERSON"
LIMIT = 4 * 2**20  # bytes of a file before the next is begun
LONGEST = 4096  # bytes of an entry
RECENT = 4 * LONGEST  # bytes at the end of the log that are looked at before an entry is added
REPEATS = 16  # newest entries: an act that one of them says already is not entered again
START = "0" * 64
PURPOSE = b"fedtune audit\0"
EVENTS = frozenset({
    "enroll", "join", "admit", "revoke",  # membership
    "review", "sign", "wait", "refuse",  # a site: about a plan, or an answer
    "withdraw", "accept", "restore", "backup", "purge",  # a site
    "release",  # a site: an update; a coordinator: a version or a dossier
    "let-go",  # a site: an answer that waited; it may also be refused
    "freeze", "lift",  # a site: its ledger
    "keep",  # evidence of an incident, in a folder
    "cut",  # a site: a receipt names an entry that this log lacks; or the log was taken away
    "attest", "approve",  # a site: its data sheet; a dossier
    "assess",  # a site: a model, by its own records
    "adopt", "leave", "forget",  # a hospital's home: a membership; another home of its records
    "isolate",  # a site: how its two halves are confined
    "start", "finish", "drop", "export",  # a coordinator
})  # fmt: skip
NOT_NOTED = "%s: cannot be written (%s); if %s is taken away, this may not be noticed"
BACKUP = "look for a backup of the log"
KEYS = {"seq", "time", "event", "login", "person", "rule", "facts", "prev", "signature"}
TEXT = re.compile(r"[\w .:,;@/+=≤≥ε()\"'\[\]-]{0,200}")
EARLIER = re.compile(r"audit-\d{9}\.jsonl")
HASH = re.compile(r"[0-9a-f]{64}")


class NotAuditable(TypeError):
    """A fact was to be logged that no audit log may hold. The message names the fact, never its
    value."""


@dataclass(frozen=True)
class Verified:
    """A log that `verify` found genuine.

    - entries: all its entries, oldest first
    - signer: the public key (hexadecimal) that signed them
    - head: the newest entry, as "SEQ:HASH"
    """

    entries: list[dict[str, Any]]
    signer: str
    head: str


def login() -> str:
    """Return the login name of the user whose process this is, as the operating system reports it.
    No environment variable changes it."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as in a container without a password file
        return f"uid {os.getuid()}"


class AuditLog:
    """The audit log in `folder`, to which entries can be added. The folder is made if it is
    missing. key: the key that signs the entries.

    Several processes may add entries to the same log. Example:

    >>> import tempfile
    >>> folder, key = Path(tempfile.mkdtemp()), SigningKey()
    >>> AuditLog(folder, key).add("purge", rule="--yes", files=3)
    0
    >>> verify(folder, key.public).entries[0]["facts"]
    {'files': 3}
    """

    def __init__(self, folder: Path, key: SigningKey) -> None:
        self.folder, self._key = folder, key

    def add(self, event: str, rule: str = "", *, once: int = 0, **facts: Any) -> int:
        """Write an entry durably and return its number.

        - event: the kind of act, one of EVENTS
        - rule: the rule or the option by which it was done; "" for none
        - once: how many of the newest entries are looked at, for a request that a coordinator may
          repeat. If one of them says the same, nothing is written, and that entry's number is
          returned. 0: always write
        - facts: numbers and short texts about the act, by name; of a path the last part is kept

        A last line that a crash cut short is removed first: what it was to record was not done. If
        the log was taken away, an entry of the event "cut" says so first.
        Errors: NotAuditable for a fact that may not be logged; InfrastructureError if the disk
        refuses: the caller must then not do the act."""
        said = {"event": event, "facts": _check_facts(event, rule, facts), "rule": rule}
        said |= {"login": login(), "person": person()}
        try:
            with _locked(self.folder):
                newest = _read_newest(self.folder)
                begun = read_begun(self.folder)
                if newest and 0 <= begun < newest[0][0]["seq"]:
                    # A crash came between the first line of a new file and the note of it. Any
                    # entry that is there may be noted.
                    begun = newest[0][0]["seq"]
                    _note_begun(self.folder, begun)
                last = newest[-1] if newest else ({"seq": -1}, b"")
                if last[0]["seq"] < begun:
                    # Say so before any other entry: after one entry the log counts as whole again.
                    log.error("%s: was taken away; %s", self.folder / FILE, BACKUP)
                    facts = {"entry": begun}
                    cut = said | {"event": "cut", "facts": facts, "rule": "missing"}
                    last = self._enter(cut, last)
                    newest.append(last)
                    if read_begun(self.folder) > last[0]["seq"]:  # an older copy was put back
                        _note_begun(self.folder, last[0]["seq"])
                for entry, _ in reversed(newest[-once:] if once else []):
                    if said == {name: entry[name] for name in said}:
                        return int(entry["seq"])
                return int(self._enter(said, last)[0]["seq"])
        except OSError as error:
            raise InfrastructureError(
                f"{self.folder / FILE}: cannot be written ({error.strerror})",
                "an audit log that can be written",
                "free disk space or fix the permissions, then run again",
            ) from None

    def _enter(
        self, said: dict[str, Any], last: tuple[dict[str, Any], bytes]
    ) -> tuple[dict[str, Any], bytes]:
        """Write an entry, and return it with its line. said: its fields without number, time, link
        and signature; last: the entry before it, with its line (b"" for none). Errors: OSError;
        NotGenuine; NotAuditable."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        prev = hashlib.sha256(last[1]).hexdigest() if last[1] else START
        entry = said | {"seq": last[0]["seq"] + 1, "time": moment, "prev": prev}
        entry["signature"] = self._key.sign(PURPOSE + canonical(entry))
        line = canonical(entry)
        _append(self.folder, line, entry["seq"])
        return entry, line

    @property
    def head(self) -> str:
        """The newest entry, as "SEQ:HASH"; "" if there is none. Errors: InfrastructureError."""
        try:
            with _locked(self.folder):
                newest = _read_newest(self.folder)[-1:]
        except OSError as error:
            raise InfrastructureError(f"{self.folder / FILE}: {error.strerror}") from None
        return "".join(f"{e['seq']}:{hashlib.sha256(line).hexdigest()}" for e, line in newest)

    def check(self, head: str) -> None:
        """Check that this log has the entry `head`. If the log lacks this entry, its end was cut
        off; this is logged by an entry of the event "cut". No error is raised, since the ledger has
        a check of its own. head: "SEQ:HASH", as a receipt of the coordinator names it; "" if the
        receipt names none, and nothing is checked."""
        if not head:
            return
        with _locked(self.folder):
            held = _holds(self.folder, head)
        if not held:
            seq = int(head.partition(":")[0])
            log.error("%s: entry %d is not the one that was noted", self.folder / FILE, seq)
            self.add("cut", "receipt", once=REPEATS, entry=seq)


def verify(folder: Path, public: str, head: str = "", *, torn: bool = False) -> Verified:
    """Verify all files of a log (form, numbers, chain and signatures), and return its content.

    - folder: the folder of the log
    - public: the key (hexadecimal) that must have signed it
    - head: an entry that was noted earlier, as "SEQ:HASH", which must be in the log; "": none
    - torn: whether to pass over a last line that a crash cut short; what it was to record was not
      done

    Errors: NotGenuine; InputError where there is no log."""
    entries = list[dict[str, Any]]()
    hashes = list[str]()
    prev = START
    try:
        with _locked(folder, shared=True):  # while it is read alone: nothing leaves meanwhile
            contents = [(folder / name, _content(folder / name)) for name in files(folder)]
            begun = read_begun(folder)
    except InfrastructureError as error:  # what is there was handed over
        raise InputError(error.happened, error.expected, error.todo) from None
    if not contents and begun < 0:
        raise InputError(f"{folder}: no audit log yet; it begins with the first act", FILE)
    if torn and contents:
        path, content = contents[-1]
        contents[-1] = path, content[: content.rfind(b"\n") + 1]
        contents = [(path, content) for path, content in contents if content]
    for path, content in contents:
        for where, line in _lines(path, content):
            entry = _read(line, where)
            if entry["seq"] != len(entries) or entry["prev"] != prev:
                raise NotGenuine(
                    f"{where}: does not follow the entry before it",
                    f"entry {len(entries)}",
                    f"an entry was changed, moved or removed: {BACKUP}",
                )
            signed = {key: value for key, value in entry.items() if key != "signature"}
            if not verifies(public, PURPOSE + canonical(signed), entry["signature"]):
                raise NotGenuine(f"{where}: is not signed by the key {public[:16]}…", todo=BACKUP)
            prev = hashlib.sha256(line).hexdigest()
            entries.append(entry)
            hashes.append(prev)
    if len(entries) <= begun:
        raise NotGenuine(f"{folder / FILE}: entry {begun} and later ones are missing", todo=BACKUP)
    _check_head(folder, head, hashes)
    return Verified(entries, public, f"{len(entries) - 1}:{prev}")


def signer_at(folder: Path) -> str:
    """Return the public key (hexadecimal) of the site or the coordinator whose folder this is, from
    its signing key. Errors: ConfigError if there is no key; InfrastructureError."""
    for name in KEY_FILES:
        if (folder / name).exists():
            return SigningKey.at(folder / name).public
    raise ConfigError(
        f"{folder}: no signing key here, so it is not known who should have signed",
        "a site's state folder or a coordinator's home",
        "give the public key with --signer; `fedtune log` shows it where the key is",
    )


def files(folder: Path) -> list[str]:
    """Return the names of the log's files, oldest first; [] if there is no log."""
    if not folder.is_dir():
        return []
    earlier = sorted(path.name for path in folder.iterdir() if EARLIER.fullmatch(path.name))
    return [*earlier, *([FILE] if os.path.lexists(folder / FILE) else [])]


def was_begun(folder: Path) -> bool:
    """Return whether a log was ever begun in `folder`, whether or not it is still there."""
    return bool(files(folder)) or read_begun(folder) >= 0


def _content(path: Path) -> bytes:
    return reading.content(path, "an audit log", kind=NotGenuine)


def read_begun(folder: Path) -> int:
    """Return the number of the first entry of the log's newest file, as audit.lock tells it; -1 if
    it tells none."""
    try:
        return (folder / LOCK).lstat().st_size - 1
    except OSError:
        return -1


def _note_begun(folder: Path, seq: int) -> None:
    """Note in audit.lock that the log's newest file begins with entry `seq`: by the lock's length,
    which takes no space on the disk. Errors: OSError."""
    descriptor = writing.open_own(folder / LOCK, os.O_WRONLY)
    try:
        os.ftruncate(descriptor, seq + 1)
    finally:
        os.close(descriptor)


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (place, line) for each line of `content`. place: "PATH: line N", for an error's text.
    Errors: NotGenuine if the last line is cut short."""
    *lines, rest = content.split(b"\n")
    if rest or not lines:
        raise NotGenuine(
            f"{path}: the last line is cut short",
            "complete lines",
            "if this is after a crash, go on: the next entry removes this line, and what it was to "
            "record was not done",
        )
    for number, line in enumerate(lines, 1):
        yield f"{path}: line {number}", line


def _read(line: bytes, where: str) -> dict[str, Any]:
    """Parse one line of the log to an entry. where: the line's place, for the error's text. Errors:
    NotGenuine if it is no entry in canonical form."""
    try:
        entry = json.loads(line)
        is_typed = set(entry) == KEYS and type(entry["seq"]) is int
        if is_typed and isinstance(entry["signature"], str) and canonical(entry) == line:
            return dict(entry)
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise NotGenuine(f"{where}: is not an entry as fedtune writes it", "an entry", BACKUP)


def _check_head(folder: Path, head: str, hashes: list[str]) -> None:
    """Check that the log has an entry that was noted earlier.

    - folder: the log's, for the error's text
    - head: the entry, as "SEQ:HASH"; "": none was noted
    - hashes: the hash of each entry of the log, oldest first

    Errors: InputError if `head` does not have this form; NotGenuine if the log lacks the entry."""
    if not head:
        return
    number, _, hash_ = head.partition(":")
    if not number.isdecimal() or len(number) > 9 or not HASH.fullmatch(hash_):
        raise InputError(
            f"{head[:80]}: not a head of an audit log", "SEQ:HASH, as `fedtune log` prints it"
        )
    if int(number) >= len(hashes) or hashes[int(number)] != hash_:
        raise NotGenuine(
            f"{folder / FILE}: entry {number} is not the one that was noted",
            "a log that continues from that entry",
            f"it was cut off, or begun anew: {BACKUP}",
        )


def _holds(folder: Path, head: str) -> bool:
    """Return whether the log has the entry `head` ("SEQ:HASH"), without checking the other
    entries."""
    number, _, expected = head.partition(":")
    for name in reversed(files(folder)):
        lines = _content(folder / name).split(b"\n")[:-1]
        first = int(_read(lines[0], f"{folder / name}: line 1")["seq"]) if lines else 0
        if lines and first <= int(number):
            at = int(number) - first
            return at < len(lines) and hashlib.sha256(lines[at]).hexdigest() == expected
    return False


def _check_facts(event: str, rule: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Check that the event is one of EVENTS, and that the rule and each fact are a number or a
    short text of permitted characters. Return the facts, each path replaced by its last part.
    Errors: NotAuditable, with the name of the fact."""
    if event not in EVENTS:
        raise NotAuditable("event")
    named = {k: _name(v) if isinstance(v, Path) else v for k, v in facts.items()}
    for name, value in {"rule": rule, **named}.items():
        known = isinstance(value, int | float) or (isinstance(value, str) and TEXT.fullmatch(value))
        if not known:
            raise NotAuditable(name)
    return named


def _name(path: Path) -> str:
    """Return the last part of a path, with "?" for each character that TEXT does not permit."""
    return "".join(c if TEXT.fullmatch(c) else "?" for c in path.name)[:200]


def person() -> str:
    """Return the person that $FEDTUNE_PERSON names; "" if it names nobody. Errors: InputError."""
    name = os.environ.get(PERSON, "").strip()
    if not TEXT.fullmatch(name):
        raise InputError(
            f"{PERSON}: not a name",
            "at most 200 letters, digits, spaces and these signs: "
            ". : , ; @ / + = ≤ ≥ ( ) \" ' [ ] _ -",
        )
    return name


@contextmanager
def _locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """A context manager that keeps other processes from writing to the log for the length of the
    block. shared: whether the block only reads, so that others may read meanwhile. Errors:
    InfrastructureError; OSError."""
    if shared and not (folder / LOCK).exists():  # a copy: nobody writes to it
        yield
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locks.hold(folder / LOCK, shared=shared):
        yield


def _read_newest(folder: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Return the newest entries that stand within the last RECENT bytes of the log, oldest first,
    each with its line (bytes); [] if there is none. If a crash left an incomplete line after them,
    it is removed from the file.

    Errors: NotGenuine; OSError, also where the file is a link."""
    for name in reversed(files(folder)):
        path = folder / name
        descriptor = reading.descriptor(path, os.O_RDWR | os.O_NOFOLLOW)
        with open(descriptor, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - RECENT))
            tail = file.read()
            whole = tail.rfind(b"\n") + 1
            if not whole and size > LONGEST:
                raise NotGenuine(f"{path}: does not end with an entry", "an entry", BACKUP)
            if whole != len(tail):
                file.truncate(size - len(tail) + whole)
                os.fsync(file.fileno())
        if whole:
            lines = tail[:whole].splitlines()
            lines = lines if len(tail) == size else lines[1:]  # the first may be a part of one
            return [(_read(line, f"{path}: near its end"), line) for line in lines]
    return []


def _append(folder: Path, line: bytes, seq: int) -> None:
    """Append the line of entry `seq` to the newest file of the log. If that file has become too
    long, it is renamed, and a new one is begun. If the new file cannot be noted in audit.lock, a
    warning is logged and no error raised. Errors: OSError; NotGenuine; NotAuditable if the line is
    too long."""
    if len(line) > LONGEST:
        raise NotAuditable("all facts together")
    path = folder / FILE
    if path.exists() and path.stat().st_size > LIMIT:
        where, first = next(_lines(path, _content(path)))
        path.rename(folder / f"audit-{_read(first, where)['seq']:09d}.jsonl")
    made = not path.exists() or path.stat().st_size == 0  # a crash may cut its first line
    descriptor = writing.open_own(path, os.O_WRONLY | os.O_APPEND)
    try:
        content = memoryview(line + b"\n")
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if made:
        writing.sync_folder(folder)
    if made or read_begun(folder) < 0:  # of an earlier release: at least its first entry was there
        # This comes after the entry: in the other order, a crash between the two would leave a log
        # that counts as taken away. The entry stands even if this fails.
        try:
            _note_begun(folder, seq if made else 0)
        except OSError as error:
            log.warning(NOT_NOTED, folder / LOCK, error.strerror, path)
