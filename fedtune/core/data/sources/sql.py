"""Read a table of a SQLite, DuckDB or PostgreSQL database."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.core.config.database import KINDS, kind_of
from fedtune.core.data.sources._databases import (
    Cell,
    Database,
    Unusable,
    connected,
    number_text,
    quote_name,
    require_driver,
)
from fedtune.core.data.sources._interface import (
    CHARACTERS,
    BadCell,
    Collection,
    Names,
    Row,
    find_unclean,
)
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.files import reading

# Columns that name a patient. If a table has one, data.columns.patient must be set.
PATIENTS = frozenset(
    {
        *("patient", "patient_id", "patientid", "pat_id", "person", "person_id", "personid"),
        *("subject", "subject_id", "subjectid", "mrn", "nhs_number", "patient_key", "person_key"),
    }
)

JOINED = 10_000  # most rows that a join may add to those of one patient


Cells = tuple[Cell, ...]
JoinKey = tuple[str, ...]  # what two rows that are joined have in common; last the patient


class Overjoined(tuple[Cell, ...]):
    """The cells of a row that is rejected because the join would add too much to its patient's
    rows."""


@dataclass(frozen=True)
class Sql(Collection):
    """Reads the rows of one table, or of a query's result, in one transaction that can write
    nothing. The rows are sorted by content, so that the database's order has no influence.

    - url: the database
    - table: the table's name; "" if there is a query
    - join, on: another table, and a column that both tables have; "": there is no join. Each row of
      `table` is joined to the other table's rows of the same patient with the same value in `on`.
      If the join would add more than JOINED rows or CHARACTERS characters to a patient's rows, the
      rows to which something would be joined are rejected
    - view: whether `table` may be a view
    - query: a query in place of a table. With a query or a view one patient's rows may depend on
      another's, which is outside the guarantee (policy.allow_free_query)
    - password_file, password_env: the file or the environment variable with PostgreSQL's password,
      if it is not in ~/.pgpass"""

    url: str = ""
    table: str = ""
    join: str = ""
    on: str = ""
    query: str = ""
    view: bool = False
    password_file: str = ""
    password_env: str = ""

    def __post_init__(self) -> None:
        if bool(self.table) == bool(self.query):
            raise ConfigError(
                "data.options names both a table and a query, or neither", "exactly one of the two"
            )
        if bool(self.join) != bool(self.on) or (self.query and self.join):
            raise ConfigError(
                "data.options has only one of `join` and `on`, or has both with a query",
                "table, join and `on`, where `on` is a column that both tables have",
            )
        if ";" in self.query:
            raise ConfigError(
                "data.options.query has a semicolon", "one SELECT without a semicolon"
            )
        if self.password_file and self.password_env:
            raise ConfigError(
                "data.options has two passwords", "only one of password_file and password_env"
            )
        if kind_of(self.url) not in KINDS:
            raise ConfigError(
                'source = "sql" needs data.url', f"the url of one of these: {', '.join(KINDS)}"
            )
        require_driver(kind_of(self.url))

    def collect(self, where: Path, names: Names) -> Iterator[tuple[str, Row | str]]:
        with connected(self.url, self._password(), names.where) as database:
            columns, rows = self._read(database, names)
            found = list(enumerate(rows, 1))
        # Sorted by content: only rows with the same content may change places.
        for number, cells in sorted(found, key=lambda row: _order(row[1])):
            names.row = number
            yield self.table or "query", _row(columns, cells)

    def _read(self, database: Database, names: Names) -> tuple[list[str], Iterable[Cells]]:
        """Read the table, or the query's result. Return two values: the columns that were read,
        i.e. those of the table that study.toml or site.toml names; and the rows, to be read while
        the database is open, each a tuple of cells in the order of these columns. Errors:
        DataError."""
        asked = sorted(set(names.keys.values()))
        if self.query:
            own, other = database.columns_of_query(self.query), []
            source = f"({self.query}) AS t"
        else:
            own = self._describe_table(database, self.table, names)
            other = self._describe_table(database, self.join, names) if self.join else []
            source = _source(self.table)
        present = list(dict.fromkeys([*own, *other]))
        names.header(present)
        _require_patient(present, names)
        by = self._by(own, other, names) if self.join else []
        columns = [column for column in asked if column in own]
        more = [column for column in asked if column in other and column not in own]
        if not columns + more:
            return [], []
        rows = _texts(database, source, [*by, *columns])
        if not self.join:
            return columns, rows
        own_rows = list(rows)  # a database may run one statement at a time
        beside = _texts(database, _source(self.join), [*by, *more])
        return columns + more, _join_rows(own_rows, beside, len(by), len(more))

    def _by(self, own: list[str], other: list[str], names: Names) -> list[str]:
        """Return the columns by which two tables are joined: the column `on`, and last the patient
        column, so that no row is joined to another patient's. own, other: the names of each table's
        columns. Errors: DataError if a table lacks one of these two."""
        patient = _patient(names)
        if not (self.on in own and self.on in other):
            raise DataError(
                f"{names.where}: data.options.on is not a column of both tables",
                "a column that `table` and `join` both have",
            )
        if patient != self.on and not (patient in own and patient in other):
            raise DataError(
                f"{names.where}: data.options.join would join rows of different patients",
                "tables that both have the column which data.columns.patient names",
                "join by that column, or leave the other table out",
            )
        by = dict.fromkeys((self.on, patient))
        return list(by)

    def _describe_table(self, database: Database, table: str, names: Names) -> list[str]:
        columns, is_table = database.describe(table)
        if not columns:
            raise DataError(
                f"{names.where}: has no table that data.options names",
                "the name of a table of this database",
            )
        if not (is_table or self.view):
            raise DataError(
                f"{names.where}: data.options names something that is not an "
                "ordinary table; in a view one patient's rows may depend on "
                "another's",
                "a table",
                "name a table, and select rows with data.filter; or set "
                "data.options.view, which policy.allow_free_query must allow",
            )
        return columns

    def _password(self) -> str | None:
        if self.password_env:
            password = os.environ.get(self.password_env)
            if not password:
                raise DataError(
                    "data.options.password_env names an environment variable that is not set, or "
                    "is empty",
                    "the name of the variable that holds the password, not the password itself",
                )
            return password
        if not self.password_file:
            return None
        secret = reading.secret(Path(self.password_file), "a database's password", DataError)
        try:
            return secret.decode().strip()
        except UnicodeDecodeError:
            raise DataError(f"{self.password_file}: is not UTF-8") from None


def _source(table: str) -> str:
    return f"{quote_name(*table.split('.'))} AS t"


def _texts(database: Database, source: str, columns: Sequence[str]) -> Iterator[Cells]:
    """Yield, for each row, a tuple of the texts of its cells in `columns`. Numbers are written so
    that equal ones in a column are equal texts. source: what stands after FROM in the statement; it
    must name the table t."""
    cells = [f"t.{quote_name(column)}" for column in columns]
    kinds = database.numbers(f"SELECT {', '.join(cells)} FROM {source}")
    text = f"SELECT {', '.join(map(database.as_text, cells))} FROM {source}"
    for row in database.read(text, len(columns)):
        yield tuple(number_text(cell, kind) for cell, kind in zip(row, kinds, strict=True))


def _join_rows(
    rows: Sequence[Cells], beside: Iterable[Cells], by: int, more: int
) -> Iterator[Cells]:
    """Join the rows of two tables whose first `by` cells are equal. For each such pair one row is
    yielded: the other cells of the first table's row, then those of the second table's. A row of
    the first table without a partner is yielded once, with `more` empty cells after its own. The
    database's own = is not used, since for it "AB" and "ab" may be one patient. If the join would
    add too much to a patient's rows (`_list_overjoined`), each of these that has a partner is
    yielded once, as Overjoined.

    - rows: the rows of the first table: the cells to join by, then the others
    - beside: the rows of the second table, in the same form
    - by: the number of cells to join by, of which the last is the patient. White space around their
      text does not count; a row in which one of them is empty or unusable has no partner
    - more: how many other cells each row of the second table has"""

    def key(row: Cells) -> JoinKey | None:
        usable = [
            cell.strip() for cell in row[:by] if isinstance(cell, str) and not find_unclean(cell)
        ]
        return tuple(usable) if len(usable) == by and all(usable) else None

    keys = [key(row) for row in rows]
    wanted = set(keys) - {None}
    found: dict[JoinKey, list[Cells]] = {}
    for row in beside:
        if (one := key(row)) in wanted and one is not None:
            found.setdefault(one, []).append(row[by:])
    mine: dict[JoinKey, list[Cells]] = {}
    for row, one in zip(rows, keys, strict=True):
        if one in found and one is not None:
            mine.setdefault(one, []).append(row[by:])
    too_many = _list_overjoined(mine, found)
    alone: list[Cells] = [(None,) * more]
    for row, one in zip(rows, keys, strict=True):
        if one is None or one not in found:
            yield (*row[by:], *alone[0])
        elif one[-1] in too_many:
            yield Overjoined((*row[by:], *alone[0]))
        else:
            for cells in found[one]:
                yield (*row[by:], *cells)


def _list_overjoined(
    mine: Mapping[JoinKey, list[Cells]], found: Mapping[JoinKey, list[Cells]]
) -> set[str]:
    """Return the patients to whose rows a join would add more than JOINED rows, or more than
    CHARACTERS characters, which is the most that the records of one unit may have. For example,
    2,000 rows of a patient that all match 2,000 rows of the other table would become 4,000,000.

    - mine: by key, the rows of the first table that have a partner; found: their partners"""
    rows, characters = Counter[str](), Counter[str]()
    for one, first in mine.items():
        second = found[one]
        rows[one[-1]] += len(first) * (len(second) - 1)
        characters[one[-1]] += _length(first) * (len(second) - 1)
        characters[one[-1]] += _length(second) * (len(first) - 1)
    return {who for who in rows if rows[who] > JOINED or characters[who] > CHARACTERS}


def _length(rows: Sequence[Cells]) -> int:
    return sum(len(cell) for row in rows for cell in row if isinstance(cell, str))


def _patient(names: Names) -> str:
    """Return the patient column that site.toml or the command line names; "" if none is named."""
    named = (".columns.patient", "--patient")  # key of a settings file, or option of a command
    return next((c for key, c in names.keys.items() if key.endswith(named)), "")


def _require_patient(present: Sequence[str], names: Names) -> None:
    """Check that a patient column is named if one of the tables' columns has a name that patient
    columns usually have. present: the columns of the tables. Errors: DataError."""
    telling = [column for column in present if column.lower() in PATIENTS]
    if telling and not _patient(names):
        raise DataError(
            f"{names.where}: has a column {telling[0]!r}, but data.columns.patient is not set",
            "the column that identifies the patient",
            f'columns = {{ …, patient = "{telling[0]}" }}',
        )


def _row(columns: Sequence[str], cells: Sequence[Cell]) -> Row | str:
    """Return a row as a dict by column. If some cells cannot be used, return the reason as a
    BadCell, which also holds the other cells."""
    by_column = dict(zip(columns, cells, strict=True))
    row: Row = {name: c for name, c in by_column.items() if not isinstance(c, Unusable)}
    reason = next((cell.reason for cell in cells if isinstance(cell, Unusable)), "")
    reason = "too long" if isinstance(cells, Overjoined) else reason
    return BadCell(reason, row) if reason else row


def _order(cells: Sequence[Cell]) -> list[tuple[int, str]]:
    """Return a key by which rows are sorted by content: cell by cell, with empty cells first and
    unusable cells last."""
    return [
        (2, cell.reason) if isinstance(cell, Unusable) else (int(cell is not None), cell or "")
        for cell in cells
    ]
