"""Record when units arrived: a unit arrives with the first ledger entry that names it.

Only studies without a last round keep arrivals. A unit without a known arrival is treated as
present since the first charge, so it is charged for everything."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from fedtune.core.ledger.chain import Entry

FIRST = 0  # the arrival of a unit that no entry names


class Arrival(NamedTuple):
    """Units that arrived together. cohort: the name of these units; time: when, in UTC seconds;
    units: how many there are, 0 if they were not counted."""

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
        """Return every cohort that may have units, oldest first, by the number of the entry with
        which it arrived."""
        cohorts = dict(sorted(self._cohorts.get(dataset, {}).items()))
        if not cohorts or dataset in self._older:
            cohorts = {FIRST: Arrival("first", 0, 0), **cohorts}
        return cohorts

    def entry(
        self, dataset: str, members: Collection[bytes], keys: Sequence[bytes]
    ) -> dict[str, Any] | None:
        """Build the "arrive" entry to append before the units `keys` join the dataset; None if it
        would record nothing new.

        members: salted hashes of the dataset's members so far; keys: salted hashes of the keys of
        the units that join. A unit's arrival depends on its own key alone, never on other units'
        records.

        | a key that was never a member       | arrives now                        |
        | a member with an arrival            | keeps its arrival                  |
        | a member without an arrival         | counts as there from the start     |"""
        arrived = self._of.get(dataset, {})
        new = sorted({key.hex() for key in keys if key not in members})
        older = any(key in members and key.hex() not in arrived for key in keys)
        if not new and (not older or dataset in self._older):
            return None
        return {"dataset": dataset, "units": new, "older": older}
