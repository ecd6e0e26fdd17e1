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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import Refused
from fedtune.files.writing import replace
from fedtune.ledger.chain import Database, Entry, Transaction, check_members, named
from fedtune.ledger.cohorts import Arrivals
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


@dataclass(frozen=True)
class _Reservation:
    dataset: str
    charge: Charge
    adapter: str
    time: int
    out: frozenset[int] = frozenset()  # the cohorts that the round leaves out

    @property
    def slot(self) -> tuple[str, int, str]:
        """What may leave the site once."""
        return self.charge.study, self.charge.round, self.adapter


class Ledger:
    """The ledger in `folder`, begun on first use. One object may serve several threads, and several
    processes may open one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._declared: dict[str, dict[str, Any]] = {}
        self._reserved: dict[int, _Reservation] = {}
        self._restored: list[tuple[int, Charge, int]] = []
        self._sent: dict[tuple[str, int, str], str] = {}  # slot -> sha256 of the newest release
        self._released: dict[tuple[str, int, str], int] = {}  # slot -> entry of that release
        self._done: set[int] = set()  # released reservations
        self._withdrawn: set[str] = set()
        self._admitted: dict[str, str] = {}
        self._accepted: dict[str, list[Accepted]] = {}  # by dataset
        # Datasets that are disjoint now: the entry before which they bore each other's charges.
        self._apart_since: dict[frozenset[str], int] = {}
        self._arrivals = Arrivals()
        self._store = Database(folder, self._fold)
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

    # ------------------------------------------------------------------------------- datasets

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
            known = self._declared.get(dataset, {})
            arrival = None
            if keys is not None:
                here = [self._salted(key) for key in keys]
                arrival = self._arrivals.entry(dataset, writer.hashes(dataset), here)
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
        """The same as a test of many members, against the dataset as it is now."""
        with self._store.writing() as writer:
            hashes = writer.hashes(dataset)
        return lambda member: self._salted(member) in hashes

    def elsewhere(self, dataset: str) -> Callable[[bytes], bool]:
        """Of a patient's key, whether a dataset that shares no patient with `dataset` has it: who
        is in both takes part where the key was first, or, declared so afterwards, nowhere."""
        with self._store.writing() as writer:
            names = [name for name in self._declared if self._apart(dataset, name)]
            hashes = set().union(*(writer.hashes(name) for name in names))
        return lambda key: self._salted(key) in hashes

    @property
    def disjoint(self) -> list[tuple[str, str]]:
        """The pairs of datasets that are declared to share no patient."""
        self._read()
        return sorted((min(pair), max(pair)) for pair in self._apart_since)

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
        return list(self._accepted.get(dataset, []))

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
        """The same with entry, time and release; None: every charge in the ledger."""
        with self._store.writing():
            return self._spent() if dataset is None else self._against(dataset)

    def cohorts(self, dataset: str) -> list[Cohort]:
        """The units of `dataset` by arrival, oldest first; with no arrival known, one cohort."""
        with self._store.writing():
            return self._cohorts(dataset)

    def newcomer(self, dataset: str) -> list[Charge]:
        """What would count against a unit that arrives now."""
        with self._store.writing():
            return self._newcomer(dataset)

    def arrival(self, dataset: str) -> Callable[[bytes], int]:
        """Of a unit's key, the arrival of its cohort."""
        self._read()
        return lambda key: self._arrivals.of(dataset, self.hashed(key))

    @property
    def datasets(self) -> list[str]:
        """Every name that was declared here."""
        self._read()
        return sorted(self._declared)

    # ---------------------------------------------------------------------------------- rounds

    def reserve(self, dataset: str, charge: Charge, adapter: str, permit: Permit) -> int:
        """Charge `dataset` with one round from the adapter of digest `adapter`, if `permit` allows.

        `permit` gets all charges that count against a dataset, without the new one, and raises
        to refuse. It is asked for `dataset` and for every other that the charge would count
        against, while others wait; it must not call this ledger. Returns the reservation's number.
        Errors: what `permit` raises (nothing is charged); LedgerError."""
        with self._store.writing() as writer:
            if dataset not in self._declared:
                raise LedgerError(f"{self.folder}: dataset {dataset!r} was never declared")
            asked: list[list[int]] = []
            for other in sorted(self._declared, key=lambda name: (name != dataset, name)):
                if self._apart(dataset, other):
                    continue
                spent = self._against(other)
                entries = [s.seq for s in spent]
                if entries not in asked:
                    asked.append(entries)
                    permit([s.charge for s in spent])
            body = {"dataset": dataset, "charge": asdict(charge), "adapter": adapter}
            return writer.append("reserve", body)

    def reserve_for(
        self, dataset: str, charge: Charge, adapter: str, permit: Permit
    ) -> tuple[int, frozenset[int]]:
        """The same for those of the dataset whom `permit` allows: it is asked cohort by cohort, and
        a cohort that it refuses is left out of the round and pays nothing for it. Also returns the
        arrivals of who is out.

        Guarantee: who is out follows from public charges, the policy and the time of arrival, never
        from a record; and the charge is made even where nobody is left.
        Errors: what `permit` raises for a newcomer, or for another dataset; LedgerError."""
        with self._store.writing() as writer:
            if dataset not in self._declared:
                raise LedgerError(f"{self.folder}: dataset {dataset!r} was never declared")
            permit(self._newcomer(dataset))
            for other in sorted(set(self._declared) - {dataset}):
                if not self._apart(dataset, other):
                    permit([spent.charge for spent in self._against(other)])
            out = set()
            for cohort in self._cohorts(dataset):
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
            held = self._reserved.get(reservation)
            if held is None or reservation in self._done:
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

    # -------------------------------------------------------------------------------- receipts

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
            mine = [slot for slot in self._sent if slot[0] == study]
            counted = max((slot[1] for slot in mine if self._released[slot] <= upto), default=0)
            for slot in mine:
                if slot[1] < counted:
                    self._path(slot).unlink(missing_ok=True)

    # ------------------------------------------------------------------- consent and admission

    def hashed(self, unit_key: bytes) -> str:
        """The salted hash of a unit's key; means nothing outside this site."""
        return self._salted(unit_key).hex()

    def withdraw(self, unit_key: bytes) -> None:
        """Enter that a unit's consent was withdrawn. Charges stay: what was released stays out."""
        with self._store.writing() as writer:
            if self.hashed(unit_key) not in self._withdrawn:
                writer.append("withdraw", {"unit": self.hashed(unit_key)})

    def withdrawn(self) -> set[str]:
        self._read()
        return set(self._withdrawn)

    def admit(self, plan_digest: str, who: str) -> None:
        """Enter that a person at the site agreed to a plan."""
        with self._store.writing() as writer:
            if plan_digest not in self._admitted:
                writer.append("admit", {"plan": plan_digest, "by": who})

    def admitted(self, plan_digest: str) -> bool:
        self._read()
        return plan_digest in self._admitted

    # ---------------------------------------------------------------------- backup and restore

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

    # --------------------------------------------------------------------------------- helpers

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
        path, sha256 = self._path(slot), self._sent.get(slot)
        if sha256 is None or not path.exists():
            return None
        with named(self.folder):
            body = path.read_bytes()
        return body if hashlib.sha256(body).hexdigest() == sha256 else None

    def _apart(self, one: str, other: str) -> bool:
        """Whether the two are declared disjoint, as they stand now."""
        return frozenset((one, other)) in self._apart_since

    def _against(self, dataset: str) -> list[Spent]:
        """All that counts against `dataset`, oldest first."""
        return [spent for spent in self._spent() if self._counts(spent, dataset)]

    def _counts(self, spent: Spent, dataset: str) -> bool:
        since = self._apart_since.get(frozenset((spent.dataset, dataset)))
        return since is None or spent.seq < since

    def _spent(self) -> list[Spent]:
        rows = [
            Spent(seq, "reserve", r.dataset, r.charge, r.adapter, r.time, seq in self._done)
            for seq, r in self._reserved.items()
        ]
        rows += [Spent(seq, "restore", EVERY, c, "", at, True) for seq, c, at in self._restored]
        return sorted(rows, key=lambda row: row.seq)

    def _cohorts(self, dataset: str) -> list[Cohort]:
        spent = self._against(dataset)
        return [
            Cohort(seq, *arrival, [s for s in spent if s.dataset != dataset or self._bears(s, seq)])
            for seq, arrival in self._arrivals.cohorts(dataset).items()
        ]

    def _bears(self, spent: Spent, arrival: int) -> bool:
        """Whether who arrived with entry `arrival` took part in that round of their dataset."""
        return spent.seq > arrival and arrival not in self._reserved[spent.seq].out

    def _newcomer(self, dataset: str) -> list[Charge]:
        return [spent.charge for spent in self._against(dataset) if spent.dataset != dataset]

    def _separate(self, seq: int, body: Mapping[str, Any]) -> None:
        """Take a declaration into account: which datasets are disjoint from now on, and whether
        they were one until now."""
        dataset, new = body["dataset"], body["dataset"] not in self._declared
        for other, about in self._declared.items():
            pair = frozenset((dataset, other))
            if other == dataset:
                continue
            if other not in body["disjoint_from"] and dataset not in about["disjoint_from"]:
                self._apart_since.pop(pair, None)
            elif pair not in self._apart_since:
                self._apart_since[pair] = 0 if new else seq

    def _check_members(self, writer: Transaction) -> None:
        members = {name: body["members"] for name, body in self._declared.items()}
        check_members(self.folder / DATABASE, writer, members)

    def _fold(self, entry: Entry) -> None:
        """Take one verified entry into account."""
        body, time = entry.body, entry.body.get("time", 0)
        if entry.kind == "declare":
            self._separate(entry.seq, body)
            self._declared[body["dataset"]] = {k: v for k, v in body.items() if k != "time"}
        elif entry.kind == "reserve":
            charge, out = Charge.read(body["charge"]), frozenset(body.get("out", ()))
            what = body["dataset"], charge, body["adapter"]
            self._reserved[entry.seq] = _Reservation(*what, time, out)
        elif entry.kind == "arrive":
            self._arrivals.fold(entry)
        elif entry.kind == "release":
            self._done.add(body["reservation"])
            slot = self._reserved[body["reservation"]].slot
            self._sent[slot], self._released[slot] = body["sha256"], entry.seq
        elif entry.kind == "restore":
            self._restored += [(entry.seq, Charge.read(c), time) for c in body["charges"]]
        elif entry.kind == "withdraw":
            self._withdrawn.add(body["unit"])
        elif entry.kind == "admit":
            self._admitted[body["plan"]] = body["by"]
        elif entry.kind == "accept":
            one = Accepted(body["upto"], body["by"], body["why"], time)
            self._accepted.setdefault(body["dataset"], []).append(one)
        elif entry.kind != "open":
            raise KeyError(entry.kind)  # what it charges is not known here


def outbox_prefix(digest: str) -> str:
    """16 hexadecimal digits for a file name, whatever the digest is called."""
    tail = digest.rpartition(":")[2][:16]
    good = len(tail) == 16 and all(c in "0123456789abcdef" for c in tail)
    return tail if good else hashlib.sha256(digest.encode()).hexdigest()[:16]
