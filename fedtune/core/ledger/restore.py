"""Back up the ledger, and restore it so that lost entries are charged conservatively.

Guarantee: a restored ledger charges at least what was spent, as far as any file named below shows.
1. It continues a base: a chain of entries that verifies, which is that of the backup or that of
   the folder itself. If one of them continues the other, it is the longer one, and of two branches
   that which charged more.
2. Each entry beside the base that the site signed is charged as it is: those of the other one of
   these two chains, and each row that can be read of the old database.
3. Each line of the step log names the ledger's entry that charged the attempt. If neither the base
   nor step 2 has that entry, the steps of the line are charged. A line of an older release names
   none: it is charged if rounds of its kind have fewer steps in these charges.
4. Marks are signed statements of an entry: the anchor (the file that names the newest entry), the
   receipts of coordinators, and what this machine noted outside the folder. A mark says what its
   chain had charged up to the entry, in noised steps; the smallest σ, the largest q (sampling rate)
   and the largest k (rows of a unit in a step) of them; and it names entries of its chain that
   charged. If the base lacks a mark's entry, everything that its chain charged after the newest of
   the named entries that is covered is charged at these bounds, less what steps 2 and 3 charged for
   entries that the mark names. If none of them is covered, everything that the chain ever charged
   is charged.
An entry is covered if the new ledger charges everything that its chain had charged up to it: the
entries of the two chains of steps 1 and 2, and the newest charging entry of each mark, once it was
charged for, here or in an earlier restore. Only hashes decide which chain an entry is of, so
entries of branches (the folder was put back to an earlier copy of itself, and went on) are told
apart however many there are. Nothing is subtracted but charges whose entry's hash the mark names.
If an earlier restore charged for the other chain of step 1, its entries are not charged again; the
rest of them counts, as below. Each charge that a restore enters may have been the first of all: it
has every Rényi order that the chains, an anchor or the step log show (`entries.orders_of`).
| case                                                         | the charge                    |
| there is no anchor                                           | exhausted: charged as σ = 0   |
| a lost charge without noise                                  | exhausted                     |
| a mark of an older release, which does not say what was      | exhausted                     |
| charged or what a step cost                                  |                               |
Why it counts all that was spent: two kinds of entries charge, "reserve" (a round, or a charge of an
adopted ledger) and "restore", and the counts hold the charges of both in full. Steps are counted in
place of rounds, since one charge of an earlier restore holds the steps of many rounds.
Why it charges no more for withdrawals, arrivals, declarations and signatures, which also are
entries: a mark counts none of them, and names none of them, so ε after a restore does not tell how
many were lost.
Restored charges count against every dataset. A receipt is recognised as charged if a restore was
given its entry's hash, or that of the newest entry up to it that charged. The numbers of lost
entries are never used again. No other process of the site may train during a restore.
Withdrawals, refused answers and a freeze that the chain lacks are known to the caller (`Standing`),
or from those rows of the old database that can still be read and that the site signed. They are
entered in the new database before it is put in place, so that a ledger without them can never be
opened, even if the restore is killed. So are declarations that records are public or generated,
with the hashes of these records, as far as both can be read. A restore either continues the
folder's own whole chain and charges nothing, or entries may be lost. Then each plan that had begun
is at its end, a charged round may have left the site, and until a person accepts it no private
record is taken for one that was never declared. If the salt was lost, no withdrawal is recognised
any more, and the new ledger is frozen, whether or not anybody withdrew. A freeze is in the audit
log before the new database is in place. The old database is locked during the restore.
Errors: LedgerError where the backup is not one of this site, or the site's key is lost; NewerLedger
where a newer release wrote the ledger: it is intact, and this release cannot read it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from fedtune.core.dp.steplog import Attempt, StepLog
from fedtune.core.errors import InfrastructureError, NotGenuine
from fedtune.core.files.writing import replace, sync_folder
from fedtune.core.ledger.account import NOT_PRIVATE
from fedtune.core.ledger.audit_log import AuditLog, login
from fedtune.core.ledger.chain import (
    CHARGING,
    SCHEMA,
    Entry,
    FixedOrders,
    Transaction,
    chain,
    check_first,
    check_members,
    check_signature,
    connect,
    count_paid,
    entry_hash,
    find_costliest,
    first_body,
    has_receipts,
    list_charged_entries,
    mark_receipts,
    named,
    signed_entry,
)
from fedtune.core.ledger.entries import (
    EVERY,
    LOST,
    RULES,
    Charge,
    Freeze,
    Slot,
    Standing,
    slot_fields,
)
from fedtune.core.ledger.files import (
    DATABASE,
    HEAD,
    KEY,
    NEW,
    RECEIPT,
    SALT,
    STEPS,
    Costliest,
    Head,
    LedgerError,
    Mark,
    Named,
    NewerLedger,
    Paid,
    Receipt,
    ReceiptLog,
    choose_charged,
    encode_anchor,
    read_anchor,
    read_named,
    read_noted,
    read_receipts,
    readable_receipts,
    state,
)
from fedtune.core.wire.keys import SigningKey, verifies

SALT_LOST = "restored without a salt that is known to be its own"  # begins why it is frozen
MOST_PROBED = 1_000_000  # numbers of entries between damaged pages that are looked up one by one
EXHAUSTED = Charge(LOST, "lost", 0, 0.0, 1.0, 1, 1, 0.0, "any", "any")


@dataclass(frozen=True)
class _Base:
    """A chain of entries that verifies, with which the restored ledger begins.

    - path: its database; None if no chain was found, so that a new one is begun
    - salt: the salt by which the new database hashes members
    - entries: the chain's entries, oldest first
    - is_salt_lost: True if `salt` is not, or may not be, the one by which the old ledger hashed. A
      unit then has another hash than before
    - beside: the other one of the backup's chain and the folder's, if this one lacks its newest
      entry: the folder was put back to an earlier copy of itself, and went on. None: there is none
    - rows_beside: the rows of the old databases that the site signed and that neither chain has"""

    path: Path | None
    salt: bytes
    entries: list[Entry] = field(default_factory=list)
    is_salt_lost: bool = False
    beside: _Base | None = None
    rows_beside: list[Entry] = field(default_factory=list)

    @property
    def head(self) -> Head:
        return Head(self.entries[-1].seq, self.entries[-1].hash)

    @property
    def seq(self) -> int:
        return self.entries[-1].seq if self.entries else 0

    @property
    def charges(self) -> list[Charge]:
        return _charges_of(self.entries)

    @property
    def entries_beside(self) -> list[Entry]:
        """The entries beside this chain that it lacks, oldest first."""
        known = {entry.hash for entry in self.entries}
        beside = self.beside.entries if self.beside else []
        return [*(entry for entry in beside if entry.hash not in known), *self.rows_beside]

    @property
    def charges_beside(self) -> list[Charge]:
        """The charges beside this chain that no restore in it has charged for."""
        if self.beside and self.holds(self.beside.head):  # it charged all that led to this entry
            return _charges_of(self.rows_beside)
        return _charges_of(self.entries_beside)

    @property
    def heads_beside(self) -> list[Head]:
        """The heads for which the chain beside this one accounts. A receipt may name any of them.
        Rows beside both chains account for themselves alone: one before them may be lost."""
        entries = self.beside.entries if self.beside else []
        heads = [Head(entry.seq, entry.hash) for entry in entries]
        for entry in entries:
            if entry.kind == "restore":
                heads += [Head(*pair) for pair in entry.body["settled"]]
        return heads

    @property
    def covered(self) -> dict[Head, Paid]:
        """Each charging entry of which it is known that everything its chain had charged up to it
        is charged here or beside it -> how much that was."""
        found = dict[Head, Paid]()
        for entries in (self.entries, self.beside.entries if self.beside else []):
            total = Paid()
            for entry in entries:
                total = total.plus(count_paid(entry.kind, entry.body))
                if entry.kind in CHARGING:
                    found[Head(entry.seq, entry.hash)] = total
                if entry.kind == "restore":
                    for seq, hash_, steps, bare in entry.body.get("covered", ()):
                        found[Head(seq, hash_)] = Paid(steps, bare)
        return found

    @property
    def costliest(self) -> Costliest:
        """Bounds on what a step costs that the chain charged with noise."""
        found = Costliest()
        for entry in self.entries:
            found = found.plus(find_costliest(entry.kind, entry.body))
        return found

    @property
    def charging(self) -> list[Head]:
        """The entries that charge, oldest first."""
        return [Head(entry.seq, entry.hash) for entry in self.entries if entry.kind in CHARGING]

    @property
    def paid(self) -> Paid:
        """What the chain's entries charge."""
        total = Paid()
        for entry in self.entries:
            total = total.plus(count_paid(entry.kind, entry.body))
        return total

    @property
    def amount(self) -> tuple[int, int, int]:
        """How much the chain charged, to compare two branches: charges without noise, noised steps,
        and entries that charge."""
        return self.paid.bare, self.paid.steps, len(self.charging)

    @property
    def withdrawn(self) -> set[str]:
        return {entry.body["unit"] for entry in self.entries if entry.kind == "withdraw"}

    @property
    def refused(self) -> list[dict[str, Any]]:
        """The answers that a person refused for good: a list of their slots, each a dict with the
        keys study, round and adapter."""
        slots = [entry.body for entry in self.entries if entry.kind == "refuse"]
        return [{name: slot[name] for name in ("study", "round", "adapter")} for slot in slots]

    @property
    def is_frozen(self) -> bool:
        acts = [entry.kind for entry in self.entries if entry.kind in ("freeze", "lift")]
        return acts[-1:] == ["freeze"]

    def has(self, head: Head) -> bool:
        """Return whether an entry is in this chain itself."""
        return any((entry.seq, entry.hash) == head for entry in self.entries)

    def holds(self, head: Head) -> bool:
        """Return whether this chain holds an entry, or an earlier restore in it names the entry
        among those that it charged for."""
        restores = [entry.body for entry in self.entries if entry.kind == "restore"]
        return self.has(head) or any([*head] in body["settled"] for body in restores)


def _charges_of(entries: list[Entry]) -> list[Charge]:
    charges = [Charge.read(e.body["charge"]) for e in entries if e.kind == "reserve"]
    for entry in entries:
        if entry.kind == "restore":
            charges += [Charge.read(charge) for charge in entry.body["charges"]]
    return charges


def _list_entered(entries: list[Entry]) -> dict[str, int]:
    """Return the hash of each entry that is charged by itself in `entries` -> how many steps are
    charged for it (`list_charged_entries`)."""
    found = dict[str, int]()
    for entry in entries:
        found |= list_charged_entries(entry)
    return found


def backup(folder: Path, to: Path, key: bool) -> None:
    """Back up a ledger: copy its database and salt into a new folder, all readable by this user
    only (mode 0600).

    - folder: the ledger's folder
    - to: the new folder
    - key: whether to copy the private key as well

    Errors: LedgerError, also if `to` holds a ledger."""
    with named(to):
        to.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (to / DATABASE).exists():
            raise LedgerError(f"{to / DATABASE}: already there", todo="name a new folder")
        _copy_database(folder / DATABASE, to / DATABASE)
        replace(to / SALT, (folder / SALT).read_bytes(), private=True)
        if key:
            replace(to / KEY, (folder / KEY).read_bytes(), private=True)


def copy_entries(folder: Path, to: Path) -> None:
    """Copy the entries alone to the new database `to` (mode 0600), without the salt and the hashes
    of the datasets' members. Errors: LedgerError. If the ledger is damaged, `to` then has the
    entries before the damage."""
    with named(to.parent):
        to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with closing(connect(folder / DATABASE)) as source, closing(connect(to)) as target:
            for statement in SCHEMA:
                target.execute(statement)
            target.execute("BEGIN")
            try:
                _copy_rows(source, target)
            finally:
                if target.in_transaction:  # it is not, where the disk is full
                    target.execute("COMMIT")


def _copy_rows(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Copy the entries of `source` to `target` one by one. If a page of `source` is damaged, an
    error ends the copy, and the entries before that page are in `target`."""
    for row in source.execute("SELECT seq, kind, body, prev, hash, signature FROM entries"):
        target.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)


def restore(
    folder: Path,
    from_: Path | None,
    standing: Callable[[str], Standing] | None = None,
    noted: Any = None,
) -> None:
    """Restore a ledger: install the longest chain that verifies, and charge lost entries at no less
    than they cost (see the top of this module).

    - folder: the ledger's folder
    - from_: the folder of the backup; None: only the files that are left are used
    - standing: called with the site's public key; returns the decisions of people that the ledger
      must hold, which are entered again if their entries were lost. None: none are entered
    - noted: what this machine noted of the newest entry outside the folder, which counts as a
      receipt; None: nothing

    Errors: LedgerError, NewerLedger."""
    with named(folder):
        key = _key(folder, from_)
        with _closed(folder / DATABASE):
            stands = standing(key.public) if standing else Standing({}, None)
            _restore(folder, from_, key, stands, read_noted(noted, key.public))


def _restore(
    folder: Path, from_: Path | None, key: SigningKey, stands: Standing, noted: Receipt | None
) -> None:
    """Write the restored database to a draft, and put it in place (`_install`).

    - folder: the ledger's folder; no other process may write to its old database
    - from_: the folder of the backup; None: there is none
    - key: the site's signing key, which signs the new entries
    - stands: the withdrawals, refusals and freeze that people decided, read from files beside the
      ledger. Those that the chain lacks are entered again, and so are those in rows of the old
      database
    - noted: the head that this machine noted outside the folder; None if there is none

    Errors: LedgerError, NewerLedger, OSError, sqlite3.Error."""
    base = _base(folder, from_, key.public)
    receipts = read_receipts(folder / RECEIPT, key.public)
    log = receipts or readable_receipts(folder / RECEIPT, key.public)
    anchor = read_anchor(folder / HEAD, key.public) if (folder / HEAD).exists() else None
    named = read_named(folder / HEAD, key.public) if anchor else Named()
    marks = [receipt.mark for receipt in log.every]
    marks += [noted.mark] if noted else []
    marks += [anchor] if anchor else []
    marks += _marks_beside(from_, key.public) if from_ else []
    highest = max([base.seq, *(mark.head.seq for mark in marks)])
    rows = _readable_rows(folder / DATABASE, highest)
    sources = [folder / DATABASE]
    if base.beside and base.beside.path and base.beside.path not in sources:
        rows = sorted([*rows, *_readable_rows(base.beside.path)], key=itemgetter(0))
        sources.append(base.beside.path)
    base = dataclasses.replace(base, rows_beside=_rows_beside(base, rows, key.public))
    stands = _add_readable(stands, rows, key.public, base)
    entry_body = _restore_body(
        folder=folder,
        logs=[place / STEPS for place in (folder, from_) if place],
        base=base,
        marks=marks,
        sent=[each.head for each in named.sent],
        anchor=anchor,
        receipts=receipts,
        rows=rows,
        public=key.public,
        orders=(*named.orders, *_orders_beside(from_, key.public)),
    )
    draft = folder / "ledger.restoring"
    draft.unlink(missing_ok=True)
    if base.path is not None:
        _copy_database(base.path, draft)
    with closing(connect(draft)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        mark_receipts(connection, receipts is not None and (folder / RECEIPT).exists())
        last = base.entries[-1] if base.entries else None
        writer = Transaction(connection, key, Head(last.seq, last.hash) if last else None)
        if last is None:
            for statement in SCHEMA:
                connection.execute(statement)
            writer.append("open", first_body(key.public, base.salt))
        writer.append("restore", entry_body, seq=entry_body["highest"] + 1)
        for unit in sorted(set(stands.withdrawn) - base.withdrawn):
            of_salt = {"old_salt": True} if base.is_salt_lost else {}
            writer.append("withdraw", {"unit": unit, "since": stands.withdrawn[unit], **of_salt})
        for slot in sorted(stands.refused):
            if (fields := slot_fields(slot)) not in base.refused:
                writer.append("refuse", {**fields, "by": login()})
        _enter_declarations(writer, sources, rows, key.public, base)
        is_frozen = base.is_frozen or stands.frozen is not None
        if base.is_salt_lost:  # whoever withdrew: a coordinator sees that a site is frozen
            is_frozen, why = True, _say_salt_lost(len(stands.withdrawn))
            if stands.frozen:
                why += f"; {stands.frozen.why}"
            writer.append("freeze", {"by": login(), "why": why})
        elif stands.frozen and not base.is_frozen:
            writer.append("freeze", {"by": stands.frozen.who, "why": stands.frozen.why})
        connection.execute("COMMIT")
    assert writer.head is not None
    if is_frozen:
        with suppress(NotGenuine, InfrastructureError):  # of a damaged log, which counts as one too
            AuditLog(folder, key).add("freeze", "--restore", once=1)
    paid, costliest = base.paid, base.costliest
    charging = base.charging
    for entry in writer.pending:
        paid = paid.plus(count_paid(entry.kind, entry.body))
        costliest = costliest.plus(find_costliest(entry.kind, entry.body))
        charging += [Head(entry.seq, entry.hash)] if entry.kind in CHARGING else []
    newest = Mark(writer.head, paid, costliest, choose_charged(charging))
    named = named._replace(orders=FixedOrders([*base.entries, *writer.pending]).listed())
    new_anchor = encode_anchor(key, state(key, newest), named)
    _install(folder, draft, base.salt, new_anchor, receipts)


def _marks_beside(from_: Path, public: str) -> list[Mark]:
    """Return what the anchor and the receipts in the folder of a backup state. A copy of a state
    folder has them, and they may name entries that its database lacks. public: the public half
    (hexadecimal) of the site's key."""
    anchor = read_anchor(from_ / HEAD, public) if (from_ / HEAD).exists() else None
    log = readable_receipts(from_ / RECEIPT, public)
    return [receipt.mark for receipt in log.every] + ([anchor] if anchor else [])


def _orders_beside(from_: Path | None, public: str) -> tuple[float, ...]:
    """Return the Rényi orders that the anchor in the folder of a backup states; none if there is no
    such folder or anchor. public: the public half (hexadecimal) of the site's key."""
    return read_named(from_ / HEAD, public).orders if from_ else ()


def _say_salt_lost(withdrawn: int) -> str:
    return (
        f"{SALT_LOST}: {withdrawn} who withdrew are known by hashes under the old one alone, so "
        "that they may not be left out until `fedtune withdraw` is given their keys again"
    )


def _add_readable(
    stands: Standing, rows: list[tuple[Any, ...]], public: str, base: _Base
) -> Standing:
    """Return `stands` with the decisions added that rows of the old database hold. A row counts by
    itself if the site signed it, whether or not the rows around it can be read. If the lift of a
    freeze cannot be read, the freeze counts.

    - stands: the decisions that are known from other files
    - rows: the rows of the old database that can be read, as `_readable_rows` returns them
    - public: the public half (hexadecimal) of the site's key
    - base: the chain that is continued; its own entries are left out"""
    known = {entry.hash for entry in base.entries}
    withdrawn, refused, frozen = dict[str, int](), set[Slot](), None
    for row in rows:
        with suppress(ValueError, TypeError, AttributeError, KeyError):
            kind, hash_ = row[1], row[4]
            if hash_ in known or (body := _signed_body(row, public)) is None:
                continue
            if kind == "withdraw":
                withdrawn[body["unit"]] = int(body.get("since", body["time"]))
            elif kind == "refuse":
                refused.add((body["study"], body["round"], body["adapter"]))
            elif kind in ("freeze", "lift"):
                why = f"restored: {body['why']}" if body.get("why") else "restored"
                frozen = Freeze(body["by"], why, body["time"]) if kind == "freeze" else None
    return Standing(
        withdrawn | dict(stands.withdrawn), stands.frozen or frozen, refused | {*stands.refused}
    )


def _enter_declarations(
    writer: Transaction,
    sources: list[Path],
    rows: list[tuple[Any, ...]],
    public: str,
    base: _Base,
) -> None:
    """Enter again that datasets were declared public or generated, as far as rows show it that the
    site signed, with the hashes of their records that can still be read.

    - writer: a transaction on the restored database
    - sources: the databases from which hashes are read
    - rows: the rows of these databases that can be read, as `_readable_rows` returns them
    - public: the public half (hexadecimal) of the site's key
    - base: the chain that is continued; its own entries are left out"""
    known, found = {entry.hash for entry in base.entries}, dict[str, str]()
    for row in rows:
        with suppress(TypeError, KeyError):
            if row[1] == "declaration" and row[4] not in known:
                body = _signed_body(row, public) or {}
                found[body["dataset"]] = body["what"]
    for dataset, what in found.items():
        name = NOT_PRIVATE + dataset
        for source in sources:
            writer.add_members(name, _readable_members(source, name))
        members = writer.members(name)
        writer.append("declaration", {"dataset": dataset, "what": what, "members": members})


def _readable_members(path: Path, name: str) -> set[bytes]:
    """Return the hashes that can be read of those stored under a name in the database `path`."""
    hashes = set[bytes]()
    if path.exists():
        with suppress(sqlite3.Error), closing(connect(path)) as connection:
            query = "SELECT hash FROM members WHERE dataset = ?"
            for (hash_,) in connection.execute(query, (name,)):
                hashes |= {hash_} if isinstance(hash_, bytes) else set()
    return hashes


def _signed_body(row: tuple[Any, ...], public: str) -> dict[str, Any] | None:
    """Return the body of an entry in a row (`_readable_rows`); None if the site did not sign it.
    public: the public half (hexadecimal) of the site's key."""
    _, kind, packed, prev, hash_, signature = row
    with suppress(ValueError, TypeError, AttributeError):
        if entry_hash(prev, kind, packed) != hash_:
            return None
        if not verifies(public, signed_entry(hash_), signature):
            return None
        return dict(json.loads(packed))
    return None


def _readable_rows(path: Path, highest: int = 0) -> list[tuple[Any, ...]]:
    """Return the rows of a damaged ledger's database `path` that can still be read, oldest first.
    Those before the first damaged page and after the last one are read in turn, and those between
    the two one by one, by their numbers. Each is (seq, kind, body, prev, hash, signature).

    highest: the highest number that an entry is known to have had, from other files. It bounds the
    search where the last page is damaged."""
    rows = dict[int, tuple[Any, ...]]()
    query = "SELECT seq, kind, body, prev, hash, signature FROM entries"
    ends = list[int]()  # the last row before the first damaged page, the first one after the last
    for order in ("ASC", "DESC") if path.exists() else ():
        seq = 0 if order == "ASC" else highest + 1
        with suppress(sqlite3.Error), closing(connect(path)) as connection:
            for row in connection.execute(f"{query} ORDER BY seq {order}"):
                rows[seq := row[0]] = row
        ends.append(seq)
    if ends and ends[0] + 1 < ends[1]:
        # A row that somebody put there may have any number, so the search has an end of its own.
        between = range(ends[0] + 1, min(ends[1], ends[0] + MOST_PROBED))
        with suppress(sqlite3.Error), closing(connect(path)) as connection:
            for seq in between:
                with suppress(sqlite3.Error):  # it lies in a damaged page
                    found = connection.execute(f"{query} WHERE seq = ?", (seq,)).fetchall()
                    rows.update((row[0], row) for row in found)
    return [rows[seq] for seq in sorted(rows)]


@contextmanager
def _closed(path: Path) -> Iterator[None]:
    """A context manager: for the length of the block, lock the old database so that no other
    process writes to it. A database that cannot be opened is not locked. A process that waits for
    the lock is refused afterwards, since the anchor (the file with the ledger's newest entry) then
    belongs to the new database. Errors: sqlite3.Error if another process keeps the database
    locked."""
    with ExitStack() as opened:
        try:
            if path.exists():
                connection = opened.enter_context(closing(connect(path)))
                connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise
        yield


def _install(
    folder: Path, draft: Path, salt: bytes, anchor: bytes, receipts: ReceiptLog | None
) -> None:
    """Put the new files in place of the old ones, which are kept under another name.

    - folder: the ledger's folder
    - draft: the new database, a file in `folder`
    - salt: the salt by which the new database hashes members; the file is replaced if it differs
    - anchor: the content of the new anchor, the file that names the newest entry
    - receipts: the receipts in `folder`; None if they cannot be read, so that the file is set aside

    A restore that is killed at any point and begun again charges no less: database and anchor keep
    their places until their replacements are on disk, and the step log is not touched. If it is
    killed after the database was replaced and before the anchor was, the old anchor may name an
    entry that the new database lacks. The new database has charged that entry as lost, and the next
    restore recognises it as charged."""
    aside = f".lost-{time.time_ns()}"
    for name in (DATABASE, HEAD):
        if (folder / name).exists():
            os.link(folder / name, folder / f"{name}{aside}")
    journal = f"{DATABASE}-journal"  # it would be played back into the new database
    if (folder / journal).exists():
        os.replace(folder / journal, folder / f"{journal}{aside}")
    sync_folder(folder)
    os.replace(draft, folder / DATABASE)
    sync_folder(folder)
    # Until the salt is replaced, the ledger cannot be opened, and another restore still finds that
    # the salt was another: who withdrew since may be known by hashes under that one alone.
    if not (folder / SALT).exists() or (folder / SALT).read_bytes() != salt:
        replace(folder / SALT, salt, private=True)
    replace(folder / HEAD, anchor, private=True)
    # While receipts that cannot be read are there, the ledger cannot be opened. What they show is
    # charged for by now.
    if receipts is None and (folder / RECEIPT).exists():
        os.replace(folder / RECEIPT, folder / f"{RECEIPT}{aside}")
    (folder / NEW).unlink(missing_ok=True)


def _copy_database(source: Path, to: Path) -> None:
    os.close(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with closing(connect(source)) as source_db, closing(connect(to)) as target_db:
        source_db.backup(target_db)


def _key(folder: Path, from_: Path | None) -> SigningKey:
    if not (folder / KEY).exists() and from_ is not None and (from_ / KEY).exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace(folder / KEY, (from_ / KEY).read_bytes(), private=True)
    if not (folder / KEY).exists():
        raise LedgerError(
            f"{folder / KEY}: the site's key is lost; no entry can be signed in its place",
            todo="restore from a backup that was made with the key",
        )
    return SigningKey.at(folder / KEY)


def _base(folder: Path, from_: Path | None, public: str) -> _Base:
    local = _verify_ledger(folder, public)
    if from_ is None:
        return local or _Base(None, *_salt_to_begin_with(folder, public))
    backup = _verify_ledger(from_, public)
    if backup is None:
        raise LedgerError(
            f"{from_}: not a whole backup of this site's ledger",
            expected=f"{DATABASE} and {SALT}, signed by {KEY}",
            todo="name another backup, or none to restore from the files that are left",
        )
    # A backup whose newest entry the folder has is not taken. Of two branches, what they charged
    # decides, and never their numbers of entries: how many withdrew on each must not decide to
    # which datasets the charges of the other count. A branch that an earlier restore charged for is
    # still read beside it: that restore did not know who had withdrawn there.
    if local is not None and local.has(backup.head):
        return local
    if local is not None and _is_base(local, backup):
        is_lost = backup.salt != local.salt
        return dataclasses.replace(local, is_salt_lost=is_lost, beside=backup)
    beside = None if local is None or backup.has(local.head) else local
    # Who withdrew since a salt was made anew is known by hashes under that one alone.
    salt = (folder / SALT).read_bytes() if (folder / SALT).exists() else b""
    is_another = len(salt) == 32 and salt != backup.salt
    is_lost = is_another or _names_salt(folder, public, backup.salt) is False
    return dataclasses.replace(backup, is_salt_lost=is_lost, beside=beside)


def _is_base(local: _Base, backup: _Base) -> bool:
    """Return whether the chain of the folder is continued, and not that of the backup, whose newest
    entry it lacks."""
    if backup.holds(local.head):
        return False
    return local.holds(backup.head) or local.amount >= backup.amount


def _rows_beside(base: _Base, rows: list[tuple[Any, ...]], public: str) -> list[Entry]:
    """Return the rows that the site signed and that neither the base nor the chain beside it has,
    oldest first. rows, public: as for `_restore_body`"""
    known = {entry.hash for chain_ in (base, base.beside) if chain_ for entry in chain_.entries}
    found = dict[str, Entry]()
    for row in rows:
        seq, kind, *_, hash_, _ = row
        if hash_ not in known and (body := _signed_body(row, public)) is not None:
            found.setdefault(hash_, Entry(seq, kind, body, hash_))
    return list(found.values())


def _salt_to_begin_with(folder: Path, public: str) -> tuple[bytes, list[Entry], bool]:
    """Choose the salt for a chain that is begun anew. Return the salt, the chain's entries (an
    empty list), and whether the salt of the old ledger is lost.

    The salt is that of the folder's salt file, or a random one if the file is missing or has a
    wrong length. The file may be another site's, or be left by a restore that was killed. So its
    salt counts as the old ledger's only if the first entry of that ledger names it, and the site's
    key (its public half is `public`) signed this entry."""
    salt = (folder / SALT).read_bytes() if (folder / SALT).exists() else b""
    is_lost = _names_salt(folder, public, salt) is not True
    return (salt if len(salt) == 32 else os.urandom(32)), [], is_lost


def _names_salt(folder: Path, public: str, salt: bytes) -> bool | None:
    """Return whether the first entry of the ledger in `folder` holds the hash of this salt; None if
    there is no first entry that the site's key (its public half is `public`) signed."""
    path = folder / DATABASE
    if not path.exists():
        return None
    try:
        with named(folder), closing(connect(path)) as connection:
            entry, signature = next(chain(connection, path, None))
            check_signature(path, public, Head(entry.seq, entry.hash), signature)
    except (LedgerError, StopIteration):
        return None
    return bool(entry.body.get("salt") == first_body(public, salt)["salt"])


def _verify_ledger(folder: Path, public: str) -> _Base | None:
    """Return the ledger in `folder` if every entry, signature and member digest in it verifies;
    None if one does not, or if database or salt is missing. public: the public half (hexadecimal)
    of the site's key. Errors: NewerLedger."""
    path, salt = folder / DATABASE, folder / SALT
    if not (path.exists() and salt.exists()):
        return None
    entries, members = [], {}
    try:
        with named(folder), closing(connect(path)) as connection:
            for entry, signature in chain(connection, path, None):
                check_signature(path, public, Head(entry.seq, entry.hash), signature)
                entries.append(entry)
                if entry.kind == "declare":
                    members[entry.body["dataset"]] = entry.body["members"]
                elif entry.kind == "declaration" and "members" in entry.body:
                    members[NOT_PRIVATE + entry.body["dataset"]] = entry.body["members"]
            check_members(path, Transaction(connection, None, None), members)
        check_first(path, entries[0], public, salt.read_bytes())
    except NewerLedger:
        raise
    except (LedgerError, IndexError):
        return None
    return _Base(path, salt.read_bytes(), entries)


def _restore_body(
    *,
    folder: Path,
    logs: list[Path],
    base: _Base,
    marks: list[Mark],
    sent: list[Head],
    anchor: Mark | None,
    receipts: ReceiptLog | None,
    rows: list[tuple[Any, ...]],
    public: str,
    orders: tuple[float, ...],
) -> dict[str, Any]:
    """Return the body of the restore entry: which entries are lost, and the charges for them.

    - folder: the ledger's folder
    - logs: the step logs: what is left of the folder's own, and the one beside the backup
    - base: the chain that is continued
    - marks: what anchors, receipts and this machine's note state
    - sent: the earlier entries that the anchor names. They are of its own chain, so what is charged
      for the anchor is charged for them
    - anchor: what the anchor holds; None if it is missing or cannot be read
    - receipts: the receipts in `folder`; None if they cannot be read
    - rows: the rows of the old database that can be read, as `_readable_rows` returns them
    - public: the public half (hexadecimal) of the site's key
    - orders: the Rényi orders that charges may have fixed, as anchors state them

    In the result, `lost_steps` is the most noised steps that the base may lack, and `charges` are
    the charges for them, against every dataset. The numbers after `base` and up to `highest` are
    never used again. `columns` are the columns of patients that each dataset had, as far as rows of
    the old database show it. `plans` are the plans that such a row or the step log names and the
    base does not, each with its membership: they had begun, too. `settled` lists the [number,
    hash] of each entry that marks or the backup name and the base lacks: these alone count as
    charged from now on. `covered` lists the newest charging entry of each mark, with what its chain
    had charged up to it, and `entered` the hash of each entry that is charged by itself -> how many
    steps. `members_lost` is there unless the folder's own chain is whole. Entries
    may then be lost, as where anything is charged, and with them what the ledger knew of rounds and
    of records: which updates it released, which records were declared public or generated, and on
    whom was trained. What follows from it does not depend on what was lost."""
    columns = _readable_columns(rows, public)
    lines = _readable_lines(logs)
    plans = _list_plans(lines, rows, public, base)
    marks = [mark for mark in marks if not base.holds(mark.head)]
    heads = [head for mark in marks for head in (mark.head, *mark.charged)]
    heads += [*(sent if anchor in marks else []), *base.heads_beside]
    unknown = [head for head in dict.fromkeys(heads) if not base.holds(head)]
    logged, unnamed = _charges_of_lines(lines, base)
    covered = base.covered
    entered_here = _entered(base, logged, lines)
    lost = [EXHAUSTED] if anchor is None else _price(marks, covered, entered_here)
    # Each of them may have been the first charge of all, so each has every order that is known.
    here, beside = FixedOrders(base.entries).listed(), FixedOrders(base.entries_beside).listed()
    logged_orders = [line.order for line in lines if line.order is not None]
    order, *others = dict.fromkeys((*here, *beside, *orders, *logged_orders)) or (EXHAUSTED.order,)
    lost = [
        dataclasses.replace(charge, order=order, other_orders=tuple(others))
        for charge in (*logged.values(), *unnamed, *lost)
    ]
    charges = [*base.charges_beside, *lost]
    # The rules of a lost charge are those of the release that made it; in doubt, the oldest known.
    rules = min((charge.rules for charge in (*base.charges, *charges)), default=RULES)
    charges = [dataclasses.replace(charge, rules=rules) for charge in charges]
    top = rows[-1][0] if rows else 0
    highest = max([base.seq, top, *(head.seq for head in heads)])
    newest = {mark.charged[0] for mark in marks if mark.charged}
    paid = _list_entered([*base.entries, *base.entries_beside])
    entered = {entry: paid.get(entry, 0) + charge.steps for entry, charge in logged.items()}
    entered = _list_entered(base.entries_beside) | entered
    # A backup counts as older than the folder, even if nothing was entered since: whether a person
    # withdrew after it must not decide what follows.
    is_own = base.path == folder / DATABASE and anchor is not None
    is_whole = is_own and not unknown and not plans and highest == base.seq
    is_whole = is_whole and not _lacks_receipts(folder, receipts)
    return {
        "base": base.seq,
        "highest": highest,
        "lost_steps": _sum(charges).steps,
        "settled": [[*head] for head in unknown],
        "covered": [[*head, *covered[head]] for head in sorted(newest & {*covered})],
        "entered": entered,
        "dataset": EVERY,
        "charges": [charge.fields() for charge in charges],
        **({"columns": columns} if columns else {}),
        **({"plans": plans} if plans else {}),
        **({} if is_whole else {"members_lost": True}),
    }


def _price(marks: list[Mark], covered: dict[Head, Paid], entered: dict[str, Paid]) -> list[Charge]:
    """Return charges for everything that the chains of marks charged and that is not covered (see
    the top of this module). The newest charging entry of each mark is added to `covered`.

    - marks: marks whose entries the base lacks
    - covered: charging entries up to which everything is charged -> how much their chains had
      charged
    - entered: the hash of each lost entry that is charged by itself -> what is charged for it"""
    charges = []
    # An earlier one covers a later one. How much was charged tells which is earlier, and not the
    # number of the entry, by which the price would follow from how many withdrew.
    for mark in sorted(marks, key=lambda mark: mark.paid or Paid()):
        if mark.paid is None:
            charges.append(EXHAUSTED)
            continue
        start = next((head for head in mark.charged if head in covered), Head(-1, ""))
        paid = covered.get(start, Paid())
        for head in mark.charged:
            if head.seq > start.seq and head.hash in entered:
                paid = paid.plus(entered[head.hash])
        lost = mark.paid.beyond(paid) or mark.paid
        is_priced = mark.costliest is not None and mark.costliest.records > 0
        if lost.bare or (lost.steps and not is_priced):
            charges.append(EXHAUSTED)
        elif lost.steps and mark.costliest is not None:
            charges.append(_bound(mark.costliest, lost.steps))
        if mark.charged:
            covered[mark.charged[0]] = mark.paid
    return charges


def _bound(costliest: Costliest, steps: int) -> Charge:
    """Return one charge that costs at least as much as a number of steps, whichever they are: it
    has the smallest σ, and the largest q and k. (ε decreases in σ and increases in q, steps and k.)

    costliest: the bounds that each of the steps keeps"""
    return dataclasses.replace(
        EXHAUSTED,
        noise_multiplier=costliest.noise_multiplier,
        sampling_rate=costliest.sampling_rate,
        steps=steps,
        records=costliest.records,
        max_grad_norm=1.0,
    )


def _readable_lines(logs: list[Path]) -> list[Attempt]:
    """Return what each line of several step logs states. A line that several of them have counts
    once, also if only one of them names its membership, as the log of a home does that adopted a
    site. Lines that cannot be read are left out."""
    found, seen = list[Attempt](), Counter[Attempt]()
    for path in logs:
        here = Counter[Attempt]()
        for line in StepLog(path).list_readable():
            step = dataclasses.replace(line.step, membership="")
            same = dataclasses.replace(line, step=step)
            here[same] += 1
            if here[same] > seen[same]:
                found.append(line)
        seen |= here
    return found


def _charges_of_lines(lines: list[Attempt], base: _Base) -> tuple[dict[str, Charge], list[Charge]]:
    """Return charges for what lines of the step log state, and neither the base nor an entry beside
    it charges. Two: the hash of each ledger's entry that lines name -> its charge, for the steps
    beyond those that are charged for it; and the charges for lines that name none, as those of an
    older release: of such rounds, the steps beyond those that are charged for rounds of their kind
    (`_round_key`) and that no other line names.

    lines: what the step log's lines state; base: the chain that is continued"""
    named, unnamed = dict[str, Charge](), dict[tuple[Any, ...], Charge]()
    names = {charge.study: charge.name for charge in base.charges}
    for line in lines:
        charge = _charge_of_line(line, names.get(line.step.study, "restored"))
        if line.entry:
            named[line.entry] = _join(named.get(line.entry), charge)
        else:
            unnamed[_round_key(charge)] = _join(unnamed.get(_round_key(charge)), charge)
    paid = _list_entered([*base.entries, *base.entries_beside])
    of_kind = Counter[tuple[Any, ...]]()
    for charge in (*base.charges, *base.charges_beside):
        of_kind[_round_key(charge)] += charge.steps
    for entry, charge in named.items():
        of_kind[_round_key(charge)] -= min(charge.steps, paid.get(entry, 0))
    lost_named = {entry: _without(charge, paid.get(entry, 0)) for entry, charge in named.items()}
    lost_unnamed = [_without(charge, max(0, of_kind[kind])) for kind, charge in unnamed.items()]
    return (
        {entry: charge for entry, charge in lost_named.items() if charge.steps > 0},
        [charge for charge in lost_unnamed if charge.steps > 0],
    )


def _join(first: Charge | None, second: Charge) -> Charge:
    """Return one charge for the steps of both, which costs at least as much."""
    if first is None:
        return second
    return dataclasses.replace(
        first,
        steps=first.steps + second.steps,
        noise_multiplier=min(first.noise_multiplier, second.noise_multiplier),
        sampling_rate=max(first.sampling_rate, second.sampling_rate),
        records=max(first.records, second.records),
    )


def _without(charge: Charge, paid: int) -> Charge:
    """Return a charge for what is left of its steps if `paid` of them are charged already."""
    return dataclasses.replace(charge, steps=charge.steps - paid)


def _round_key(charge: Charge) -> tuple[Any, ...]:
    return (
        charge.study, charge.round, charge.noise_multiplier, charge.sampling_rate, charge.records,
        charge.max_grad_norm, charge.unit,
    )  # fmt: skip


def _charge_of_line(line: Attempt, name: str) -> Charge:
    """Build the charge for a line of the step log. name: the study's name."""
    step = line.step
    return Charge(
        study=step.study,
        name=name,
        round=step.round,
        noise_multiplier=step.noise_multiplier,
        sampling_rate=step.sampling_rate,
        steps=line.steps,
        records=step.records,
        max_grad_norm=step.max_grad_norm,
        unit=step.unit,
        cohort="any",
    )


def _entered(base: _Base, logged: dict[str, Charge], lines: list[Attempt]) -> dict[str, Paid]:
    """Return what is charged for each lost entry by itself: the entry's hash -> how much. Equal
    lines of one entry, of which each attempt has one, count once here: no charge is as large as a
    line that a person copied.

    - base: the chain that is continued, with the entries beside it
    - logged: the charges for entries that the step log names (`_charges_of_lines`)
    - lines: what the step log's lines state"""
    stated = Counter[str]()
    for line in dict.fromkeys(lines):
        stated[line.entry] += line.steps
    entered = {
        entry: _sum([dataclasses.replace(charge, steps=min(charge.steps, stated[entry]))])
        for entry, charge in logged.items()
    }
    rows = {entry.hash: count_paid(entry.kind, entry.body) for entry in base.entries_beside}
    return entered | rows


def _lacks_receipts(folder: Path, receipts: ReceiptLog | None) -> bool:
    """Return whether the coordinators' receipts were taken away, or cannot be read (None)."""
    if receipts is None:
        return True
    with closing(connect(folder / DATABASE)) as connection:
        return not (folder / RECEIPT).exists() and has_receipts(connection)


def _sum(charges: list[Charge]) -> Paid:
    bare = sum(charge.noise_multiplier <= 0 for charge in charges)
    return Paid(sum(charge.steps for charge in charges if charge.noise_multiplier > 0), bare)


def _readable_columns(rows: list[tuple[Any, ...]], public: str) -> dict[str, list[str]]:
    """Return the columns by which rows of the old database told patients apart: dataset's name ->
    its columns, oldest first. Whoever withdrew is known by them alone. A row counts if the site
    signed it. public: the public half (hexadecimal) of the site's key."""
    found = dict[str, list[str]]()
    for row in rows:
        with suppress(TypeError, KeyError, AttributeError, ValueError):
            body = _signed_body(row, public) or {}
            shown = dict[str, list[str]](body.get("columns", {}))  # of an earlier restore
            if row[1] == "declare" and body.get("patient"):
                shown[body["dataset"]] = [body["patient"]]
            for name, names in shown.items():
                columns = found.setdefault(name, [])
                columns += [each for each in names if each not in columns]
    return found


def _list_plans(
    lines: list[Attempt], rows: list[tuple[Any, ...]], public: str, base: _Base
) -> list[list[str]]:
    """List each [plan, membership] that ran or was signed here, as far as the step log or a row of
    the old database that the site signed shows it; those of the base's own entries are left out.

    lines: what the step log's lines state. rows, public, base: as for `_restore_body`"""
    known = set[tuple[str, str]]()
    found = {(line.step.study, line.step.membership) for line in lines}
    for entry in base.entries:
        known |= _plans_in(entry.kind, entry.body)
    for row in rows:
        with suppress(TypeError, KeyError, ValueError):
            found |= _plans_in(row[1], _signed_body(row, public) or {})
    return [[*each] for each in sorted(found - known)]


def _plans_in(kind: str, body: dict[str, Any]) -> set[tuple[str, str]]:
    """Return each (plan, membership) that an entry names. kind, body: the entry's."""
    named = {(plan, name) for plan, name in body.get("plans", ())}
    if kind == "reserve" and body:
        named.add((body["charge"]["study"], body.get("membership", "")))
    elif kind == "admit" and body:
        named.add((body["plan"], body.get("membership", "")))
    return named
