"""Who arrived when: a dataset's units by the ledger entry that first names them.

Only studies without a last round keep arrivals. A unit of which none is known has been there since
the first charge, as far as anybody can tell: it bears everything, never less."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from fedtune.ledger.chain import Entry

FIRST = 0  # the arrival of a unit that no entry names


class Arrival(NamedTuple):
    """cohort: its name; time: UTC seconds; units: how many, 0 where nobody counted."""

    cohort: str
    time: int
    units: int


class Arrivals:
    """Folded from the entries of kind "arrive"."""

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
        """Every cohort that somebody may be in, oldest first."""
        found = dict(sorted(self._cohorts.get(dataset, {}).items()))
        if not found or dataset in self._older:
            found = {FIRST: Arrival("first", 0, 0), **found}
        return found

    def entry(
        self, dataset: str, known: Collection[bytes], keys: Sequence[bytes]
    ) -> dict[str, Any] | None:
        """What to enter before the units `keys` become the dataset's, if anything; all is salted.

        known: the dataset's members so far. A unit's arrival follows from its own key alone: what
        others' records are, and whether they are the same, decides nothing.

        | a key that was never a member  | arrives now                                           |
        | a known key that arrived       | arrived when it did                                   |
        | a known key that never arrived | there from the first, in a study without arrivals |"""
        here = self._of.get(dataset, {})
        new = sorted({key.hex() for key in keys if key not in known})
        older = any(key in known and key.hex() not in here for key in keys)
        if not new and (not older or dataset in self._older):
            return None
        return {"dataset": dataset, "units": new, "older": older}
