"""The privacy ledger of a site: it charges each round to a dataset before the round trains.

Guarantee: a reservation is on disk before `reserve` returns, and counts from then on, whether or
not an update is released. An update that left the site has an entry; its bytes may be sent again,
but no round is trained again for free. If something goes wrong, the ledger charges too much, never
too little: after a crash between reservation and release, after a restore, or where the records of
one dataset were put under another's name.

A dataset's own charges count against it, and so do the charges of every other dataset of the site,
unless one of the two was declared disjoint from the other. If they were declared disjoint after
charges were made, all earlier charges of either count against both. This depends on what a person
at the site declares, never on a record. A patient whose key is in two disjoint datasets is left out
of the later one (`disjoint_member_test`).
| case                                 | what follows                                              |
| σ = 0 (a study without privacy)      | charged as σ = 0: the dataset's ε is infinite             |
| a round that is reserved again       | is charged again                                          |
| a charge that counts against another | is permitted only if that dataset's budget permits it too |
Units that arrived later (`cohorts`) are charged for the dataset's rounds after their arrival only,
and not for a round that left their cohort out. Every charge of another dataset counts against them.
| a unit known before arrivals were kept | counts as arrived with the first charge |
Some charges give no ε for one unit of a study: a charge by an earlier release of fedtune
(`Charge.rules`), a charge for another kind of unit (for a record, if patients are protected now),
and a charge for patients whom another column told apart. `unknown` lists such charges, except those
that a person at the site has accepted.
The database and its chain: chain.py; anchor and receipts: files.py; restore: restore.py.
Errors: LedgerError (exit code 4); BudgetExceeded and other refusals come from `permit`.
Reference: Rogers et al. 2016 and Feldman & Zrnic 2021 (privacy filters, which `permit` applies).
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.errors import InfrastructureError, InputError, PolicyRefused, Refused
from fedtune.core.files.room import Room
from fedtune.core.files.writing import replace
from fedtune.core.ledger.account import Account, Reservation
from fedtune.core.ledger.chain import (
    Database,
    Entry,
    Transaction,
    check_members,
    named,
)
from fedtune.core.ledger.entries import (
    EVERY,
    RULES,
    Accepted,
    Charge,
    Cohort,
    Earlier,
    Freeze,
    Gone,
    Held,
    Permit,
    PermitApart,
    PermitUnknown,
    Slot,
    Spent,
    Standing,
    owner_of,
    slot_fields,
)
from fedtune.core.ledger.files import (
    DATABASE,
    KEY,
    OUTBOX,
    RECEIPT,
    Head,
    LedgerError,
    Mark,
    NoRoom,
    Receipt,
    counts_of,
    head_in,
    is_countersigned,
    newer_name,
    opened_token,
    outbox_name,
    outbox_prefix,
    read_noted,
    sealed_token,
    signed_paid,
)
from fedtune.core.wire.keys import SigningKey

if TYPE_CHECKING:
    from fedtune.core.config import Site

__all__ = [
    "EVERY",
    "RULES",
    "Accepted",
    "Charge",
    "Cohort",
    "Head",
    "Ledger",
    "LedgerError",
    "NoRoom",
    "Spent",
    "signing_key",
]

log = logging.getLogger("fedtune.ledger")
MEMBER_BYTES = 200  # most bytes of one member in the database


class Ledger:
    """The ledger in `folder`, created on first use. One object may serve several threads, and
    several processes may open one folder.

    room: the site's reserved disk space, which updates do not use. If the rest of the disk has no
    space for an update, the update is kept in memory. None: no space is reserved, and the ledger
    always tries to write an update to the disk."""

    def __init__(self, folder: Path, room: Room | None = None) -> None:
        self.folder, self._room = folder, room
        self._account = Account()
        self._store = Database(folder, self._account.fold)
        self._unstored: dict[str, tuple[Slot, bytes]] = {}  # by study: an update that has no file
        with self._store.writing() as writer:
            self._check_members(writer)

    @property
    def key(self) -> SigningKey:
        return self._store.key

    @property
    def head(self) -> Head:
        return self._read()

    def verify(self) -> None:
        """Verify the whole ledger again, with every signature. Errors: LedgerError."""
        self._store.verify()
        with self._store.writing() as writer:
            self._check_members(writer)

    def declare(
        self,
        dataset: str,
        disjoint_from: Iterable[str] | None,
        content_hash: str | None = None,
        members: Iterable[bytes] = (),
        cohort: str = "first",
        keys: Iterable[bytes] | None = None,
        units: Iterable[bytes] = (),
        columns: Mapping[str, str] | None = None,
    ) -> frozenset[bytes]:
        """Enter a signed declaration of a dataset. If nothing changed since the last one, the call
        enters nothing. If no members, keys and units are given, it takes the same time however many
        members the ledger has: a plan that costs nothing is answered after such a call.

        - dataset: the name under which it is charged
        - disjoint_from: the datasets with which it shares no patient; None: as last declared
        - content_hash: hash of its content; None: content and cohort stay as they were
        - members: patients' keys and record bytes, of which only salted hashes are kept; a member
          stays a member for good
        - cohort: the name that a person gave the units that arrive now
        - keys: the key of each unit. A key that was never a member of the dataset arrives now,
          whatever any unit's records are, and all such keys are one cohort. None: no arrivals are
          recorded
        - units: patients' keys to look for in datasets disjoint from this one
        - columns: for each dataset that the site's or the hospital's file names now, its column of
          patients; "" if it has none. Each column that differs from the one last declared is
          declared anew, also of other datasets; a dataset that the file no longer names has none.
          None: all columns stay as they were

        Returns the keys in `units` that a disjoint dataset has. They are entered neither as members
        nor as arrivals, and may not take part here: of two processes that read at the same moment,
        the one that enters a key first keeps its patient.
        Errors: NoRoom if the disk has too little space; nothing is entered."""
        # Hashed before the lock is taken, since other processes wait a minute at most for it.
        listed, units = None if keys is None else list(keys), list(units)
        salted = {each: self._salt_member(each) for each in {*units, *(listed or ())}}
        hashes = {salted.get(member) or self._salt_member(member) for member in members}
        with self._store.writing() as writer:
            previous = self._account.declared.get(dataset, {})
            stays = previous.get("disjoint_from", ())
            apart_from = set(stays if disjoint_from is None else disjoint_from)
            apart = self._account.list_apart(dataset, apart_from) if units else ()
            there = writer.hashes(*apart) if apart else set[bytes]()
            elsewhere = {unit: salted[unit] for unit in units if salted[unit] in there}
            arrival = None
            if listed is not None:
                salted_keys = [salted[key] for key in listed if key not in elsewhere]
                arrival = self._account.arrivals.entry(dataset, writer.hashes(dataset), salted_keys)
            if hashes:
                writer.add_members(dataset, sorted(hashes - set(elsewhere.values())))
            stands = None if hashes else previous.get("members")
            declaration: dict[str, Any] = {
                "dataset": dataset,
                "disjoint_from": sorted(apart_from),
                "content": previous.get("content", "") if content_hash is None else content_hash,
                "cohort": previous.get("cohort", cohort) if content_hash is None else cohort,
                "members": writer.members(dataset) if stands is None else stands,
                **_with_column(previous, dataset, columns),
            }
            # A new content hash alone adds no entry: it depends on the plan for which data is read.
            if declaration != {**previous, "content": declaration["content"]}:
                writer.append("declare", declaration)
            for other, earlier in self._account.declared.items():
                again = {**earlier, **_with_column(earlier, other, columns)}
                if other != dataset and again != earlier:
                    writer.append("declare", again)
            if arrival:
                writer.append("arrive", {**arrival, "cohort": cohort})
        return frozenset(elsewhere)

    def holds(self, dataset: str, member: bytes) -> bool:
        """Return whether `member`, the identifier of a patient or record, was ever declared as the
        dataset's."""
        return self.member_test(dataset)(member)

    def member_test(self, dataset: str) -> Callable[[bytes], bool]:
        """Return a function that takes a member, i.e. the identifier of a patient or record, and
        returns whether it was ever declared as the dataset's. The function knows the ledger as it
        is now, and no later entries."""
        with self._store.writing() as writer:
            hashes = writer.hashes(dataset)
        return lambda member: self._salt_member(member) in hashes

    def disjoint_member_test(self, dataset: str) -> Callable[[bytes], bool]:
        """Return a function that takes a patient's key, and returns whether the ledger has it for
        another dataset that is declared disjoint from `dataset`. If so, the caller leaves the
        patient out of `dataset`. So a patient whose records are in two disjoint datasets takes part
        only in the one that had the key first. If the two were declared disjoint when both had the
        key already, the patient takes part in neither."""
        with self._store.writing() as writer:
            names = [
                name for name in self._account.declared if self._account.disjoint(dataset, name)
            ]
            hashes = writer.hashes(*names)
        return lambda key: self._salt_member(key) in hashes

    @property
    def disjoint(self) -> list[tuple[str, str]]:
        """List the pairs of datasets that are declared to share no patient."""
        with self._store.writing():
            return sorted((min(pair), max(pair)) for pair in self._account.apart_since)

    def overlap(self, first: str, second: str) -> int:
        """Count the members that two datasets ever had in common. A member is an identifier of a
        patient, a record, a file or a longer text. The count is shown to a person at the site; no
        charge depends on it."""
        with self._store.writing() as writer:
            return writer.overlap(first, second)

    def unknown(
        self, dataset: str, unit: str, columns: Mapping[str, str] | None = None
    ) -> list[Spent]:
        """List charges against `dataset` that give no ε for one `unit` ("patient" or "record") and
        that nobody at the site has accepted. columns: the column of patients of each dataset, as
        the site's files are now; None: as they were last declared."""
        with self._store.writing():
            return self._unknown(dataset, unit, columns)

    def _unknown(
        self, dataset: str, unit: str, columns: Mapping[str, str] | None = None
    ) -> list[Spent]:
        accepted = self._account.accepted.get(dataset, [])
        return [
            spent
            for spent in self._account.against(dataset, columns)
            if not spent.is_known_for(unit)
            and not any(acceptance.covers(spent, dataset) for acceptance in accepted)
        ]

    def _unknown_for(self, dataset: str, charge: Charge) -> list[Spent]:
        """List the charges whose cost is not known for the unit of `charge`, a charge that is to be
        made. The column of patients in `charge` counts as the present one, since the process of
        another membership may have declared another column meanwhile."""
        own = {dataset: charge.patient} if charge.patient else {}
        return self._unknown(dataset, charge.unit, {**self._account.patients, **own})

    def accepted(self, dataset: str) -> list[Accepted]:
        """List people's acceptances of charges to `dataset` whose ε is unknown, oldest first."""
        with self._store.writing():
            return list(self._account.accepted.get(dataset, []))

    def accept(
        self,
        dataset: str,
        who: str,
        reason: str = "",
        columns: Mapping[str, str] | None = None,
        declared: Iterable[str] = (),
        upto: int | None = None,
        counted: Iterable[Spent] | None = None,
    ) -> None:
        """Enter that a person at the site accepts that the ε spent on `dataset` is unknown. The
        acceptance holds for the charges that count against `dataset` now, as long as the columns of
        patients stay as they are now.

        - who: the person's login
        - reason: in that person's words, "" for none
        - columns: the column of patients of each dataset, as the site's files are now; None: as
          they were last declared
        - declared: the datasets that were declared public or generated and that share records with
          `dataset`, if the person accepts this too
        - upto: the number of the newest entry that the person may have seen; None: the newest
        - counted: the charges that count against `dataset`, as the site's files are now
          (`as_stated`); None: as was last declared"""
        with self._store.writing() as writer:
            newest = self._store.head.seq
            upto = newest if upto is None else min(upto, newest)
            about = {"dataset": dataset, "upto": upto, "by": who, "why": reason}
            against = dict[str, int]()
            for spent in self._account.against(dataset) if counted is None else counted:
                if spent.seq <= upto:
                    against[spent.dataset] = max(spent.seq, against.get(spent.dataset, 0))
            entry = about | {"declared": sorted(declared), "against": against}
            now = self._account.patients if columns is None else columns
            named = {name: column for name, column in now.items() if column}
            writer.append("accept", entry | {"patients": named})

    def charges(self, dataset: str) -> list[Charge]:
        """List the charges that count against `dataset`, oldest first."""
        return [spent.charge for spent in self.spending(dataset)]

    def spending(
        self, dataset: str | None = None, columns: Mapping[str, str] | None = None
    ) -> list[Spent]:
        """List the charges that count against `dataset`, each with its entry, its time, and whether
        its update was released.

        - dataset: the dataset's name; None: all charges in the ledger are listed
        - columns: the column of patients of each dataset, as the site's files are now; None: as
          they were last declared"""
        account = self._account
        with self._store.writing():
            return account.spent() if dataset is None else account.against(dataset, columns)

    def cohorts(self, dataset: str) -> list[Cohort]:
        """List the cohorts of `dataset` (units that arrived together), oldest first. If no arrivals
        are recorded, all units are one cohort."""
        with self._store.writing():
            return self._account.cohorts(dataset)

    def newcomer(self, dataset: str) -> list[Charge]:
        """List the charges that would count against a unit that arrives in `dataset` now."""
        with self._store.writing():
            return self._account.newcomer(dataset)

    def arrival(self, dataset: str) -> Callable[[bytes], int]:
        """Return a function that tells, for a unit's key, the number of the entry with which the
        unit's cohort arrived in `dataset`; 0 if no arrival is known."""
        self._read()
        return lambda key: self._account.arrivals.of(dataset, self.hashed(key))

    @property
    def memberships(self) -> set[str]:
        """Return the names of all memberships of the hospital that any entry names: an entry of a
        charge, of a signature under a plan, or of a person's decision about an answer."""
        account = self._account
        with self._store.writing():
            slots = {*account.sent, *account.refused, *(slot for slot, _ in account.let_go)}
            paid = {spent.charge.membership for spent in account.spent()}
            return {*paid, *map(owner_of, slots), *(name for _, name in account.admitted)}

    def has_entry(self, head: Head) -> bool:
        """Return whether the entry `head` is in this ledger itself."""
        with self._store.writing() as reader:
            return reader.hash_at(head.seq) == head.hash

    def hash_of(self, reservation: int) -> str:
        """Return the hash of the entry that charged a round, for the step log's line of it.
        reservation: the entry's number (`reserve`). Errors: KeyError if it charged none."""
        return self._account.reserved[reservation].hash

    def order_of(self, reservation: int) -> float:
        """Return the Rényi order of a charge, for the step log's line of it. reservation: the
        entry's number (`reserve`). Errors: KeyError if it charged none."""
        return self._account.reserved[reservation].charge.order

    def accounts_for(self, head: Head) -> bool:
        """Return whether this ledger has the entry `head`, or a restore that lost it was given its
        hash and has charged for what it may have held."""
        with self._store.writing() as reader:
            return self._store.names(reader.sql, head)

    @property
    def members_lost(self) -> int:
        """When a restore last may have lost members, i.e. what the ledger knew of patients and
        records until then, in UTC seconds; 0 if none did."""
        self._read()
        return self._account.members_lost

    @property
    def charged_entries(self) -> dict[str, int]:
        """The hash of each entry, of this ledger, an adopted or a lost one, that is charged here by
        itself, as the step log names it -> how many steps are charged for it."""
        self._read()
        return dict(self._account.charged_entries)

    @property
    def ended_plans(self) -> set[str]:
        """The plans that get no further answer, each by its digest or that of its queries: it was
        charged, or a person signed it, before a restore that may have lost entries, so that rounds
        of it may be missing from this ledger."""
        self._read()
        return set(self._account.ended)

    @property
    def datasets(self) -> list[str]:
        """List the names of all datasets that were declared."""
        with self._store.writing():
            return sorted(self._account.declared)

    def as_stated(
        self,
        dataset: str,
        apart: Mapping[str, Collection[str]],
        columns: Mapping[str, str],
    ) -> Ledger:
        """Return this ledger as it will be once the site's files, as they are now, are declared for
        a charge to `dataset`: with the datasets that they state are disjoint, and their columns of
        patients. Nothing is entered. The result is only to be read from, and only until the next
        entry.

        - apart: dataset's name -> the datasets from which the files declare it disjoint
        - columns: dataset's name -> its column of patients in the files"""
        stated = copy.copy(self)
        with self._store.writing():
            seq = self._store.head.seq + 1
            stated._account = self._account.as_stated(dataset, apart, columns, seq)
        return stated

    @property
    def patient_columns(self) -> dict[str, list[str]]:
        """Return which datasets ever had a column of patients. The result is a dict: a dataset's
        name -> its columns, oldest first; [] if they are not known, as where an earlier release
        charged it per patient."""
        with self._store.writing():
            return self._account.list_columns()

    def ask(
        self,
        dataset: str,
        permit: Permit,
        permit_other: Permit | None = None,
        *,
        of_newcomers: bool = False,
    ) -> None:
        """Ask whether a charge to `dataset` is permitted, without charging anything. Ask before
        records are read, since each reading may add an entry.

        - dataset: the dataset that is to be charged
        - permit: called for `dataset`, and for every other dataset against which the charge would
          count, with all charges that count against that dataset so far; it refuses by raising an
          error
        - permit_other: called in place of `permit` for the other datasets; None: `permit` is called
        - of_newcomers: whether `permit` is called for `dataset` with the charges against a unit
          that arrives now, in place of all charges against the dataset

        Errors: those that `permit` or `permit_other` raises; LedgerError."""
        with self._store.writing():
            self._ask(dataset, permit, permit_other, of_newcomers)

    def _ask(
        self,
        dataset: str,
        permit: Permit,
        permit_other: Permit | None = None,
        of_newcomers: bool = False,
    ) -> None:
        """Call `permit` for every dataset that a charge to `dataset` would count against; datasets
        with the same charges are asked about once.

        - dataset: the dataset that is to be charged
        - permit: called with the charges against it, and refuses by raising an error
        - permit_other: called in place of `permit` for the other datasets; None: `permit` is called
        - of_newcomers: whether `permit` is called, for `dataset`, with the charges against a unit
          that arrives now, in place of all charges against the dataset

        Errors: LedgerError if the dataset was never declared; those that the functions raise."""
        if dataset not in self._account.declared:
            raise LedgerError(f"{self.folder}: dataset {dataset!r} was never declared")
        asked: list[list[int]] = []
        if of_newcomers:
            permit(self._account.newcomer(dataset))
        for other in sorted(self._account.declared, key=lambda name: (name != dataset, name)):
            if self._account.disjoint(dataset, other) or (of_newcomers and other == dataset):
                continue
            spent = self._account.against(other)
            entries = [s.seq for s in spent]
            if entries not in asked:
                asked.append(entries)
                asks = permit if other == dataset else permit_other or permit
                asks([s.charge for s in spent])

    def _ask_apart(self, permit_apart: PermitApart | None) -> None:
        if permit_apart:
            declared = self._account.declared.items()
            apart = {name: list(body["disjoint_from"]) for name, body in declared}
            permit_apart(apart, dict(self._account.patients))

    def _ask_all(self, permit_all: Permit | None) -> None:
        if permit_all:
            permit_all([spent.charge for spent in self._account.spent()])

    def reserve(
        self,
        dataset: str,
        charge: Charge,
        adapter: str,
        permit: Permit,
        permit_unknown: PermitUnknown | None = None,
        permit_apart: PermitApart | None = None,
        permit_all: Permit | None = None,
    ) -> int:
        """Charge `dataset` with one round, if `permit` allows it; return the entry's number.

        - dataset: the name of a declared dataset, whose records the round reads
        - charge: what the round costs
        - adapter: the digest of the adapter from which the round starts, with the number of the
          attempt and the membership if there are any. At most one answer leaves the site for a
          study, a round and this text
        - permit: called for `dataset` and for every other dataset against which the charge would
          count, with the list of all charges that count against that dataset so far
        - permit_unknown: called with the list of the dataset's charges whose ε for the charge's
          unit is not known and that nobody has accepted; None: such charges do not matter
        - permit_apart: called with two dicts: each dataset's name -> the datasets from which it is
          declared disjoint, and -> its column of patients; None: this is not checked
        - permit_all: called with all charges of this ledger; None: this is not checked

        Each of these functions refuses by raising an error; nothing is charged then. They are
        called under the write lock, and must not call this ledger. Errors: those that the functions
        raise; LedgerError."""
        with self._store.writing() as writer:
            self._check_not_frozen()
            self._ask(dataset, permit)
            if permit_unknown:
                permit_unknown(self._unknown_for(dataset, charge))
            self._ask_apart(permit_apart)
            self._ask_all(permit_all)
            return writer.append("reserve", _reservation(dataset, charge, adapter))

    def reserve_for(
        self,
        dataset: str,
        charge: Charge,
        adapter: str,
        permit: Permit,
        permit_other: Permit | None = None,
        permit_unknown: PermitUnknown | None = None,
        permit_apart: PermitApart | None = None,
        permit_all: Permit | None = None,
    ) -> tuple[int, frozenset[int]]:
        """Charge one round to those cohorts of `dataset` (units that arrived together) that
        `permit` allows. A cohort that it refuses is left out of the round and not charged for it.
        Returns the number of the entry that charges the round, and the cohorts left out, each by
        the number of the entry with which it arrived.

        - dataset: the name of a declared dataset, whose records the round reads
        - charge: what the round costs
        - adapter: the digest of the adapter from which the round starts, with the number of the
          attempt and the membership if there are any
        - permit: called with the charges against a unit that arrives now, and then with those
          against each cohort. If it raises Refused for a cohort, this cohort is left out
        - permit_other: called for every other dataset against which the charge counts, with all
          charges of that dataset, whichever cohorts took part; None: `permit` is called
        - permit_unknown: called with the list of the dataset's charges whose ε for the charge's
          unit is not known and that nobody has accepted; None: such charges do not matter
        - permit_apart: called with two dicts: each dataset's name -> the datasets from which it is
          declared disjoint, and -> its column of patients; None: this is not checked
        - permit_all: called with all charges of this ledger; None: this is not checked

        All but the calls of `permit` for cohorts are made under the write lock, and must not call
        this ledger.

        Guarantee: which cohorts are left out follows from public charges, the policy and the time
        of arrival, never from a record. The charge is made even where no cohort remains. `permit`
        is asked about cohorts before the write lock is taken, since it computes an ε for each and
        there may be many: other processes wait a minute at most for the lock, and whether they fail
        must not depend on how many units arrived. If a charge was entered meanwhile, `permit`
        is asked again about the cohorts that it counts against.
        Errors: those that `permit` raises for a newcomer or another dataset; LedgerError."""
        refused = dict[tuple[int, ...], bool]()
        while True:
            with self._store.writing() as writer:
                self._check_not_frozen()
                self._ask(dataset, permit, permit_other, of_newcomers=True)
                if permit_unknown:
                    permit_unknown(self._unknown_for(dataset, charge))
                self._ask_apart(permit_apart)
                self._ask_all(permit_all)
                cohorts = self._account.cohorts(dataset)
                unasked = {c.entries: c.charges for c in cohorts if c.entries not in refused}
                if not unasked:
                    out = {cohort.arrival for cohort in cohorts if refused[cohort.entries]}
                    entry = _reservation(dataset, charge, adapter) | {"out": sorted(out)}
                    return writer.append("reserve", entry), frozenset(out)
            for entries, charges in unasked.items():
                refused[entries] = _refuses(permit, charges)

    def enter_earlier(
        self,
        membership: str,
        earlier: Sequence[Earlier],
        withdrawn: Mapping[bytes, Gone],
        refused: Iterable[Slot],
        who: str,
        ended: Collection[str] = (),
        charged: Mapping[str, int] | None = None,
    ) -> int:
        """Enter the charges that a membership of this hospital has in an earlier ledger of its own;
        return how many were not there yet. No `permit` is called, since what they cost was spent
        already.

        - membership: its name in this hospital; each charge in `earlier` must name it
        - earlier: all charges of the earlier ledger, oldest first, each with the name of the
          dataset that it is charged to here
        - withdrawn: the key of each unit that withdrew there → when. The withdrawal is entered
          after those of the charges that were made before it
        - refused: slots (study, round, adapter) whose answer a person refused there for good, as
          slots of this membership
        - who: the login of the person who moves the ledger, for the entries of refused answers
        - ended: the digests of the plans that get no further answer there (`ended_plans`)
        - charged: the hash of each entry that is charged there by itself, also of one that was lost
          and that a restore charged (`charged_entries`) -> how many steps; None: none is known

        Guarantee: either everything is entered or nothing, and repeating the call enters nothing
        twice; each charge keeps its rules, unit and order.
        Errors: LedgerError if other rounds were charged to the membership here."""
        with self._store.writing() as writer:
            account = self._account
            paid = [r for r in account.reserved.values() if r.charge.membership == membership]
            if len(paid) > len(earlier) or not all(map(_is_entered, paid, earlier)):
                raise LedgerError(
                    f"{self.folder}: membership {membership!r} has paid for other rounds here",
                    "a name under which nothing was paid yet",
                    "choose another name",
                )
            gone = {self.hashed(key): when for key, when in withdrawn.items()}
            left = {unit: gone[unit] for unit in set(gone) - set(account.withdrawn)}

            def leave(paid: int) -> None:
                for unit in sorted(unit for unit, when in left.items() if when.paid <= paid):
                    when = left.pop(unit)
                    writer.append("withdraw", _withdrawal(unit, when.columns, when.since))

            for paid_before, one in enumerate(earlier[len(paid) :], len(paid)):
                leave(paid_before)
                entry = _reservation(one.dataset, one.charge, one.adapter)
                entry |= {"origin": one.origin} if one.origin else {}
                number = writer.append("reserve", entry)
                if one.sha256:
                    writer.append("release", {"reservation": number, "sha256": one.sha256})
            leave(len(earlier))
            for slot in sorted(set(refused) - account.refused):
                writer.append("refuse", {**slot_fields(slot), "by": who})
            plans = [[plan, membership] for plan in sorted({*ended} - account.ended)]
            known = account.charged_entries | {one.origin: one.charge.steps for one in earlier}
            entered = {
                entry: steps
                for entry, steps in (charged or {}).items()
                if steps > known.get(entry, 0)
            }
            if plans or entered:
                body = {"plans": plans} | ({"entered": entered} if entered else {})
                writer.append("end", body)
        return len(earlier) - len(paid)

    def release(
        self, reservation: int, update: bytes, *, held: bool = False, keeps_all: bool = False
    ) -> None:
        """Store an update's bytes, then enter that it may be sent. Send it only afterwards.

        - reservation: the number of the entry that charged the round (`reserve`)
        - update: the bytes to store, which `released` returns
        - held: whether it may be sent only when a person at the site has approved it
        - keeps_all: whether earlier updates of the study stay stored, as where one person runs the
          whole study, or while the site's own ledger is frozen and this is the ledger of a run

        If the disk has no space for the bytes, this object keeps them in memory: whether an update
        is sent must not depend on what fills the disk, such as the number of records. After a
        restart they are gone, and a request for them is answered by another round, which is charged
        again.
        Errors: LedgerError if the reservation is unknown or used, or if another process released
        this round first (send what `released` returns).

        Guarantee: unless keeps_all, or while the ledger is frozen, only the newest update of each
        study is kept, on disk or in memory. So while this object lives, the disk's free space,
        which depends on the size of the records' files, does not decide which rounds are sent again
        unchanged."""
        with self._store.writing() as writer:
            reserved = self._account.reserved.get(reservation)
            if reserved is None or reservation in self._account.done:
                raise LedgerError(f"{self.folder}: entry {reservation} is not an open reservation")
            if self._released_bytes(reserved.slot) is not None:
                raise LedgerError(
                    f"{self.folder}: round {reserved.charge.round} was released by another process",
                    todo="nothing: it is sent again as it was released",
                )
            self._store_bytes(reserved.slot, update)
            digest = hashlib.sha256(update).hexdigest()
            entry = writer.append("release", {"reservation": reservation, "sha256": digest})
            if held:
                about = {"release": entry, "reservation": reservation, "bytes": len(update)}
                writer.append("hold", about)
        if not (keeps_all or self._account.frozen):  # no earlier: the round before stays until then
            self._delete_earlier(reserved.slot)

    def _delete_earlier(self, slot: Slot) -> None:
        """Delete the stored updates of the plan of `slot`, except that of `slot` itself and the
        newest update of each other membership of the hospital. slot: (study, round, adapter), which
        names one update."""
        with suppress(OSError):
            for other in set(self._list_stored(slot[0])) - self._to_keep(slot):
                other.unlink(missing_ok=True)

    def is_held(self, slot: Slot) -> bool:
        """Return whether the answer that was released for a slot (study, round, adapter) waits for
        a person at the site."""
        self._read()
        account = self._account
        return account.released.get(slot) in account.held and not self._is_let_go(slot)

    def is_let_go(self, slot: Slot) -> bool:
        """Return whether a person at the site approved the answer in a slot (study, round,
        adapter). If nothing is released for the slot yet, return whether the person approved that
        the answer is made (a draw, in a round of shared noise)."""
        self._read()
        return self._is_let_go(slot)

    def is_refused(self, slot: Slot) -> bool:
        """Return whether a person at the site refused for good the answer in a slot (study, round,
        adapter)."""
        self._read()
        return slot in self._account.refused

    def has_answered(self, slot: Slot) -> bool:
        """Return whether a slot (study, round, adapter) is settled: an update was released for
        it, or a person refused its answer for good, or a person approved its draw before it was
        made."""
        self._read()
        account = self._account
        decided = slot in account.refused or (slot, "") in account.let_go
        return decided or slot in account.sent

    def list_held(self) -> list[Held]:
        """List the answers that wait for a person at the site, oldest first. An answer whose bytes
        are not on disk is listed only if it is the newest of its study, since the site's process
        may hold its bytes in memory."""
        account = self._account
        with self._store.writing():
            newest = {(slot[0], owner_of(slot)): slot for slot in account.released}
            return [
                held
                for entry, held in account.held.items()
                if account.released[held.slot] == entry
                and held.slot not in account.refused
                and not self._is_let_go(held.slot)
                and (
                    self.path_of(held.slot).exists()
                    or newest[held.slot[0], owner_of(held.slot)] == held.slot
                )
            ]

    def let_go(self, slot: Slot, who: str) -> None:
        """Enter that a person approved the answer in a slot (study, round, adapter). If an answer
        is released, the approval is for exactly its bytes; if not, it is for the draw that is still
        to be made. who: the person's login.
        Errors: InputError if a person refused the answer before."""
        with self._store.writing() as writer:
            if slot in self._account.refused:
                raise InputError(
                    f"round {slot[1]}: its answer was refused, for good",
                    todo="run the command again, and name the other answers only",
                )
            if not self._is_let_go(slot):
                sha256 = self._account.sent.get(slot, "")
                writer.append("let-go", {**slot_fields(slot), "sha256": sha256, "by": who})

    def refuse(self, slot: Slot, who: str, *, keeps: bool = False) -> None:
        """Enter that a person refuses for good the answer in a slot (study, round, adapter), and
        delete the answer's bytes. If the ledger is frozen, the refusal is entered and the bytes
        stay. The charge for the answer always stays. who: the person's login. keeps: whether the
        bytes stay in any case, as in the ledger of a run while the site's own ledger is frozen.
        Errors: InputError if somebody approved the answer before."""
        with self._store.writing() as writer:
            if self._is_let_go(slot):
                raise InputError(
                    f"round {slot[1]}: its answer was approved before, and may have been sent",
                    todo="run the command again, and name the other answers only",
                )
            if slot not in self._account.refused:
                writer.append("refuse", {**slot_fields(slot), "by": who})
        if not (keeps or self._account.frozen):
            self.path_of(slot).unlink(missing_ok=True)

    def _is_let_go(self, slot: Slot) -> bool:
        return (slot, self._account.sent.get(slot, "")) in self._account.let_go

    def released(self, study: str, round_: int, adapter: str) -> bytes | None:
        """Return the bytes that were released for a slot, i.e. for one answer. study, round_,
        adapter: the three parts of the slot.

        None if nothing was released, or if the bytes are missing or altered; the round is then
        charged again."""
        self._read()
        return self._released_bytes((study, round_, adapter))

    def head_statement(
        self, audit: str = "", membership: str = "", coordinator: str = ""
    ) -> dict[str, Any]:
        """Return {"token": …}: the ledger's newest entry and the audit log's head, encrypted so
        that only this site can read them. The coordinator countersigns the token without reading
        it. The anchor notes first that this coordinator is sent the entry's head.

        - coordinator: the public key (hexadecimal) of the coordinator; "" if no plan was signed
        - audit: the head of the site's audit log, as "SEQ:HASH"; "" if the log is empty
        - membership: the membership of a hospital that sends the token; "" for a site with a ledger
          of its own"""
        with self._store.writing():
            # Without the note, a restore only charges more. A full disk must not end the answer.
            with suppress(OSError, InfrastructureError):
                self._store.note_sent(coordinator, membership)
            statement = self._store.statement()
        return {"token": sealed_token(self.key, statement, audit, membership)}

    def accept_receipt(
        self,
        receipt: Mapping[str, Any],
        coordinator_public: str,
        memberships: Iterable[str] = ("",),
    ) -> str:
        """Check a head of this ledger that a coordinator countersigned, and store the receipt if it
        is that coordinator's newest. Return the audit log's head that the receipt holds, "" if it
        holds none.

        - receipt: the fields that the coordinator made (`wire.seal.receipt`)
        - coordinator_public: the public key (hexadecimal) that must have countersigned
        - memberships: the memberships for which this site may have encrypted the head
          (`head_statement`); ("",) for a site with a ledger of its own

        Errors: LedgerError if it is not a receipt for this site by that coordinator; it is then
        ignored. LedgerError also if the ledger lacks the entry: the ledger was rolled back, and
        reserves nothing from now on, in any process, until it is restored."""
        statement = opened_token(self.key, receipt.get("token"), *memberships)
        head = head_in(statement, self.key.public)
        if head is None or not is_countersigned(receipt, coordinator_public):
            raise LedgerError(
                "the coordinator's receipt is not one for this site's ledger",
                expected="a head that this site signed, countersigned by the coordinator",
                todo="run the round again; if the error comes again, this is not the coordinator "
                "that sent the plan",
            )
        mark, signature = Mark(head, None), ""
        if "steps" in statement:  # signed here: the token is encrypted by this site, as a whole
            mark = counts_of(statement, head)
            signature = self.key.sign(signed_paid(mark))
        membership, by = str(statement["membership"]), str(statement["signature"])
        self._store_receipt(Receipt(coordinator_public, mark, by, signature, membership))
        return str(statement["audit"])

    def accept_noted(self, statement: Any) -> None:
        """Check a head of this ledger that this machine noted outside its folder, and store it as a
        receipt. A statement that this ledger's key did not sign is ignored: it is of another
        ledger, which was in the folder before.

        statement: what the anchor stated then, as it was noted

        Errors: LedgerError if the ledger lacks the entry, as in `accept_receipt`."""
        if noted := read_noted(statement, self.key.public):
            self._store_receipt(noted)

    def _store_receipt(self, new: Receipt) -> None:
        """Store a receipt, if it is the newest of its coordinator. Errors: LedgerError if the
        ledger lacks the entry that it is for; it is stored then, too."""
        with self._store.writing() as writer:
            is_accounted_for = self._store.accounts_for(writer.sql, new.mark)
            after = writer.receipts.plus(new, is_accounted_for, writer.has)
            if after != writer.receipts:
                replace(self.folder / RECEIPT, after.packed, private=True)
                self._store.note_receipts(writer.sql)
                self._store.check_receipts(writer.sql)  # as every transaction does from now on

    def hashed(self, unit_key: bytes) -> str:
        """Return the hash of a unit's key with this site's salt, in hexadecimal."""
        return self._salt_member(unit_key).hex()

    def withdraw(self, unit_key: bytes, columns: Collection[str] = ()) -> Entry:
        """Enter, once, that a unit's consent was withdrawn, and return this entry. The unit's
        charges stay, since a release cannot be taken back. If the unit withdrew before, only those
        of `columns` are added that were not entered with it.

        columns: the columns that tell patients apart now, by whose keys the unit is known; none if
        that is not known"""
        unit = self.hashed(unit_key)
        with self._store.writing() as writer:
            first = self._account.withdrawn.get(unit)
            if first is None:
                writer.append("withdraw", _withdrawal(unit, columns))
            elif not self._account.withdrawn_by[unit].issuperset(columns):
                since = first.body.get("since", first.body["time"])
                writer.append("withdraw", _withdrawal(unit, columns, since))
        return self._account.withdrawn[unit]

    @property
    def withdrawn_by(self) -> dict[str, frozenset[str]]:
        """Return a dict: the hash of each unit that withdrew -> the columns that told patients
        apart when it did; none if they are not known, as for an entry of an earlier release or of a
        restore."""
        self._read()
        return dict(self._account.withdrawn_by)

    def withdrawn(self) -> dict[str, Entry]:
        """Return a dict: the hash of each unit that withdrew -> the entry of its withdrawal."""
        self._read()
        return dict(self._account.withdrawn)

    def admit(self, plan_digest: str, who: str, membership: str = "") -> None:
        """Enter, once, that a person at the site agreed to a plan.

        - plan_digest: the plan's digest
        - who: the person's login
        - membership: the membership of a hospital for which the plan runs; "" for a site with a
          ledger of its own"""
        with self._store.writing() as writer:
            if (plan_digest, membership) not in self._account.admitted:
                entry = {"plan": plan_digest, "by": who}
                writer.append("admit", entry | ({"membership": membership} if membership else {}))

    def admitted(self, plan_digest: str, memberships: Iterable[str] = ("",)) -> bool:
        """Return whether a person at the site agreed to the plan (`admit`) for one of
        `memberships`; ("",) stands for a site with a ledger of its own."""
        self._read()
        return any((plan_digest, name) in self._account.admitted for name in memberships)

    @property
    def frozen(self) -> Freeze | None:
        """Return the freeze that is in force now: who froze the ledger, when and why. None if the
        ledger is not frozen."""
        self._read()
        return self._account.frozen

    def freeze(self, who: str, why: str) -> None:
        """Freeze the ledger, unless it is frozen: nothing is charged or answered until a person
        lifts the freeze. who: the login of the person who freezes it; why: in that person's
        words."""
        with self._store.writing() as writer:
            if self._account.frozen is None:
                writer.append("freeze", {"by": who, "why": why})

    def lift(self, who: str, why: str) -> None:
        """Enter that a person ends a freeze. who: the person's login; why: in that person's words.
        Errors: InputError if the ledger is not frozen."""
        with self._store.writing() as writer:
            if self._account.frozen is None:
                raise InputError(f"{self.folder}: the ledger is not frozen")
            writer.append("lift", {"by": who, "why": why})

    def check_not_frozen(self) -> None:
        """Raise an error if a person froze the ledger. Errors: PolicyRefused if it is frozen, with
        a text that may leave the site; LedgerError."""
        self._read()
        self._check_not_frozen()

    def _check_not_frozen(self) -> None:
        if self._account.frozen is not None:
            raise PolicyRefused(
                "a person at the site has frozen its ledger: nothing is charged or answered",
                todo="ask the site",
            )

    def backup(self, to: Path, key: bool = False) -> None:
        """Copy entries and salt consistently into the new folder `to`. key: whether to copy the
        private key as well.
        Errors: LedgerError, also if `to` already holds a ledger."""
        from fedtune.core.ledger.restore import backup

        with self._store.writing():
            backup(self.folder, to, key)

    def copy_entries(self, to: Path) -> None:
        """Copy the entries consistently into the new database `to`, without the salt and without
        the members' hashes, whose number would reveal how many records there are. The copy shows
        every charge and signature, but is no backup. Errors: LedgerError."""
        from fedtune.core.ledger.restore import copy_entries

        with self._store.writing():
            copy_entries(self.folder, to)

    @classmethod
    def restore(
        cls,
        folder: Path,
        from_: Path | None = None,
        standing: Callable[[str], Standing] | None = None,
        noted: Any = None,
    ) -> Ledger:
        """Restore the ledger in `folder`, and return it. Charges that may have been lost count as
        spent.

        - folder: the ledger's folder
        - from_: the folder of a backup; None: only the files that are left are used
        - standing: called with the site's public key; returns the decisions of people that the
          ledger must hold before it is put in place. None: none are entered again
        - noted: what this machine noted of the ledger's newest entry (`accept_noted`); None:
          nothing"""
        from fedtune.core.ledger.restore import restore

        restore(folder, from_, standing, noted)
        return cls(folder)

    def _read(self) -> Head:
        with self._store.writing():
            return self._store.head

    def _salt_member(self, member: bytes) -> bytes:
        return hmac.digest(self._store.salt, member, "sha256")

    def path_of(self, slot: Slot) -> Path:
        """Return the path of the file for the update of a slot (study, round, adapter), whether or
        not the file exists."""
        study, round_, adapter = slot
        outbox = self.folder / OUTBOX
        new = outbox / f"{outbox_name(study)}-{round_}-{outbox_name(adapter)}.bin"
        old = outbox / f"{outbox_prefix(study)}-{round_}-{outbox_prefix(adapter)}.bin"
        return newer_name(new, old)

    def _store_bytes(self, slot: Slot, update: bytes) -> None:
        """Write an update to the file of its slot, in the folder outbox. If there is no space, keep
        the update in memory, in place of an earlier update of the same study. slot: the (study,
        round, adapter) for which the update is the answer."""
        path, kept = self.path_of(slot), (slot, update)
        if self._room is None or self._room.has_space(len(update)):
            try:
                replace(path, update, private=True)
                self._unstored.pop(slot[0], None)
                return
            except InfrastructureError as error:
                log.warning("%s", error)
        with suppress(OSError):  # of an earlier release of this round
            path.unlink()
        self._unstored[slot[0]] = kept
        log.warning(
            "%s: the disk has no room for an update, which is kept in memory; if this process ends "
            "before the coordinator has it, the round is trained and charged again; to do: free "
            "space",
            self.folder,
        )

    def _list_stored(self, study: str) -> list[Path]:
        """Return the paths of a study's files in the outbox, under the names of this release and of
        earlier ones. study: the plan's digest."""
        names = f"{outbox_name(study)}-*.bin", f"{outbox_prefix(study)}-*.bin"
        return [path for name in names for path in (self.folder / OUTBOX).glob(name)]

    def _to_keep(self, slot: Slot) -> set[Path]:
        """Return the paths of the updates of a plan that stay when the update of `slot` is stored:
        that of `slot` itself, and the newest released update of each other membership of the
        hospital. slot: (study, round, adapter), which names one update."""
        newest = {owner_of(other): other for other in self._account.released if other[0] == slot[0]}
        return {self.path_of(kept) for kept in (newest | {owner_of(slot): slot}).values()}

    def _released_bytes(self, slot: Slot) -> bytes | None:
        if (sha256 := self._account.sent.get(slot)) is None:
            return None
        path, (unstored, content) = self.path_of(slot), self._unstored.get(slot[0], (None, b""))
        if path.exists():
            with named(self.folder):
                content = path.read_bytes()
        elif unstored != slot:
            return None
        return content if hashlib.sha256(content).hexdigest() == sha256 else None

    def _check_members(self, writer: Transaction) -> None:
        check_members(self.folder / DATABASE, writer, self._account.members)


def signing_key(site: Site, ledger: Ledger) -> SigningKey:
    """Return the key with which a site signs what leaves it: the ledger's key or, for a membership
    of a hospital, its own key, so that two coordinators do not see that they know one hospital.

    Errors: InfrastructureError."""
    return SigningKey.at(site.site.state / KEY) if site.hospital else ledger.key


def _refuses(permit: Permit, charges: list[Charge]) -> bool:
    try:
        permit(charges)
    except Refused:
        return True
    return False


def _is_entered(paid: Reservation, earlier: Earlier) -> bool:
    """Return whether a charge of this ledger is the one of an earlier ledger. Two branches of that
    ledger may have like charges; they are of different entries."""
    is_same = not paid.origin or paid.origin == earlier.origin  # an earlier release entered none
    return (paid.charge, paid.adapter) == (earlier.charge, earlier.adapter) and is_same


def _reservation(dataset: str, charge: Charge, adapter: str) -> dict[str, Any]:
    """Build the body of an entry that charges `dataset` with a round: a dict for JSON. adapter: the
    digest of the adapter from which the round starts, with the number of the attempt and the
    membership if there are any."""
    entry = {"dataset": dataset, "charge": charge.fields(), "adapter": adapter}
    beside = {"membership": charge.membership, "patient": charge.patient}
    return entry | {key: value for key, value in beside.items() if value}


def _withdrawal(
    unit: str, columns: Collection[str], since: int | None = None
) -> dict[str, str | int | list[str]]:
    """Build the body of an entry that a unit withdrew. unit: the hash of its key. columns: the
    columns that told patients apart; none if not known. since: when the unit withdrew, in UTC
    seconds; None: now."""
    entry: dict[str, str | int | list[str]] = {"unit": unit}
    if since is not None:
        entry["since"] = since
    return entry | ({"known_by": sorted(columns)} if columns else {})


def _with_column(
    declared: Mapping[str, Any], dataset: str, columns: Mapping[str, str] | None
) -> dict[str, str]:
    """Return the field of a declaration that names the column of patients. It is left out if the
    dataset never had one, so that the entry has the same fields as in earlier releases.

    - declared: the dataset's last declaration; {} if there is none
    - columns: the column of patients of each dataset now; None: it stays as it was"""
    stays = declared.get("patient", "")
    column = stays if columns is None else columns.get(dataset, "")
    return {"patient": column} if column or "patient" in declared else {}
