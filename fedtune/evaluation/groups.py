"""Find the group of each record: its value in a column that is not part of the record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from fedtune.core.config import DataFile, EvaluationTable
from fedtune.core.data.cells import key_of
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.files import Place, Rejected
from fedtune.core.data.records import keys_of, read_file, site_rows
from fedtune.core.data.sources._interface import BadCell, Names
from fedtune.core.errors import ConfigError

MISSING = "(missing)"
MOST_GROUPS = 50  # the largest number of groups in one column
KEY = "schedule.groups.{column}"


def group_of(cell: object) -> str:
    """Return the name of the group to which a row belongs: the text or number in its cell, cut to
    80 characters, or MISSING if the cell holds neither."""
    try:
        return key_of(cell)[:80]
    except Rejected:
        return MISSING


def groups_of(
    table: EvaluationTable, columns: Sequence[str], read: Dataset
) -> dict[str, list[str]]:
    """Find the group of each record in each of `columns`. Return a dict: column -> a list with the
    name of the group of each record in `read`.

    - table: the records' file
    - columns: the columns whose values are groups
    - read: the records, as they were read from this file

    Errors: DataError if a column is missing; ConfigError if a column has too many values."""
    failed = {(f.file, f.row) for f in read.counts.failed}
    places = [record.place for record in read_file(table).records]
    usable = [place for place in places if place and (place.file, place.row) not in failed]
    assert len(usable) == len(read.examples)  # one row for each record, in the file's order
    return groups_at(table, columns, usable, lambda column, cell: group_of(cell), KEY)


def count_groups(table: EvaluationTable, columns: Sequence[str]) -> dict[str, Counter[str]]:
    """Count the records of a public file in each group. Return a dict from each of `columns` to a
    Counter of its groups; {} without columns. table: the records' file. Errors: DataError if a
    column is missing; ConfigError if a column has too many values."""
    if not columns:
        return {}
    places = [record.place for record in read_file(table).records]
    groups = groups_at(table, columns, places, lambda column, cell: group_of(cell), KEY)
    return {column: Counter(values) for column, values in groups.items()}


def groups_at(
    file: DataFile,
    columns: Sequence[str],
    places: Sequence[Place | None],
    name: Callable[[str, object], str],
    key: str,
    todo: str = "name another column",
) -> dict[str, list[str]]:
    """Find the group of the records at `places` in each of `columns`. Return a dict: column -> a
    list with the name of the group at each place, in the order of `places`.

    - file: the records' file
    - columns: the columns whose values are groups
    - places: where each record's row stands in the file. None, or the place of a row that was
      rejected, gives the group MISSING
    - name: a function that is called with a column and a cell of it, and returns the group's name
    - key: the configuration key for error messages, with {column} in it
    - todo: the advice in an error message, with {column} where the column is to be named

    Errors: DataError if a column is missing; ConfigError if a column has too many values."""
    keys = keys_of(file) | {key.format(column=column): column for column in columns}
    cells: dict[Place, dict[str, str]] = {}
    for place, row in site_rows(file, Names(file.where, keys), strict=True):
        given = row.cells if isinstance(row, BadCell) else row
        if isinstance(given, dict):
            cells[place] = {column: name(column, given.get(column)) for column in columns}
    nothing = dict.fromkeys(columns, MISSING)
    found = [cells.get(place, nothing) if place else nothing for place in places]
    groups = {column: [row[column] for row in found] for column in columns}
    for column, values in groups.items():
        if (n := len(set(values))) > MOST_GROUPS:
            raise ConfigError(
                f"{key.partition('.{')[0]}: the column {column!r} has {n} values",
                f"at most {MOST_GROUPS}",
                todo.format(column=column),
            )
    return groups
