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
    """A function that finds the groups of one row: one on each axis by which the plan divides
    held-out records. It holds only public settings and the names of a site's columns.

    - columns: for each axis, four values: the plan's name of it; the file's column, "" if the site
      names none; the plan's names of the groups; and the edges between the bands of a column of
      numbers, () for any other column"""

    columns: tuple[tuple[str, str, tuple[str, ...], tuple[float, ...]], ...] = ()

    @property
    def keys(self) -> dict[str, str]:
        """The file's columns that hold groups, as a dict: the key of site.toml that names it,
        "evaluation.groups." with the plan's name of the axis -> the column. It has an item for
        every axis of the plan for which the site names a column."""
        return {f"evaluation.groups.{name}": column for name, column, *_ in self.columns if column}

    def __call__(self, row: Row) -> tuple[int, ...]:
        """Return, for each axis, the index of the row's group among the plan's values. The index is
        NO_GROUP if the file has no such column, the row has no such cell, or the plan does not name
        the value."""
        return tuple(
            _place(row.get(column) if column else None, values, edges)
            for _, column, values, edges in self.columns
        )


NO_GROUPS = GroupReader()


def group_reader(file: DataFile, study: Study | None) -> GroupReader:
    """Return the object that finds the plan's groups of a row in `file`. If `file` is not a site's
    held-out records, or the plan has no query of private evaluation, return NO_GROUPS, whose result
    for every row is ()."""
    table = study.private_evaluation if study else None
    if table is None or not isinstance(file, SiteEvaluation):
        return NO_GROUPS
    return GroupReader(
        tuple(
            (name, file.groups.get(name, ""), values, table.bands.get(name, ()))
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
