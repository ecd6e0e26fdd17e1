"""The site's privacy ledger: what was spent on which dataset, before it is spent.

Guarantee: a reservation is on disk before `reserve` returns, and counts from then on, released or
not; an update that left the site has an entry, and its bytes can be sent again but never trained
again for free. Whatever goes wrong charges more, never less: a crash between reservation and
release, a restore, a name that turns out to hold another's patients.

What counts against a dataset: its own charges and those of every other dataset of the site, except
datasets that were declared disjoint (by either). Two that were first composed and later declared
disjoint bear what either had spent until then. All of that follows from what a person at the site
declares, never from a record. A patient whose key is in both is left out of the later one
(`elsewhere`).
| σ = 0 (a study without privacy)   | charged as σ = 0: the dataset's ε is infinite               |
| a reservation that is asked again | is charged again                                            |
| a charge against a neighbour      | is permitted only if the neighbour may bear it too          |
Who arrived later bears less (`cohorts`): of the dataset's own charges those after the arrival, but
for rounds that left the cohort out; of every other charge all.
| a unit known before arrivals were kept | arrived with the first charge |
A charge that an earlier release made (`Charge.rules`), or one for another unit, says nothing about
what a unit spent: `unknown` lists those that nobody at the site has accepted.
The database and its chain: chain.py; anchor and receipts: files.py; restore: restore.py.
Errors: LedgerError (exit code 4); BudgetExceeded and other refusals come from `permit`.
Reference: Rogers et al. 2016 and Feldman & Zrnic 2021 (privacy filters, which `permit` applies).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.errors import Refused
from fedtune.files.writing import replace
from fedtune.ledger.account import Account
from fedtune.ledger.chain import Database, Transaction, check_members, named
from fedtune.ledger.entries import EVERY, RULES, Accepted, Charge, Cohort, Permit, Spent
from fedtune.ledger.files import (
    DATABASE,
    OUTBOX,
    RECEIPT,
    Head,
    LedgerError,
    Receipt,
    head_in,
    opened_token,
    outbox_prefix,
    sealed_token,
)
from fedtune.wire.keys import SigningKey, canonical, verifies

__all__ = [
    "EVERY",
    "RULES",
    "Accepted",
    "Charge",
    "Cohort",
    "Head",
    "Ledger",
    "LedgerError",
    "Spent",
]


class Ledger:
    """The ledger in `folder`, begun on first use. One object may serve several threads, and several
    processes may open one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._account = Account()
        self._store = Database(folder, self._account.fold)
        with self._store.writing() as writer:
            self._check_members(writer)

    @property
    def key(self) -> SigningKey:
        return self._store.key

    @property
    def head(self) -> Head:
        return self._read()

    def verify(self) -> None:
        """Read all of it again, with every signature. Errors: LedgerError."""
        self._store.verify()
        with self._store.writing() as writer:
            self._check_members(writer)

    def declare(
        self,
        dataset: str,
        disjoint_from: Iterable[str],
        content_hash: str | None = None,
        members: Iterable[bytes] = (),
        cohort: str = "first",
        keys: Iterable[bytes] | None = None,
    ) -> None:
        """Sign what `dataset` is: the others it shares no patient with, its content's hash, and its
        members (patient keys, record bytes), of which only salted hashes are kept.

        Cheap where nothing changed; a member that was ever in the dataset stays its member; without
        a content hash, content and cohort stay as they were. keys: of each unit, where arrivals are
        kept. A key that was never a member arrives now, in a cohort of all such keys; whatever the
        unit's records are, and whoever else has the same."""
        hashes = sorted({self._salted(member) for member in members})
        with self._store.writing() as writer:
            known = self._account.declared.get(dataset, {})
            arrival = None
            if keys is not None:
                here = [self._salted(key) for key in keys]
                arrival = self._account.arrivals.entry(dataset, writer.hashes(dataset), here)
            writer.add_members(dataset, hashes)
            body: dict[str, Any] = {
                "dataset": dataset,
                "disjoint_from": sorted(set(disjoint_from)),
                "content": known.get("content", "") if content_hash is None else content_hash,
                "cohort": known.get("cohort", cohort) if content_hash is None else cohort,
                "members": writer.members(dataset),
            }
            if body != known:
                writer.append("declare", body)
            if arrival:
                writer.append("arrive", {**arrival, "cohort": cohort})

    def holds(self, dataset: str, member: bytes) -> bool:
        """Whether `member` was ever declared as the dataset's."""
        return self.known(dataset)(member)

    def known(self, dataset: str) -> Callable[[bytes], bool]:
        """Build a test of whether a member was ever declared as the dataset's, as it stands now."""
        with self._store.writing() as writer:
            hashes = writer.hashes(dataset)
        return lambda member: self._salted(member) in hashes

    def elsewhere(self, dataset: str) -> Callable[[bytes], bool]:
        """Build a test of whether a dataset disjoint from `dataset` has a patient's key: who is in
        both takes part where the key was first, or, declared so afterwards, nowhere."""
        with self._store.writing() as writer:
            names = [
                name for name in self._account.declared if self._account.disjoint(dataset, name)
            ]
            hashes = set().union(*(writer.hashes(name) for name in names))
        return lambda key: self._salted(key) in hashes

    @property
    def disjoint(self) -> list[tuple[str, str]]:
        """The pairs of datasets that are declared to share no patient."""
        self._read()
        return sorted((min(pair), max(pair)) for pair in self._account.apart_since)

    def overlap(self, one: str, other: str) -> int:
        """How many members the two datasets were ever seen to share: patients, records, files and
        longer texts. For a person at the site; nothing else follows from it."""
        with self._store.writing() as writer:
            return writer.overlap(one, other)

    def unknown(self, dataset: str, unit: str) -> list[Spent]:
        """Charges against `dataset` of which nobody knows what they cost one `unit`, and that
        nobody at the site accepted."""
        upto = max((one.upto for one in self.accepted(dataset)), default=-1)
        spending = self.spending(dataset)
        return [s for s in spending if s.seq > upto and not s.charge.known(unit)]

    def accepted(self, dataset: str) -> list[Accepted]:
        """Who accepted that what was charged until then is not known, oldest first."""
        self._read()
        return list(self._account.accepted.get(dataset, []))

    def accept(self, dataset: str, who: str, reason: str = "") -> None:
        """Enter that a person at the site knows that what was spent on `dataset` until now is not
        known, and goes on."""
        with self._store.writing() as writer:
            upto = self._store.head.seq
            writer.append("accept", {"dataset": dataset, "upto": upto, "by": who, "why": reason})

    def charges(self, dataset: str) -> list[Charge]:
        """Everything that counts against `dataset`, oldest first."""
        return [spent.charge for spent in self.spending(dataset)]

    def spending(self, dataset: str | None = None) -> list[Spent]:
        """Everything that counts against `dataset`, with entry, time and release; None: all of
        it."""
        with self._store.writing():
            return self._account.spent() if dataset is None else self._account.against(dataset)

    def cohorts(self, dataset: str) -> list[Cohort]:
        """The units of `dataset` by arrival, oldest first; with no arrival known, one cohort."""
        with self._store.writing():
            return self._account.cohorts(dataset)

    def newcomer(self, dataset: str) -> list[Charge]:
        """What would count against a unit that arrives now."""
        with self._store.writing():
            return self._account.newcomer(dataset)

    def arrival(self, dataset: str) -> Callable[[bytes], int]:
        """Build a lookup from a unit's key to the arrival of its cohort."""
        self._read()
        return lambda key: self._account.arrivals.of(dataset, self.hashed(key))

    @property
    def datasets(self) -> list[str]:
        """Every name that was declared here."""
        self._read()
        return sorted(self._account.declared)

    def reserve(self, dataset: str, charge: Charge, adapter: str, permit: Permit) -> int:
        """Charge `dataset` with one round from the adapter of digest `adapter`, if `permit` allows.

        `permit` gets all charges that count against a dataset, without the new one, and raises
        to refuse. It is asked for `dataset` and for every other that the charge would count
        against, while others wait; it must not call this ledger. Returns the reservation's number.
        Errors: what `permit` raises (nothing is charged); LedgerError."""
        with self._store.writing() as writer:
            if dataset not in self._account.declared:
                raise LedgerError(f"{self.folder}: dataset {dataset!r} was never declared")
            asked: list[list[int]] = []
            for other in sorted(self._account.declared, key=lambda name: (name != dataset, name)):
                if self._account.disjoint(dataset, other):
                    continue
                spent = self._account.against(other)
                entries = [s.seq for s in spent]
                if entries not in asked:
                    asked.append(entries)
                    permit([s.charge for s in spent])
            body = {"dataset": dataset, "charge": asdict(charge), "adapter": adapter}
            return writer.append("reserve", body)

    def reserve_for(
        self, dataset: str, charge: Charge, adapter: str, permit: Permit
    ) -> tuple[int, frozenset[int]]:
        """Charge the units of `dataset` whom `permit` allows with one round, cohort by cohort: a
        cohort that it refuses is left out of the round and pays nothing for it. Returns the
        reservation's number and the arrivals of who is out.

        Guarantee: who is out follows from public charges, the policy and the time of arrival, never
        from a record; and the charge is made even where nobody is left.
        Errors: what `permit` raises for a newcomer, or for another dataset; LedgerError."""
        with self._store.writing() as writer:
            if dataset not in self._account.declared:
                raise LedgerError(f"{self.folder}: dataset {dataset!r} was never declared")
            permit(self._account.newcomer(dataset))
            for other in sorted(set(self._account.declared) - {dataset}):
                if not self._account.disjoint(dataset, other):
                    permit([spent.charge for spent in self._account.against(other)])
            out = set()
            for cohort in self._account.cohorts(dataset):
                try:
                    permit(cohort.charges)
                except Refused:
                    out.add(cohort.arrival)
            body = {"dataset": dataset, "charge": asdict(charge), "adapter": adapter}
            return writer.append("reserve", {**body, "out": sorted(out)}), frozenset(out)

    def release(self, reservation: int, body: bytes) -> None:
        """Keep an update's bytes, then enter that it may be sent. Send it only afterwards.

        Errors: LedgerError where the reservation is unknown or used, or another process released
        this round first (send what `released` gives)."""
        with self._store.writing() as writer:
            held = self._account.reserved.get(reservation)
            if held is None or reservation in self._account.done:
                raise LedgerError(f"{self.folder}: entry {reservation} is not an open reservation")
            if self._kept(held.slot) is not None:
                raise LedgerError(
                    f"{self.folder}: round {held.charge.round} was released by another process",
                    todo="nothing: it is sent again as it was released",
                )
            replace(self._path(held.slot), body, private=True)
            kept = hashlib.sha256(body).hexdigest()
            writer.append("release", {"reservation": reservation, "sha256": kept})

    def released(self, study: str, round_: int, adapter: str) -> bytes | None:
        """The bytes released for this round and adapter, or None.

        Bytes that are gone or altered are None too: the round is then reserved, and paid, again."""
        self._read()
        return self._kept((study, round_, adapter))

    def head_statement(self) -> dict[str, Any]:
        """{token}: the newest entry, signed, for the coordinator to countersign; opaque to it."""
        return {"token": sealed_token(self.key, self._store.statement(self._read()))}

    def accept_receipt(self, receipt: Mapping[str, Any], coordinator_public: str) -> None:
        """Check a countersigned head against this ledger, and keep it if it is the newest.

        Errors: LedgerError where it is not a receipt of this site by that coordinator (ignored),
        or where the ledger lacks the entry: it was rolled back, and reserves nothing from now on,
        in any process, until it is restored."""
        token = {"token": receipt.get("token")}
        said = opened_token(self.key, token["token"])
        head = head_in(said, self.key.public)
        counter = str(receipt.get("countersignature"))
        if (
            head is None
            or receipt.get("coordinator") != coordinator_public
            or not verifies(coordinator_public, b"fedtune receipt\0" + canonical(token), counter)
        ):
            raise LedgerError(
                "the coordinator's receipt is not one for this site's ledger",
                expected="a head that this site signed, countersigned by the coordinator",
                todo="run the round again; if it comes back, the coordinator is not the one "
                "that sent the plan",
            )
        with self._store.writing() as writer:
            receipts = self._store.check_receipts(writer.sql)
            new = Receipt(coordinator_public, head, str(said["signature"]))
            after = receipts.plus(new, self._store.knows(writer.sql, new.head))
            if after != receipts:
                replace(self.folder / RECEIPT, after.packed, private=True)
            self._store.check_receipts(writer.sql)  # as every transaction does from now on

    def prune(self, study: str, coordinator_public: str) -> None:
        """Remove the bytes of every round of `study` before the newest that the coordinator gave a
        receipt for: it counts a round only after all earlier ones.

        Who asks for one of them all the same is answered as for any bytes that are gone: the round
        is reserved, and paid, again."""
        with self._store.writing() as writer:
            accepted = self._store.check_receipts(writer.sql).accepted
            heads = [r.head.seq for r in accepted if r.coordinator == coordinator_public]
            upto = max(heads, default=-1)
            mine = [slot for slot in self._account.sent if slot[0] == study]
            counted = max(
                (slot[1] for slot in mine if self._account.released[slot] <= upto), default=0
            )
            for slot in mine:
                if slot[1] < counted:
                    self._path(slot).unlink(missing_ok=True)

    def hashed(self, unit_key: bytes) -> str:
        """The salted hash of a unit's key; means nothing outside this site."""
        return self._salted(unit_key).hex()

    def withdraw(self, unit_key: bytes) -> None:
        """Enter that a unit's consent was withdrawn. Charges stay: what was released stays out."""
        with self._store.writing() as writer:
            if self.hashed(unit_key) not in self._account.withdrawn:
                writer.append("withdraw", {"unit": self.hashed(unit_key)})

    def withdrawn(self) -> set[str]:
        self._read()
        return set(self._account.withdrawn)

    def admit(self, plan_digest: str, who: str) -> None:
        """Enter that a person at the site agreed to a plan."""
        with self._store.writing() as writer:
            if plan_digest not in self._account.admitted:
                writer.append("admit", {"plan": plan_digest, "by": who})

    def admitted(self, plan_digest: str) -> bool:
        self._read()
        return plan_digest in self._account.admitted

    def backup(self, to: Path, key: bool = False) -> None:
        """A consistent copy of entries and salt in the new folder `to`; with the private key only
        where asked. Errors: LedgerError, also where `to` already holds a ledger."""
        from fedtune.ledger.restore import backup

        with self._store.writing():
            backup(self.folder, to, key)

    @classmethod
    def restore(cls, folder: Path, from_: Path | None = None) -> Ledger:
        """Begin again from a backup (or from what is left), charging what is lost as spent."""
        from fedtune.ledger.restore import restore

        restore(folder, from_)
        return cls(folder)

    def _read(self) -> Head:
        with self._store.writing():
            return self._store.head

    def _salted(self, member: bytes) -> bytes:
        return hmac.digest(self._store.salt, member, "sha256")

    def _path(self, slot: tuple[str, int, str]) -> Path:
        study, round_, adapter = slot
        name = f"{outbox_prefix(study)}-{round_}-{outbox_prefix(adapter)}.bin"
        return self.folder / OUTBOX / name

    def _kept(self, slot: tuple[str, int, str]) -> bytes | None:
        path, sha256 = self._path(slot), self._account.sent.get(slot)
        if sha256 is None or not path.exists():
            return None
        with named(self.folder):
            body = path.read_bytes()
        return body if hashlib.sha256(body).hexdigest() == sha256 else None

    def _check_members(self, writer: Transaction) -> None:
        members = {name: body["members"] for name, body in self._account.declared.items()}
        check_members(self.folder / DATABASE, writer, members)
