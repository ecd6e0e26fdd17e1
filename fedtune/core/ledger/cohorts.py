"""Record when the units of a dataset arrived: a unit arrives with the first ledger entry that names
it.

Arrivals are only recorded in studies without a last round, in which a unit is charged for the
rounds after its arrival. A unit whose arrival is not known is charged for every round."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from fedtune.core.ledger.chain import Entry

FIRST = 0  # the arrival of a unit that no entry names


class Arrival(NamedTuple):
    """Units of a dataset that arrived together, a cohort.

    - cohort: the name of these units
    - time: when they arrived, in UTC seconds
    - units: how many they are; 0 if they were not counted"""

    cohort: str
    time: int
    units: int


class Arrivals:
    """The arrivals of units in each dataset, added up from the ledger entries of kind "arrive"."""

    def __init__(self) -> None:
        self._of: dict[str, dict[str, int]] = {}  # dataset -> unit's hash -> entry
        self._cohorts: dict[str, dict[int, Arrival]] = {}
        self._older: set[str] = set()  # datasets with units that no entry names

    def fold(self, entry: Entry) -> None:
        body, dataset = entry.body, entry.body["dataset"]
        self._of.setdefault(dataset, {}).update(dict.fromkeys(body["units"], entry.seq))
        if body["units"]:
            arrival = Arrival(body["cohort"], body["time"], len(body["units"]))
            self._cohorts.setdefault(dataset, {})[entry.seq] = arrival
        if body["older"]:
            self._older.add(dataset)

    def of(self, dataset: str, unit: str) -> int:
        return self._of.get(dataset, {}).get(unit, FIRST)

    def cohorts(self, dataset: str) -> dict[int, Arrival]:
        """Return every cohort of the dataset that may have units, oldest first, as a dict: number
        of the entry with which it arrived -> the cohort. The number FIRST stands for units that no
        entry names."""
        cohorts = dict(sorted(self._cohorts.get(dataset, {}).items()))
        if not cohorts or dataset in self._older:
            cohorts = {FIRST: Arrival("first", 0, 0), **cohorts}
        return cohorts

    def entry(
        self, dataset: str, members: Collection[bytes], keys: Sequence[bytes]
    ) -> dict[str, Any] | None:
        """Return the fields of the entry that records the arrival of units, to be appended to the
        ledger before they join the dataset. Return None if it would record nothing new.

        - members: salted hashes of the dataset's members so far
        - keys: salted hashes of the keys of the units that join

        When a unit arrives depends on its own key alone, never on other units' records.

        | the key                             | its unit                           |
        |-------------------------------------|------------------------------------|
        | was never a member                  | arrives now                        |
        | is a member with an arrival         | keeps its arrival                  |
        | is a member without an arrival      | counts as there from the start     |"""
        arrived = self._of.get(dataset, {})
        new = sorted({key.hex() for key in keys if key not in members})
        older = any(key in members and key.hex() not in arrived for key in keys)
        if not new and (not older or dataset in self._older):
            return None
        return {"dataset": dataset, "units": new, "older": older}
