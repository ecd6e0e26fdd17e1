"""SQL data source: a table of a SQLite, DuckDB or PostgreSQL database."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.config.database import KINDS, kind_of
from fedtune.data.sources._databases import (
    Cell,
    Database,
    Unusable,
    connected,
    installed,
    quoted,
)
from fedtune.data.sources._interface import BadCell, Collection, Names, Row
from fedtune.errors import ConfigError, DataError
from fedtune.files import reading

# Columns by which a table tells patients apart: with one of them, records alone are no unit.
PATIENTS = frozenset(
    {
        *("patient", "patient_id", "patientid", "pat_id", "person", "person_id", "personid"),
        *("subject", "subject_id", "subjectid", "mrn", "nhs_number", "patient_key", "person_key"),
    }
)


@dataclass(frozen=True)
class Sql(Collection):
    """The rows of one table, read in one transaction that can write nothing. Of another table,
    `join`, columns may be added, by the column `on` of both, and of the same patient's rows alone.

    view: `table` is a view; query: a query in place of a table. Either may make one patient's rows
    depend on another's, so both are outside the guarantee (policy.allow_free_query).
    password_file, password_env: where PostgreSQL's password is, if not in ~/.pgpass. All rows are
    sorted by what they hold: no order of the database's is left in them."""

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
            raise ConfigError("data.options of a database", "table, or query", "name one of them")
        if bool(self.join) != bool(self.on) or (self.query and self.join):
            raise ConfigError(
                "data.options.join of a database", "table, join and on, the column of both tables"
            )
        if self.password_file and self.password_env:
            raise ConfigError("data.options has two passwords", "password_file or password_env")
        if kind_of(self.url) not in KINDS:
            raise ConfigError(f'source = "sql" needs data.url, of {", ".join(KINDS)}')
        installed(kind_of(self.url))

    def collect(self, where: Path, names: Names) -> Iterator[tuple[str, Row | str]]:
        with connected(self.url, self._password(), names.where) as database:
            text, columns = self._statement(database, names)
            found = list(enumerate(database.read(text, len(columns)), 1)) if columns else []
        # By what it holds: rows that are alike may change places.
        for number, cells in sorted(found, key=lambda row: _order(row[1])):
            names.row = number
            yield self.table or "query", _row(columns, cells)

    def _statement(self, database: Database, names: Names) -> tuple[str, list[str]]:
        """Compose the one statement that reads; returns it, and the columns that it reads.

        Errors: DataError."""
        asked = sorted(set(names.keys.values()))
        if self.query:
            present = database.columns_of_query(self.query)
            own, source = present, f"({self.query}) AS t"
        else:
            own = self._described(database, self.table, names)
            other = self._described(database, self.join, names) if self.join else []
            present = list(dict.fromkeys([*own, *other]))
            source = f"{quoted(*self.table.split('.'))} AS t"
            if self.join:
                source += self._joined(own, other, names)
        names.header(present)
        _require_patient(present, names)
        columns = [column for column in asked if column in present]
        cells = (f"{'t' if column in own else 'j'}.{quoted(column)}" for column in columns)
        return f"SELECT {', '.join(map(database.as_text, cells))} FROM {source}", columns

    def _joined(self, own: list[str], other: list[str], names: Names) -> str:
        """Compose the join of another table's rows, of the same patient alone: whose row it is may
        else decide what becomes of another's. Errors: DataError."""
        patient = _patient(names)
        if not (self.on in own and self.on in other):
            raise DataError(f"{names.where}: data.options.on is no column of both tables")
        if patient != self.on and not (patient in own and patient in other):
            raise DataError(
                f"{names.where}: data.options.join would bring one patient's row to another's",
                "tables that both have the column which data.columns.patient names",
                "join by that column, or leave the other table out",
            )
        by = dict.fromkeys((self.on, patient))
        same = " AND ".join(f"t.{quoted(column)} = j.{quoted(column)}" for column in by)
        return f" LEFT JOIN {quoted(*self.join.split('.'))} AS j ON {same}"

    def _described(self, database: Database, table: str, names: Names) -> list[str]:
        columns, is_table = database.describe(table)
        if not columns:
            raise DataError(f"{names.where}: has no table that data.options names", "its name")
        if not (is_table or self.view):
            raise DataError(
                f"{names.where}: what data.options names is no ordinary table, and a view may make "
                "one patient's rows depend on another's",
                "a table",
                "name the table, with data.filter; or set data.options.view, which "
                "policy.allow_free_query must allow",
            )
        return columns

    def _password(self) -> str | None:
        if self.password_env:
            password = os.environ.get(self.password_env)
            if not password:
                raise DataError(
                    f"data.options.password_env = {self.password_env!r}: not in the environment"
                )
            return password
        if not self.password_file:
            return None
        secret = reading.secret(Path(self.password_file), "a database's password", DataError)
        try:
            return secret.decode().strip()
        except UnicodeDecodeError:
            raise DataError(f"{self.password_file}: is not UTF-8") from None


def _patient(names: Names) -> str:
    """Return the column that tells patients apart, "" where none is named."""
    named = (".columns.patient", "--patient")  # in a file, or on the command line
    return next((c for key, c in names.keys.items() if key.endswith(named)), "")


def _require_patient(present: Sequence[str], names: Names) -> None:
    """Errors: DataError where a table tells patients apart and site.toml does not say so."""
    telling = [column for column in present if column.lower() in PATIENTS]
    if telling and not _patient(names):
        raise DataError(
            f"{names.where}: has a column {telling[0]!r}, and data.columns.patient names none",
            "the column that tells one patient from another",
            f'columns = {{ …, patient = "{telling[0]}" }}',
        )


def _row(columns: Sequence[str], cells: Sequence[Cell]) -> Row | str:
    """Return a row as a dict, or why one of its cells cannot be used."""
    by_column = dict(zip(columns, cells, strict=True))
    row: Row = {name: c for name, c in by_column.items() if not isinstance(c, Unusable)}
    reason = next((cell.reason for cell in cells if isinstance(cell, Unusable)), "")
    return BadCell(reason, row) if reason else row


def _order(cells: Sequence[Cell]) -> list[tuple[int, str]]:
    """Order rows by what they hold: cells without a value first, those that are unusable last."""
    return [
        (2, cell.reason) if isinstance(cell, Unusable) else (int(cell is not None), cell or "")
        for cell in cells
    ]
