"""Open, check and write the ledger, a signed hash chain in SQLite, and the files beside it. These
are its anchor (a signed note of the newest entry), the coordinators' receipts, and updates that may
be sent again.

    ledger.db       entries (seq, kind, body, prev, hash, signature) and the salted member hashes
    ledger.head     signed (seq, hash) of the newest entry, and signed counts of what was charged up
                    to it, written after the entry is on disk; and earlier entries, among them
                    the last that each coordinator was sent, by which a restore knows receipts
    ledger.receipt  the newest heads that coordinators countersigned
    site.key, salt  this site's key (Ed25519) and the salt of the member hashes; 0600
    outbox/         updates that may be sent again

Guarantee: `hash` = sha256(prev ‖ kind ‖ body), so the newest signature covers every entry. An entry
is on disk before `writing` returns; the anchor is written after the entry. If entries were edited,
deleted, reordered, torn, or rolled back behind anchor or receipt, opening raises LedgerError.
| what is found              | what it means, and what follows                                     |
|----------------------------|---------------------------------------------------------------------|
| anchor behind the entries  | a crash between the two writes: repaired                            |
| anchor without the counts  | an older release wrote it: they are added                           |
| entries behind the anchor  | rolled back: LedgerError                                            |
| no ledger, but its traces  | LedgerError, unless its first creation was interrupted              |
| receipts were taken away   | LedgerError                                                         |
| format above FORMAT        | NewerLedger, before anything is written; a restore refuses, too     |
Errors: LedgerError (also for a full disk, a read-only file, a lock that is not given up).
Reference: https://www.sqlite.org/pragma.html#pragma_synchronous (EXTRA: FULL alone can undo a
commit when power fails before the journal's deletion is on disk)."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fedtune.core.errors import InfrastructureError
from fedtune.core.files.writing import replace
from fedtune.core.ledger.files import (
    DATABASE,
    EVERY,
    HEAD,
    KEY,
    NEW,
    RECEIPT,
    RESTORE,
    SALT,
    Costliest,
    Head,
    LedgerError,
    Mark,
    Named,
    NewerLedger,
    NoRoom,
    Paid,
    ReceiptLog,
    Sent,
    choose_charged,
    encode_anchor,
    prepare,
    read_anchor,
    read_named,
    read_receipts,
    salt_at,
    state,
)
from fedtune.core.wire.keys import SigningKey, canonical, verifies

BUSY = 60.0  # seconds to wait for another process
# PRAGMA user_version; raised when an older release could misread an entry. 0: as 1; 2: charges hold
# the rules by which records were chosen, and a charge of unknown ε may be accepted.
FORMAT = 2
FORMATS = 1000  # a larger number is a flipped bit: the entries are verified instead
PRAGMAS = ("synchronous = EXTRA", "trusted_schema = OFF")
WITH_RECEIPTS = 1  # PRAGMA application_id, once a coordinator's receipt was stored beside it
START = "0" * 64  # prev of the first entry
CHARGING = ("reserve", "restore")  # the kinds of entries that charge
SCHEMA = (
    f"PRAGMA user_version = {FORMAT}",
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, body BLOB NOT NULL, "
    "prev TEXT NOT NULL, hash TEXT NOT NULL, signature TEXT NOT NULL)",
    "CREATE TABLE members (hash BLOB NOT NULL, dataset TEXT NOT NULL, "
    "PRIMARY KEY (hash, dataset)) WITHOUT ROWID",
)


class Entry(NamedTuple):
    seq: int
    kind: str
    body: dict[str, Any]
    hash: str


def count_paid(kind: str, body: Mapping[str, Any]) -> Paid:
    """Return what an entry charges. kind, body: the entry's."""
    charges = _charges_in(kind, body)
    noised = sum(charge["steps"] for charge in charges if charge["noise_multiplier"] > 0)
    return Paid(noised, sum(charge["noise_multiplier"] <= 0 for charge in charges))


def find_costliest(kind: str, body: Mapping[str, Any]) -> Costliest:
    """Return bounds on what a step costs that an entry charges. kind, body: the entry's."""
    found = Costliest()
    for charge in _charges_in(kind, body):
        if charge["noise_multiplier"] > 0:
            rate, records = float(charge["sampling_rate"]), charge["records"]
            found = found.plus(Costliest(float(charge["noise_multiplier"]), rate, records))
    return found


def _charges_in(kind: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the charges of an entry. Two kinds have any (CHARGING): "reserve", for a round or for
    one charge of an adopted ledger, and "restore", for all that a restore had to charge. kind,
    body: the entry's."""
    if kind == "restore":
        return list(body["charges"])
    return [body["charge"]] if kind == "reserve" else []


class FixedOrders:
    """The Rényi orders that the charges of entries may have fixed for the site's privacy filter
    (`entries.orders_of`): those of each dataset's first charge, and those of charges of an adopted
    ledger or a restore, which may be older than it. Add the entries oldest first."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._found = dict[float, None]()
        self._datasets = set[str]()
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Take the charges of one more entry into account. Errors: TypeError, KeyError if it is not
        understood."""
        if entry.kind not in CHARGING:
            return
        body, dataset = entry.body, entry.body.get("dataset", EVERY)
        charges = _charges_in(entry.kind, body)
        is_older = dataset == EVERY or any(
            each.get("adopted", bool(body.get("membership"))) for each in charges
        )
        if is_older or dataset not in self._datasets:
            for charge in charges:
                found = [charge["order"]] if "order" in charge else []
                found += charge.get("other_orders", [])
                self._found |= dict.fromkeys(map(float, found))
        self._datasets.add(dataset)

    def listed(self) -> tuple[float, ...]:
        """Return the orders, each once, in the order of their entries."""
        return tuple(self._found)


def list_charged_entries(entry: Entry) -> dict[str, int]:
    """Return the hash of each entry that `entry` charges by itself, as the step log names it -> how
    many steps. Three kinds have any: "reserve" charges one round, under its own hash and, if it is
    of an adopted ledger, under the hash that it had there; "restore" charges lost entries; and
    "end" names those that restores of an adopted ledger had charged."""
    if entry.kind == "reserve":
        steps = int(entry.body["charge"]["steps"])
        return dict.fromkeys({entry.hash, entry.body.get("origin", entry.hash)}, steps)
    return dict(entry.body.get("entered", {})) if entry.kind in ("restore", "end") else {}


def entry_hash(prev: str, kind: str, body: bytes) -> str:
    return hashlib.sha256(prev.encode() + kind.encode() + body).hexdigest()


def signed_entry(hash_: str) -> bytes:
    """Return the bytes over which an entry's signature is made. hash_: the entry's hash."""
    return canonical({"ledger_entry": hash_})


def connect(path: Path, *, must_exist: bool = False) -> sqlite3.Connection:
    """Open a connection to the ledger's database. What is committed on it is durable. The caller
    begins each transaction. must_exist: whether it is an error if there is no such file; else
    SQLite makes an empty one. Errors: LedgerError if the file is missing; NewerLedger if a newer
    release wrote the database."""
    # A home that adopted the ledger took it away; another process may have opened it before.
    if must_exist and not os.path.lexists(path):
        raise LedgerError(
            f"{path}: missing",
            "the ledger where it was",
            f"if no hospital's home adopted it, {RESTORE}",
        )
    where = f"{path.absolute().as_uri()}?mode={'rw' if must_exist else 'rwc'}"
    connection = sqlite3.connect(where, uri=True, timeout=BUSY, isolation_level=None)
    try:
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        ((version,),) = connection.execute("PRAGMA user_version")
        if FORMAT < version < FORMATS:
            raise NewerLedger(
                f"{path}: written by a newer fedtune (format {version})",
                f"format {FORMAT} at most",
                "upgrade fedtune again; nothing was changed",
            )
    except (sqlite3.Error, NewerLedger):
        connection.close()
        raise
    return connection


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """A context manager that turns an error of SQLite or of the operating system in the block into
    a LedgerError that says what to do. folder: the ledger's, for the error's text."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise _build_operational_error(folder, error) from None
    except sqlite3.Error as error:
        raise LedgerError(
            f"{folder / DATABASE}: cannot be read as a ledger ({error})", todo=RESTORE
        ) from None
    except OSError as error:
        raise LedgerError(
            f"{error.filename or folder}: {error.strerror}",
            todo="free disk space or fix the permissions, then run again",
        ) from None
    except LedgerError:
        raise
    except InfrastructureError as error:  # a file of the ledger could not be replaced
        raise LedgerError(*error.args) from None


# A disk quota that is used up, or a full NFS, shows only as a write or a sync that failed.
WITHOUT_ROOM = {
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
}


def _build_operational_error(folder: Path, error: sqlite3.OperationalError) -> LedgerError:
    message, path = str(error), folder / DATABASE
    if "locked" in message:
        return LedgerError(
            f"{path}: another process has been writing for {BUSY:.0f} s",
            todo="wait for it, or find out why it hangs; then run again",
        )
    if any(cause in message for cause in ("full", "readonly", "unable to open", "I/O")):
        no_room = "full" in message or getattr(error, "sqlite_errorcode", 0) in WITHOUT_ROOM
        return (NoRoom if no_room else LedgerError)(
            f"{path}: cannot be written ({message})",
            todo="free disk space or fix the permissions, then run again",
        )
    return LedgerError(f"{path}: cannot be read as a ledger ({message})", todo=RESTORE)


class Transaction:
    """A transaction on the ledger's database, in which one writer appends entries. Other threads
    and processes see its entries only after the block of `Database.writing` has ended."""

    def __init__(
        self, connection: sqlite3.Connection, key: SigningKey | None, head: Head | None
    ) -> None:
        self.sql = connection
        self._key = key
        self.head = head
        self.pending: list[Entry] = []
        self.receipts = ReceiptLog()

    def append(self, kind: str, body: dict[str, Any], seq: int | None = None) -> int:
        """Add an entry and return its sequence number.

        - kind: the entry's kind, one of those that `Account.fold` knows, such as "reserve"
        - body: its fields, to which the time is added
        - seq: its number, where a restore leaves out some numbers; None: the next one"""
        body = {**body, "time": int(time.time())}
        if kind in CHARGING:  # no two charges have one hash, also not those of two branches
            body["nonce"] = secrets.token_hex(8)
        packed = canonical(body)
        prev = self.head.hash if self.head else START
        assert self._key is not None  # None: for reading alone
        number = seq if seq is not None else (self.head.seq + 1 if self.head else 0)
        hash_ = entry_hash(prev, kind, packed)
        row = (number, kind, packed, prev, hash_, self._key.sign(signed_entry(hash_)))
        self.sql.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)
        self.head = Head(number, hash_)
        self.pending.append(Entry(number, kind, body, hash_))
        return number

    def hash_at(self, seq: int) -> str | None:
        rows = list(self.sql.execute("SELECT hash FROM entries WHERE seq = ?", (seq,)))
        return rows[0][0] if rows else None

    def has(self, head: Head) -> bool:
        """Return whether the chain itself has the entry `head`."""
        return self.hash_at(head.seq) == head.hash

    def add_members(self, dataset: str, hashes: Iterable[bytes]) -> None:
        rows = ((hash_, dataset) for hash_ in hashes)
        self.sql.executemany("INSERT OR IGNORE INTO members VALUES (?, ?)", rows)

    def hashes(self, *datasets: str) -> set[bytes]:
        query = "SELECT hash FROM members WHERE dataset = ?"
        return {hash_ for name in datasets for (hash_,) in self.sql.execute(query, (name,))}

    def members(self, dataset: str) -> str:
        """Return the sha256 (hexadecimal) over all member hashes that the dataset ever had."""
        digest = hashlib.sha256()
        query = "SELECT hash FROM members WHERE dataset = ? ORDER BY hash"
        for (hash_,) in self.sql.execute(query, (dataset,)):
            digest.update(hash_)
        return digest.hexdigest()

    def overlap(self, first: str, second: str) -> int:
        query = (
            "SELECT COUNT(*) FROM members a JOIN members b ON b.hash = a.hash AND b.dataset = ? "
            "WHERE a.dataset = ?"
        )
        ((shared,),) = self.sql.execute(query, (second, first))
        return int(shared)


class Database:
    """The ledger's files in `folder`, made on first use. fold: a function that is called once with
    each entry, after the entry was verified."""

    def __init__(self, folder: Path, fold: Callable[[Entry], None]) -> None:
        self.folder = folder
        self.path = folder / DATABASE
        self._fold = fold
        self._mutex = threading.RLock()
        self._head: Head | None = None
        self._paid, self._costliest = Paid(), Costliest()  # of all entries up to `_head`
        self._charging: list[Head] = []  # those of these entries that charge
        self._orders = FixedOrders()
        self.settled: set[Head] = set()  # lost entries that a restore charged for
        with named(folder):
            prepare(folder)
            self.key = SigningKey.at(folder / KEY)
            self.salt = salt_at(folder / SALT)
            with self.writing():
                pass
            (folder / NEW).unlink(missing_ok=True)

    @property
    def head(self) -> Head:
        assert self._head is not None  # the first entry is made when the store is
        return self._head

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """A context manager that opens a transaction; there is one writer at a time. After the
        block, its entries are on disk, and the anchor names the newest. If the block raises an
        exception, none of them is kept."""
        with self._mutex, named(self.folder):
            connection = connect(self.path, must_exist=True)
            try:
                connection.execute("BEGIN IMMEDIATE")
                self._catch_up(connection)
                self.note_receipts(connection)
                transaction = Transaction(connection, self.key, self._head)
                transaction.receipts = self.check_receipts(connection)
                yield transaction
                connection.execute("COMMIT")
                if transaction.pending:
                    # Under the lock again, so that a slower writer cannot set the anchor back.
                    connection.execute("BEGIN IMMEDIATE")
                    self._catch_up(connection)
            finally:
                connection.close()

    def verify(self) -> None:
        """Verify every entry of the ledger from the first on: its hash, its link and its signature.
        Errors: LedgerError."""
        with self._mutex, named(self.folder):
            connection = connect(self.path, must_exist=True)
            try:
                connection.execute("BEGIN IMMEDIATE")
                last = Head(-1, START)
                for entry, signature in chain(connection, self.path, None):
                    last = Head(entry.seq, entry.hash)
                    check_signature(self.path, self.key.public, last, signature)
                if last != self.head:
                    raise _build_damaged_error(self.path, "entries were taken out")
            finally:
                connection.close()

    def _catch_up(self, connection: sqlite3.Connection) -> None:
        """Verify the entries that were written since this object last looked, and pass each to
        `fold`. Then compare the newest entry with the anchor (ledger.head); if the anchor names an
        earlier entry, the anchor is written anew. Errors: LedgerError if an entry is damaged, or if
        the ledger lacks the entry that the anchor names."""
        if not list(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'")):
            self._create(connection)
        ((written,),) = connection.execute("PRAGMA user_version")
        if written < FORMAT:  # from now on an older release must not write to it
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        last: tuple[Head, str] | None = None
        for entry, signature in chain(connection, self.path, self._head):
            head = Head(entry.seq, entry.hash)
            last = head, signature
            if self._head is not None and entry.seq <= self._head.seq:
                continue  # already folded: same hash, as `chain` checked
            if entry.seq == 0:
                check_first(self.path, entry, self.key.public, self.salt)
            if entry.kind == "restore":
                self.settled |= {Head(*pair) for pair in entry.body["settled"]}
            try:
                self._fold(entry)
                paid = self._paid.plus(count_paid(entry.kind, entry.body))
                costliest = self._costliest.plus(find_costliest(entry.kind, entry.body))
                self._orders.add(entry)
            except (TypeError, KeyError) as error:
                raise LedgerError(
                    f"{self.path}: entry {entry.seq} is not understood ({type(error).__name__})",
                    todo="use the version of fedtune that wrote it, or a newer one",
                ) from None
            self._head, self._paid, self._costliest = head, paid, costliest
            if entry.kind in CHARGING:
                self._charging.append(head)
        if last is None:
            raise _build_damaged_error(self.path, "entries were taken out")
        check_signature(self.path, self.key.public, *last)
        self._check_anchor(connection)

    def _create(self, connection: sqlite3.Connection) -> None:
        if not (self.folder / NEW).exists():
            raise _build_damaged_error(self.path, "it is empty")
        for statement in SCHEMA:
            connection.execute(statement)
        first = Transaction(connection, self.key, None)
        first.append("open", first_body(self.key.public, self.salt))
        connection.execute("COMMIT")
        connection.execute("BEGIN IMMEDIATE")

    def _check_anchor(self, connection: sqlite3.Connection) -> None:
        path, head = self.folder / HEAD, self.head
        if path.exists():
            anchor = read_anchor(path, self.key.public)
            if anchor is None:
                raise LedgerError(
                    f"{path}: cut short, edited, or signed by another key", todo=RESTORE
                )
            if anchor == self._mark():
                return
            if not self.names(connection, anchor.head):
                raise LedgerError(
                    f"{self.path}: rolled back: {HEAD} names entry {anchor.head.seq}, which is not "
                    f"in it (newest: {head.seq})",
                    todo=RESTORE,
                )
        elif head.seq > 0 or not (self.folder / NEW).exists():
            raise LedgerError(f"{path}: missing", todo=RESTORE)
        self._write_anchor(read_named(path, self.key.public))

    def _write_anchor(self, named: Named) -> None:
        anchor = encode_anchor(
            self.key, self.statement(), named._replace(orders=self._orders.listed())
        )
        replace(self.folder / HEAD, anchor, private=True)

    def note_sent(self, coordinator: str, membership: str) -> None:
        """Note in the anchor that a coordinator is sent the newest entry's head: if the entry is
        lost, a restore charges for it and then knows the coordinator's receipt. Call this in a
        transaction (`writing`).

        - coordinator: its public key, in hexadecimal
        - membership: the membership of a hospital that sends the head; "" for a site with a ledger
          of its own"""
        named = read_named(self.folder / HEAD, self.key.public)
        after = named.with_sent(Sent(coordinator, membership, *self.head))
        if after != named:
            self._write_anchor(after)

    def statement(self) -> dict[str, Any]:
        """Return the signed statement of the newest entry, and of what was charged up to it."""
        return state(self.key, self._mark())

    def _mark(self) -> Mark:
        return Mark(self.head, self._paid, self._costliest, choose_charged(self._charging))

    def names(self, connection: sqlite3.Connection, head: Head) -> bool:
        """Return whether the entry `head` is accounted for: the ledger has it, or it was lost and a
        restore names it among those that it charged for. A lost entry of which no file had the hash
        is not accounted for: its number alone does not tell it from an entry of another branch."""
        has_it = head.hash == Transaction(connection, None, None).hash_at(head.seq)
        return has_it or head in self.settled

    def accounts_for(self, connection: sqlite3.Connection, mark: Mark) -> bool:
        """Return whether all that was charged up to a mark's entry is in this ledger: the entry is
        accounted for (`names`), or a restore charged for the newest entry up to it that charged."""
        return self.names(connection, mark.head) or self.is_settled(mark)

    def is_settled(self, mark: Mark) -> bool:
        """Return whether a restore charged for the newest entry up to a mark's that charged."""
        return bool(mark.charged) and mark.charged[0] in self.settled

    def list_known(self, connection: sqlite3.Connection) -> set[Head]:
        """List number and hash of each entry that is accounted for (`names`)."""
        entries = connection.execute("SELECT seq, hash FROM entries")
        return {Head(*row) for row in entries} | self.settled

    def note_receipts(self, connection: sqlite3.Connection) -> None:
        """Note in the database, if the file of receipts exists and this is not noted yet, that it
        exists: if the file is then taken away, this is noticed. The note is committed at once,
        since the transaction that reads the receipts fails if one of them names a lost entry.
        connection: in a transaction that has no entry yet."""
        if (self.folder / RECEIPT).exists() and not has_receipts(connection):
            mark_receipts(connection)
            connection.execute("COMMIT")
            connection.execute("BEGIN IMMEDIATE")
            self._catch_up(connection)

    def check_receipts(self, connection: sqlite3.Connection) -> ReceiptLog:
        """Read the receipts that coordinators signed for the newest heads of this ledger, and
        return them. Errors: LedgerError if the ledger lacks an entry that a receipt names, or the
        receipts were taken away."""
        path = self.folder / RECEIPT
        receipts = read_receipts(path, self.key.public)
        if receipts is None:
            raise LedgerError(f"{path}: cut short, edited, or signed by another key", todo=RESTORE)
        if not (receipts.every or path.exists()) and has_receipts(connection):
            raise LedgerError(f"{path}: missing", todo=f"put it back, damaged or not; or {RESTORE}")
        for receipt in receipts.every:
            if not self.accounts_for(connection, receipt.mark):
                raise LedgerError(
                    f"{self.path}: the ledger was rolled back: {receipt.evidence}, which is not in "
                    "it",
                    todo=RESTORE,
                )
        return receipts


def does_account_for(folder: Path, mark: Mark) -> bool | None:
    """Return whether the ledger in `folder` accounts for a mark's entry (`Database.accounts_for`).
    The chain is not verified. None if the database is missing, locked or damaged."""
    path = folder / DATABASE
    try:
        with closing(connect(path, must_exist=True)) as connection:
            if Transaction(connection, None, None).has(mark.head):
                return True
            settled = set[Head]()
            for (body,) in connection.execute("SELECT body FROM entries WHERE kind = 'restore'"):
                settled |= {Head(*pair) for pair in json.loads(body)["settled"]}
            return not settled.isdisjoint({mark.head, *mark.charged[:1]})
    except (InfrastructureError, OSError, sqlite3.Error, ValueError, TypeError, KeyError):
        return None


def has_receipts(connection: sqlite3.Connection) -> bool:
    """Return whether a coordinator's receipt was ever stored beside the database."""
    ((mark,),) = connection.execute("PRAGMA application_id")
    return bool(mark == WITH_RECEIPTS)


def mark_receipts(connection: sqlite3.Connection, mark: bool = True) -> None:
    """Note in the database whether a coordinator's receipt is stored beside it
    (`Database.note_receipts`)."""
    if has_receipts(connection) != mark:
        connection.execute(f"PRAGMA application_id = {WITH_RECEIPTS if mark else 0}")


def first_body(public: str, salt: bytes) -> dict[str, Any]:
    """Return the fields of a ledger's first entry: the site's public key, and a hash of the salt.
    The salt is bound to the ledger since with another one the stored hashes of patients and records
    would match nothing, so that a patient in two datasets would go unnoticed."""
    return {"public": public, "salt": hashlib.sha256(salt).hexdigest()}


def chain(
    connection: sqlite3.Connection, path: Path, after: Head | None
) -> Iterator[tuple[Entry, str]]:
    """Yield each entry of a database with its signature, oldest first. Each entry is checked
    against the one before it; signatures are not verified.

    - path: the path of the database, for the error's text
    - after: the entry with which to begin; it is yielded too, and must still have the same hash.
      None: begin with the first

    Errors: LedgerError at the first entry that was edited, moved or does not follow the one before.
    """
    query = "SELECT seq, kind, body, prev, hash, signature FROM entries WHERE seq >= ? ORDER BY seq"
    last = after
    for seq, kind, packed, prev, hash_, signature in connection.execute(
        query, (after.seq if after else 0,)
    ):
        try:
            body = json.loads(packed)
            valid = entry_hash(prev, kind, packed) == hash_
            if after is not None and last is after and seq == after.seq:
                valid = valid and hash_ == after.hash
            else:
                number = last.seq + 1 if last else 0
                if kind == "restore" and last:
                    number = max(number, body["highest"] + 1)
                valid = valid and (seq, prev) == (number, last.hash if last else START)
        except (ValueError, TypeError, AttributeError, KeyError):
            valid = False
        if not valid:
            raise _build_damaged_error(
                path, f"entry {seq} was edited, moved or follows a deleted one"
            )
        last = Head(seq, hash_)
        yield Entry(seq, kind, body, hash_), signature
    if after is not None and last is after:
        raise _build_damaged_error(path, f"entry {after.seq} was deleted")


def _build_damaged_error(path: Path, detail: str) -> LedgerError:
    return LedgerError(f"{path}: damaged: {detail}", todo=RESTORE)


def check_signature(path: Path, public: str, head: Head, signature: str) -> None:
    """Check that an entry is signed by this site's key.

    - path: the path of the database, for the error's text
    - public: the public half (hexadecimal) of the site's signing key
    - head: number and hash of the entry
    - signature: the signature (hexadecimal) that the database holds for it

    Errors: LedgerError."""
    if not (isinstance(signature, str) and verifies(public, signed_entry(head.hash), signature)):
        raise _build_damaged_error(path, f"entry {head.seq} is not signed by this site's key")


def check_first(path: Path, entry: Entry, public: str, salt: bytes) -> None:
    """Check that the ledger was begun with the site's key and salt, which its first entry names.

    - path: the path of the database, for the error's text
    - entry: the first entry
    - public: the public half (hexadecimal) of the key beside the database
    - salt: the 32 bytes of the file beside the database

    Errors: LedgerError."""
    if entry.kind != "open":
        raise _build_damaged_error(path, "its first entry does not begin a ledger")
    bound = {key: entry.body.get(key) for key in ("public", "salt")}
    for key, name in (("public", KEY), ("salt", SALT)):
        if bound[key] != first_body(public, salt)[key]:
            raise LedgerError(
                f"{path}: made with another {name} than the one beside it",
                todo=f"put the right {name} back, or {RESTORE}",
            )


def check_members(path: Path, reader: Transaction, members: Mapping[str, str]) -> None:
    """Check that the member hashes (of patients and records) that the database stores for each
    dataset are those of the dataset's newest declaration.

    - path: the path of the database, for the error's text
    - reader: a transaction that reads the database
    - members: for each name under which members are stored, their digest in that declaration
      (`Account.members`)

    Errors: LedgerError."""
    for dataset, digest in members.items():
        if reader.members(dataset) != digest:
            raise _build_damaged_error(path, f"the members of dataset {dataset!r} were edited")
