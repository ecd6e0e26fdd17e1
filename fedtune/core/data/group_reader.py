"""Find the groups of the plan to which a held-out record belongs, from the record's row alone."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.core.config import DataFile, SiteEvaluation, Study
from fedtune.core.data.cells import key_of
from fedtune.core.data.files import Rejected
from fedtune.core.data.sources._interface import Row
from fedtune.core.registry.bands import band_of

NO_GROUP = -1


@dataclass(frozen=True)
class GroupReader:
    """Finds the groups of the plan's axes to which a row belongs. It holds only public settings and
    the names of a site's columns.

    columns: for each axis, the file's column ("" if the site names none), the plan's values and,
    for a column of numbers, the edges between its bands."""

    columns: tuple[tuple[str, tuple[str, ...], tuple[float, ...]], ...] = ()

    @property
    def keys(self) -> dict[str, str]:
        """The file's column for each axis of the plan for which the site names one, by the
        configuration key."""
        return {f"evaluation.groups.{column}": column for column, _, _ in self.columns if column}

    def __call__(self, row: Row) -> tuple[int, ...]:
        """Return, for each axis, the index of the row's group among the plan's values. The index is
        NO_GROUP if the file has no such column, the row has no such cell, or the plan does not name
        the value."""
        return tuple(
            _place(row.get(column) if column else None, values, edges)
            for column, values, edges in self.columns
        )


NO_GROUPS = GroupReader()


def group_reader(file: DataFile, study: Study | None) -> GroupReader:
    """Return the object that finds the plan's groups of each row in `file`. For a file other than a
    site's held-out records, and for a plan without a query, return NO_GROUPS, which has no axis."""
    table = study.private_evaluation if study else None
    if table is None or not isinstance(file, SiteEvaluation):
        return NO_GROUPS
    return GroupReader(
        tuple(
            (file.groups.get(name, ""), values, table.bands.get(name, ()))
            for name, values in table.columns.items()
        )
    )


def _place(cell: object, values: tuple[str, ...], edges: tuple[float, ...]) -> int:
    try:
        text = key_of(cell)
    except Rejected:
        return NO_GROUP
    if edges:
        band = band_of(text, edges)
        return NO_GROUP if band is None else band
    return values.index(text) if text in values else NO_GROUP
