"""What a ledger's verified entries add up to, in memory: charges, cohorts, declarations.

Nothing here reads or writes a file; ledger.py does, and folds every entry in once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedtune.ledger.chain import Entry
from fedtune.ledger.cohorts import Arrivals
from fedtune.ledger.entries import EVERY, Accepted, Charge, Cohort, Spent


@dataclass(frozen=True)
class Reservation:
    dataset: str
    charge: Charge
    adapter: str
    time: int
    out: frozenset[int] = frozenset()  # the cohorts that the round leaves out

    @property
    def slot(self) -> tuple[str, int, str]:
        """What may leave the site once."""
        return self.charge.study, self.charge.round, self.adapter


class Account:
    """The entries so far, folded in by `fold`, oldest first. Keys of `reserved` are entries."""

    def __init__(self) -> None:
        self.declared: dict[str, dict[str, Any]] = {}
        self.reserved: dict[int, Reservation] = {}
        self.restored: list[tuple[int, Charge, int]] = []
        self.sent: dict[tuple[str, int, str], str] = {}  # slot -> sha256 of the newest release
        self.released: dict[tuple[str, int, str], int] = {}  # slot -> entry of that release
        self.done: set[int] = set()  # released reservations
        self.withdrawn: set[str] = set()
        self.admitted: dict[str, str] = {}
        self.accepted: dict[str, list[Accepted]] = {}  # by dataset
        # Datasets that are disjoint now: the entry before which they bore each other's charges.
        self.apart_since: dict[frozenset[str], int] = {}
        self.arrivals = Arrivals()

    def fold(self, entry: Entry) -> None:
        """Take one verified entry into account."""
        body, time = entry.body, entry.body.get("time", 0)
        if entry.kind == "declare":
            self._separate(entry.seq, body)
            self.declared[body["dataset"]] = {k: v for k, v in body.items() if k != "time"}
        elif entry.kind == "reserve":
            charge, out = Charge.read(body["charge"]), frozenset(body.get("out", ()))
            what = body["dataset"], charge, body["adapter"]
            self.reserved[entry.seq] = Reservation(*what, time, out)
        elif entry.kind == "arrive":
            self.arrivals.fold(entry)
        elif entry.kind == "release":
            self.done.add(body["reservation"])
            slot = self.reserved[body["reservation"]].slot
            self.sent[slot], self.released[slot] = body["sha256"], entry.seq
        elif entry.kind == "restore":
            self.restored += [(entry.seq, Charge.read(c), time) for c in body["charges"]]
        elif entry.kind == "withdraw":
            self.withdrawn.add(body["unit"])
        elif entry.kind == "admit":
            self.admitted[body["plan"]] = body["by"]
        elif entry.kind == "accept":
            one = Accepted(body["upto"], body["by"], body["why"], time)
            self.accepted.setdefault(body["dataset"], []).append(one)
        elif entry.kind != "open":
            raise KeyError(entry.kind)  # what it charges is not known here

    def disjoint(self, one: str, other: str) -> bool:
        """Whether the two are declared disjoint, as they stand now."""
        return frozenset((one, other)) in self.apart_since

    def against(self, dataset: str) -> list[Spent]:
        """All that counts against `dataset`, oldest first."""
        return [spent for spent in self.spent() if self._counts(spent, dataset)]

    def _counts(self, spent: Spent, dataset: str) -> bool:
        since = self.apart_since.get(frozenset((spent.dataset, dataset)))
        return since is None or spent.seq < since

    def spent(self) -> list[Spent]:
        rows = [
            Spent(seq, "reserve", r.dataset, r.charge, r.adapter, r.time, seq in self.done)
            for seq, r in self.reserved.items()
        ]
        rows += [Spent(seq, "restore", EVERY, c, "", at, True) for seq, c, at in self.restored]
        return sorted(rows, key=lambda row: row.seq)

    def cohorts(self, dataset: str) -> list[Cohort]:
        spent = self.against(dataset)
        return [
            Cohort(seq, *arrival, [s for s in spent if s.dataset != dataset or self._bears(s, seq)])
            for seq, arrival in self.arrivals.cohorts(dataset).items()
        ]

    def _bears(self, spent: Spent, arrival: int) -> bool:
        """Whether who arrived with entry `arrival` took part in that round of their dataset."""
        return spent.seq > arrival and arrival not in self.reserved[spent.seq].out

    def newcomer(self, dataset: str) -> list[Charge]:
        return [spent.charge for spent in self.against(dataset) if spent.dataset != dataset]

    def _separate(self, seq: int, body: Mapping[str, Any]) -> None:
        """Take a declaration into account: which datasets are disjoint from now on, and whether
        they were one until now."""
        dataset, new = body["dataset"], body["dataset"] not in self.declared
        for other, about in self.declared.items():
            pair = frozenset((dataset, other))
            if other == dataset:
                continue
            if other not in body["disjoint_from"] and dataset not in about["disjoint_from"]:
                self.apart_since.pop(pair, None)
            elif pair not in self.apart_since:
                self.apart_since[pair] = 0 if new else seq
