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
    """Finds a row's groups. It holds only public settings and the names of a site's columns.

    columns: for each axis, the file's column ("" if the site names none), the plan's values and,
    for a column of numbers, the edges between its bands.
    """

    columns: tuple[tuple[str, tuple[str, ...], tuple[float, ...]], ...] = ()

    @property
    def keys(self) -> dict[str, str]:
        """Map the configuration key of each axis to the file's column."""
        return {f"evaluation.groups.{column}": column for column, _, _ in self.columns if column}

    def __call__(self, row: Row) -> tuple[int, ...]:
        """Return, for each axis, the index of the row's value among the plan's values; NO_GROUP
        without a column or a cell, or if the plan does not name the value."""
        return tuple(
            _place(row.get(column) if column else None, values, edges)
            for column, values, edges in self.columns
        )


NO_GROUPS = GroupReader()


def group_reader(file: DataFile, study: Study | None) -> GroupReader:
    """Return the reader of groups for a site's held-out rows; NO_GROUPS for any other file, or if
    the plan has no query."""
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
