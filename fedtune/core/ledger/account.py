"""Derive the present state of a ledger from its entries: charges, cohorts of units and
declarations.

This module reads and writes no file. ledger.py does both, and passes every entry to `fold` once,
after the entry was verified."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedtune.core.ledger.chain import Entry, list_charged_entries
from fedtune.core.ledger.cohorts import Arrivals
from fedtune.core.ledger.entries import (
    EVERY,
    LOST,
    Accepted,
    Charge,
    Cohort,
    Freeze,
    Held,
    Slot,
    Spent,
)

NOT_PRIVATE = "\0"  # before the name under which a declared dataset's members are stored


@dataclass(frozen=True)
class Reservation:
    dataset: str
    charge: Charge
    adapter: str
    time: int
    hash: str = ""  # of its entry
    out: frozenset[int] = frozenset()  # the cohorts that the round leaves out
    origin: str = ""  # the hash of its entry in an adopted ledger

    @property
    def slot(self) -> Slot:
        return self.charge.study, self.charge.round, self.adapter


class Account:
    """What all entries of a ledger amount to. `fold` takes the entries one by one, oldest first.

    The fields, in the code below, hold what is known after the last entry. The keys of `reserved`
    are the sequence numbers of entries of the kind "reserve", each of which charges a round. A slot
    names one update: (study, round, adapter)."""

    def __init__(self) -> None:
        self.declared: dict[str, dict[str, Any]] = {}
        self.patients: dict[str, str] = {}  # dataset -> its column of patients; "" for none
        self.all_columns: dict[str, list[str]] = {}  # dataset -> each column it had, oldest first
        self.reserved: dict[int, Reservation] = {}
        self.restored: list[Spent] = []
        self.ended: set[str] = set()  # plans that had begun when a restore lost entries
        # The hash of each entry, here, in an adopted ledger or lost, that is charged by itself,
        # as the step log names it -> how many steps are charged for it.
        self.charged_entries: dict[str, int] = {}
        self.sent: dict[Slot, str] = {}  # slot -> sha256 of the newest release
        self.released: dict[Slot, int] = {}  # slot -> entry of that release
        self.done: set[int] = set()  # released reservations
        self.held: dict[int, Held] = {}  # by the number of the release's entry
        # What a person at the site let go: a slot, and the sha256 of its bytes, or "" for a draw of
        # shared noise, which is let go before it is made.
        self.let_go: set[tuple[Slot, str]] = set()
        self.refused: set[Slot] = set()  # slots that a person refused for good
        self.withdrawn: dict[str, Entry] = {}  # hash of a unit's key -> the entry of its withdrawal
        # hash of a unit's key -> the columns of patients when it withdrew; none if not known
        self.withdrawn_by: dict[str, frozenset[str]] = {}
        self.admitted: dict[tuple[str, str], str] = {}  # (plan, membership) -> login
        self.accepted: dict[str, list[Accepted]] = {}  # by dataset
        self.not_private: dict[str, str] = {}  # dataset -> "public" or "generated"
        self.not_private_members: dict[str, str] = {}  # dataset, marked -> digest of its members
        # Dataset -> its newest declaration's entry; EVERY -> the newest restore that may have lost
        # one.
        self.not_private_since: dict[str, int] = {}
        self.members_lost = 0  # when a restore last may have lost members, in UTC seconds; 0: never
        # A pair of disjoint datasets -> the entry up to which charges count against both; 0: none.
        self.apart_since: dict[frozenset[str], int] = {}
        self.arrivals = Arrivals()
        self.frozen: Freeze | None = None

    def fold(self, entry: Entry) -> None:
        """Take one more entry, verified, into account. Errors: KeyError if the entry's kind is not
        known."""
        body, time = entry.body, entry.body.get("time", 0)
        self.charged_entries |= list_charged_entries(entry)
        if entry.kind == "declare":
            self._update_disjoint(entry.seq, body)
            self.declared[body["dataset"]] = {k: v for k, v in body.items() if k != "time"}
            column = body.get("patient", "")
            self.patients[body["dataset"]] = column
            self._remember_columns({body["dataset"]: [column]})
        elif entry.kind == "reserve":
            beside = body.get("membership", ""), body.get("patient", "")
            charge = Charge.read(body["charge"], *beside)
            if body["dataset"] == EVERY:  # of a restore of an adopted ledger
                charge = replace(charge, restored=True)
            out = frozenset(body.get("out", ()))
            self.reserved[entry.seq] = Reservation(
                dataset=body["dataset"],
                charge=charge,
                adapter=body["adapter"],
                time=time,
                hash=entry.hash,
                out=out,
                origin=body.get("origin", ""),
            )
            self.ended |= {plan for plan, _ in body.get("plans", ())}  # by an earlier release
        elif entry.kind == "end":  # of an adopted ledger
            self.ended |= {plan for plan, _ in body["plans"]}
        elif entry.kind == "arrive":
            self.arrivals.fold(entry)
        elif entry.kind == "release":
            self.done.add(body["reservation"])
            slot = self.reserved[body["reservation"]].slot
            self.sent[slot], self.released[slot] = body["sha256"], entry.seq
        elif entry.kind == "hold":
            paid = self.reserved[body["reservation"]]
            self.held[body["release"]] = Held(paid.charge, paid.adapter, body["bytes"], time)
        elif entry.kind == "let-go":
            self.let_go.add((_slot(body), body["sha256"]))
        elif entry.kind == "refuse":
            self.refused.add(_slot(body))
        elif entry.kind == "restore":
            charges = [Charge.read(fields, EVERY) for fields in body["charges"]]
            self.restored += [
                Spent(entry.seq, "restore", EVERY, charge, "", time, True, place=place)
                for place, charge in enumerate(charges)
            ]
            self._remember_columns(body.get("columns", {}))
            if charges or body.get("members_lost"):
                self._end_plans(plan for plan, _ in body.get("plans", ()))
                self.not_private_since[EVERY], self.members_lost = entry.seq, time
        elif entry.kind == "withdraw":
            unit, columns = body["unit"], frozenset(body.get("known_by", ()))
            self.withdrawn.setdefault(unit, entry)  # a later one adds columns alone
            self.withdrawn_by[unit] = self.withdrawn_by.get(unit, frozenset()) | columns
        elif entry.kind == "admit":
            self.admitted[body["plan"], body.get("membership", "")] = body["by"]
        elif entry.kind == "accept":
            about = body.get("patients"), body.get("declared"), body.get("against")
            acceptance = Accepted(body["upto"], body["by"], body["why"], time, *about)
            self.accepted.setdefault(body["dataset"], []).append(acceptance)
        elif entry.kind == "freeze":
            self.frozen = Freeze(body["by"], body["why"], time)
        elif entry.kind == "lift":
            self.frozen = None
        elif entry.kind == "declaration":
            self.not_private[body["dataset"]] = body["what"]
            self.not_private_since[body["dataset"]] = entry.seq
            if "members" in body:
                self.not_private_members[NOT_PRIVATE + body["dataset"]] = body["members"]
        elif entry.kind != "open":
            raise KeyError(entry.kind)  # a kind of a newer release: it may hold a charge

    def _end_plans(self, named: Iterable[str]) -> None:
        """End every plan that was charged or signed so far, since a restore may have lost rounds of
        it. named: further plans, which only the restore's entry names."""
        paid = {spent.charge.study for spent in self.spent()}
        self.ended |= {*paid, *(plan for plan, _ in self.admitted), *named} - {LOST}

    def _remember_columns(self, columns: Mapping[str, Iterable[str]]) -> None:
        """Add columns of patients to those that each dataset had. columns: dataset's name -> names
        of its columns, oldest first; "" for none."""
        for dataset, names in columns.items():
            known = self.all_columns.setdefault(dataset, [])
            known += [name for name in dict.fromkeys(names) if name and name not in known]

    def list_columns(self) -> dict[str, list[str]]:
        """List the columns of patients that datasets ever had, as `Ledger.patient_columns` does."""
        had = {name: list(columns) for name, columns in self.all_columns.items() if columns}
        for spent in self.spent():
            # Not those of a restore or an adopted ledger: what they had for a column is remembered
            # beside them, by the name of a dataset from which others can be disjoint.
            if spent.charge.unit == "patient" and spent.dataset in self.declared:
                named = [spent.charge.patient] if spent.charge.patient else []
                had.setdefault(spent.dataset, named)
        return had

    @property
    def members(self) -> dict[str, str]:
        """The digest of each dataset's members, i.e. the hashed identifiers of its patients and
        records, by the name under which they are stored. This is the dataset's name or, for members
        of a dataset that was declared public or generated, NOT_PRIVATE and the name."""
        declared = {name: body["members"] for name, body in self.declared.items()}
        return declared | self.not_private_members

    def disjoint(self, first: str, second: str) -> bool:
        """Return whether it is declared, at present, that the two datasets have no patient or
        record in common."""
        return frozenset((first, second)) in self.apart_since

    def list_apart(self, dataset: str, disjoint_from: Collection[str]) -> list[str]:
        """List the datasets that will count as disjoint from `dataset` (no patient or record in
        common) if it declares `disjoint_from`. Two datasets are disjoint if either of them declares
        it: the other may have named `dataset` before."""
        return [
            other
            for other, declared in self.declared.items()
            if other != dataset and (other in disjoint_from or dataset in declared["disjoint_from"])
        ]

    def as_stated(
        self,
        dataset: str,
        apart: Mapping[str, Collection[str]],
        columns: Mapping[str, str],
        seq: int,
    ) -> Account:
        """Return what the entries will amount to once the site's files, as they are now, are
        declared for a charge to `dataset`. Nothing of this object is changed; the result is only to
        be read from.

        - apart: dataset's name -> the datasets from which the files declare it disjoint
        - columns: dataset's name -> its column of patients in the files
        - seq: the number that the next entry will have"""
        stated = copy.copy(self)
        stated.declared, stated.apart_since = dict(self.declared), dict(self.apart_since)
        for name in [*sorted({*self.declared} - {dataset}), dataset]:
            before = stated.declared.get(name, {"dataset": name, "members": ""})
            body = {**before, "disjoint_from": sorted(apart.get(name, ()))}
            if body != before:
                stated._update_disjoint(seq, body)
                stated.declared[name] = body
        stated.patients = {name: columns.get(name, "") for name in stated.declared}
        return stated

    def against(self, dataset: str, columns: Mapping[str, str] | None = None) -> list[Spent]:
        """List the charges that count against `dataset`, oldest first: its own, and those of every
        other dataset unless the two are declared disjoint (no patient or record in common). Of a
        disjoint dataset those charges count that were made before it was declared so. columns: the
        column of patients of each dataset that has one now; None: as declared."""
        now = self.patients if columns is None else columns
        counting = (spent for spent in self.spent() if self._counts(spent, dataset))
        return [self._with_columns(spent, dataset, now) for spent in counting]

    def _with_columns(self, spent: Spent, dataset: str, now: Mapping[str, str]) -> Spent:
        """Return a charge against `dataset` with two columns: the one that told patients apart in
        the charge's round, and the one that counts now. The latter is the column of the charge's
        own dataset or, if no table of the site has that dataset any more, that of `dataset`. now:
        the column that each dataset has now."""
        column_now = spent.find_column(now, dataset)
        return replace(spent, patient=self.column_of(spent), patient_now=column_now)

    def column_of(self, spent: Spent) -> str:
        """Return the column that told patients apart in a charge's round; "" if none did, or if it
        is not known.

        A charge that names no column was made by an earlier release. It counts as made by the first
        column with which its dataset was declared, if that dataset ever had one. For a charge that
        a restore entered, the column is never known."""
        if spent.charge.patient or spent.charge.unit == "record":
            return spent.charge.patient
        return next(iter(self.all_columns.get(spent.own_dataset, [])), "")

    def _counts(self, spent: Spent, dataset: str) -> bool:
        since = self.apart_since.get(frozenset((spent.dataset, dataset)))
        return since is None or spent.seq < since

    def spent(self) -> list[Spent]:
        rows = [
            Spent(seq, "reserve", r.dataset, r.charge, r.adapter, r.time, self._may_be_out(seq))
            for seq, r in self.reserved.items()
        ]
        return sorted([*rows, *self.restored], key=lambda row: row.number)

    def _may_be_out(self, seq: int) -> bool:
        """Return whether the update of a charged round may have left the site: it was released, or
        a restore may have lost the entry that says so. seq: the number of the charge's entry."""
        paid = self.reserved[seq]
        return seq in self.done or paid.dataset == EVERY or paid.charge.study in self.ended

    def cohorts(self, dataset: str) -> list[Cohort]:
        spent = self.against(dataset)
        return [
            Cohort(seq, *arrival, [s for s in spent if self._is_charged(s, dataset, seq)])
            for seq, arrival in self.arrivals.cohorts(dataset).items()
        ]

    def _is_charged(self, spent: Spent, dataset: str, arrival: int) -> bool:
        """Return whether a charge of `against` also counts against one cohort of `dataset`, i.e.
        against units that arrived together. These charges do:

        - a charge of another dataset
        - a charge that gives no ε for one patient (`Spent.is_known_for`), as one for records or for
          patients whom another column told apart: in it nobody is recognised by a key any more
        - a charge of `dataset` that was made after the units arrived, if its round did not leave
          them out

        arrival: the number of the entry with which the units arrived."""
        if self._counts_for_everybody(spent, dataset):
            return True
        return spent.seq > arrival and arrival not in self.reserved[spent.seq].out

    def newcomer(self, dataset: str) -> list[Charge]:
        spent = self.against(dataset)
        return [each.charge for each in spent if self._counts_for_everybody(each, dataset)]

    def _counts_for_everybody(self, spent: Spent, dataset: str) -> bool:
        return spent.dataset != dataset or not spent.is_known_for("patient")

    def _update_disjoint(self, seq: int, declaration: Mapping[str, Any]) -> None:
        """Update `apart_since` after a declaration of a dataset: which datasets are disjoint, and
        since which entry.

        - seq: the number of the declaration's entry
        - declaration: the fields of that entry"""
        dataset, new = declaration["dataset"], declaration["dataset"] not in self.declared
        apart = self.list_apart(dataset, declaration["disjoint_from"])
        for other in self.declared:
            pair = frozenset((dataset, other))
            if other == dataset:
                continue
            if other not in apart:
                self.apart_since.pop(pair, None)
            elif pair not in self.apart_since:
                self.apart_since[pair] = 0 if new else seq


def _slot(body: Mapping[str, Any]) -> Slot:
    return body["study"], body["round"], body["adapter"]
