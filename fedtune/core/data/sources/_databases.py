"""Read databases for the SQL source. Each is read in one transaction that can write nothing, and
every cell is read as text.

Guarantee: no cell decides what happens to another row. No message holds a cell or a password, since
the database's own messages are dropped."""

from __future__ import annotations

import codecs
import importlib.util
import logging
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from decimal import Context, Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedtune.core.config.database import file_of, kind_of
from fedtune.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    import duckdb
    import psycopg

BATCH = 1000  # rows
EXACT = Context(prec=20_000)  # more digits than PostgreSQL's numeric has after its point
CONNECT = 30  # seconds
DIGITS = 400  # most digits of a number that is written out; DOUBLE has 309
FLOAT, DECIMAL = "float", "decimal"  # a column's kind of number; "": equal ones are equal texts
DRIVERS = {"postgresql": "psycopg", "duckdb": "duckdb"}
LOCKED = {  # settings of DuckDB with which it reads its file, and nothing else
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}


@dataclass(frozen=True)
class Unusable:
    """Stands in place of a cell that cannot be used as text. reason: one of REASONS."""

    reason: str


Cell = str | Unusable | None
UNDECODABLE = Unusable("not UTF-8")


class Database(Protocol):
    """An open connection to a database, in a transaction that can write nothing."""

    def describe(self, table: str) -> tuple[list[str], bool]:
        """Return the names of a table's columns ([] if there is no such table), and whether it is
        an ordinary table. A view, for example, is none."""

    def columns_of_query(self, query: str) -> list[str]:
        """Return the names of the columns of a query's result, in order."""

    def numbers(self, text: str) -> list[str]:
        """Return, for each column that a SQL statement (`text`) reads, its kind of number: FLOAT,
        DECIMAL, or "" if its values need no conversion by `number_text`."""

    def as_text(self, cell: str) -> str:
        """Return a SQL expression that gives a cell as text, to be read by `read`. cell: the SQL
        expression of the cell itself, such as t."name"."""

    def read(self, text: str, width: int) -> Iterator[Sequence[Cell]]:
        """Run a SQL statement (`text`) that reads `width` columns, and yield each row of the result
        as a sequence of cells: a str, None if a cell is empty, or Unusable."""


def number_text(cell: Cell, kind: str) -> Cell:
    """Return the text of a number in one form, so that equal numbers such as 7, 7.0 and 7.00 are
    the same label or key, as they are in files. A NaN becomes None; a cell that is no number is
    returned unchanged. kind: FLOAT, DECIMAL or "", as `Database.numbers` returns it for the cell's
    column."""
    if not kind or not isinstance(cell, str):
        return cell
    try:
        value = float(cell) if kind == FLOAT else Decimal(cell)
    except (ValueError, InvalidOperation):
        return cell
    if value != value:
        return None
    exact = Decimal(value)
    if not exact.is_finite() or abs(exact.adjusted()) > DIGITS:
        return cell
    if value == int(value):
        return str(int(value))
    return repr(value) if isinstance(value, float) else f"{value.normalize(EXACT):f}"


def quote_name(*names: str) -> str:
    """Return a name quoted for SQL. Several names that belong together, such as a schema and its
    table, are joined by dots."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def require_driver(kind: str) -> None:
    """Check that the package is installed that reads a kind of database. kind: "sqlite", which
    needs none, "duckdb" or "postgresql". Errors: ConfigError."""
    driver = DRIVERS.get(kind)
    if driver and importlib.util.find_spec(driver) is None:
        raise ConfigError(
            f"reading {kind} needs the package {driver}", todo='pip install "fedtune[sql]"'
        )


@contextmanager
def connected(url: str, password: str | None, where: object) -> Iterator[Database]:
    """A context manager that connects to a database, and yields a Database that reads it within one
    transaction.

    - url: the database, as site.toml names it
    - password: PostgreSQL's; None if it is in ~/.pgpass, or none is needed
    - where: the name of the database in errors

    Errors: DataError that names the database's error only by type, since a database's message may
    quote a cell."""
    opened = {"sqlite": _sqlite, "duckdb": _duckdb, "postgresql": _postgresql}[kind_of(url)]
    try:
        with opened(url, password) as database:
            yield database
    except DataError:
        raise
    except Exception as error:
        state = getattr(error, "sqlstate", None)
        code = f" {state}" if isinstance(state, str) and re.fullmatch(r"[0-9A-Z]{5}", state) else ""
        raise DataError(
            f"{where}: the database cannot be read ({type(error).__name__}{code})",
            "an existing database with a table that this user may read",
            "open the same url with the database's own client, which says why",
        ) from None


# ---------------------------------------------------------------------------------------- SQLite


@contextmanager
def _sqlite(url: str, _: str | None) -> Iterator[Database]:
    path = _file(url)
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
        connection.text_factory = _text
        for pragma in ("query_only = ON", "trusted_schema = OFF"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN")
        yield _Sqlite(connection)


@dataclass(frozen=True)
class _Sqlite:
    connection: sqlite3.Connection

    def describe(self, table: str) -> tuple[list[str], bool]:
        schema, _, name = table.rpartition(".")  # as quote_name gets it when it is read
        made = self.connection.execute(
            "SELECT type, sql FROM sqlite_master WHERE name = ? AND type IN ('table', 'view')",
            (name,),
        ).fetchone()
        if made is None or schema not in ("", "main"):
            return [], False
        ordinary = made[0] == "table" and not re.match(r"\s*CREATE\s+VIRTUAL", str(made[1]), re.I)
        columns = self.connection.execute(f"PRAGMA table_xinfo({quote_name(name)})")
        return [str(column[1]) for column in columns], ordinary

    def columns_of_query(self, query: str) -> list[str]:
        found = self.connection.execute(f"SELECT * FROM ({query}) AS t LIMIT 0")
        return [str(column[0]) for column in found.description]

    def numbers(self, text: str) -> list[str]:
        # In SQLite each cell of a column may have its own type, which _plain looks at.
        return [""] * len(self.connection.execute(f"{text} LIMIT 0").description)

    def as_text(self, cell: str) -> str:
        return cell

    def read(self, text: str, width: int) -> Iterator[Sequence[Cell]]:
        for row in self.connection.execute(text):
            yield [_plain(cell) for cell in row]


def _text(raw: bytes) -> str | Unusable:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return UNDECODABLE


def _plain(cell: Any) -> Cell:
    """Return a value that SQLite gave as text, in such a form that 7 and 7.0 are the same key. None
    stays None; a value that is neither text nor number, such as a blob, becomes Unusable."""
    if cell is None or isinstance(cell, str | Unusable):
        return cell
    if isinstance(cell, int | float):
        return number_text(repr(cell), FLOAT if isinstance(cell, float) else "")
    return Unusable("wrong type")


def _file(url: str) -> Path:
    """Return the path of the database file that a url names. Errors: DataError if there is no such
    file."""
    path = file_of(url)
    if not path.is_file():
        raise DataError(f"{path}: no such file", "a database")
    return path


# ---------------------------------------------------------------------------------------- DuckDB


@contextmanager
def _duckdb(url: str, _: str | None) -> Iterator[Database]:
    import duckdb

    with duckdb.connect(str(_file(url)), read_only=True, config=LOCKED) as connection:
        connection.execute("BEGIN TRANSACTION")
        yield _Duckdb(connection)


@dataclass(frozen=True)
class _Duckdb:
    connection: duckdb.DuckDBPyConnection

    def describe(self, table: str) -> tuple[list[str], bool]:
        schema, _, name = table.rpartition(".")
        by = [schema or "main", name]
        kinds = self.connection.execute(
            "SELECT table_type FROM information_schema.tables "
            "WHERE table_schema = ? AND table_name = ?",
            by,
        ).fetchall()
        columns = self.connection.execute(
            "SELECT column_name FROM information_schema.columns "
            "WHERE table_schema = ? AND table_name = ? ORDER BY ordinal_position",
            by,
        ).fetchall()
        return [column for (column,) in columns], kinds == [("BASE TABLE",)]

    def columns_of_query(self, query: str) -> list[str]:
        found = self.connection.execute(f"SELECT * FROM ({query}) AS t LIMIT 0")
        return [str(column[0]) for column in found.description or []]

    def numbers(self, text: str) -> list[str]:
        found = self.connection.execute(f"DESCRIBE {text}").fetchall()
        kinds = {"DOUBLE": FLOAT, "FLOAT": FLOAT, "DECIMAL": DECIMAL}
        return [kinds.get(str(row[1]).partition("(")[0], "") for row in found]

    def as_text(self, cell: str) -> str:
        return f"CAST({cell} AS VARCHAR)"

    def read(self, text: str, width: int) -> Iterator[Sequence[Cell]]:
        found = self.connection.execute(text)
        while rows := found.fetchmany(BATCH):
            yield from rows


# ------------------------------------------------------------------------------------ PostgreSQL


@contextmanager
def _postgresql(url: str, password: str | None) -> Iterator[Database]:
    import psycopg

    logging.getLogger("psycopg").setLevel(logging.CRITICAL + 1)  # its words may quote a cell
    secret = {"password": password} if password else {}
    with psycopg.connect(
        url,
        connect_timeout=CONNECT,
        application_name="fedtune",
        client_encoding="UTF8",
        **secret,
    ) as connection:
        # The session may not write either, in case a statement ends the transaction.
        connection.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        connection.commit()
        connection.read_only = True
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        yield _Postgresql(connection)
        connection.rollback()


@dataclass(frozen=True)
class _Postgresql:
    connection: psycopg.Connection[Any]

    def describe(self, table: str) -> tuple[list[str], bool]:
        schema, _, name = table.rpartition(".")
        found = self.connection.execute(
            "SELECT a.attname, c.relkind IN ('r', 'p') AND NOT c.relrowsecurity "
            "FROM pg_catalog.pg_class c "
            "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid "
            "WHERE c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped "
            "AND CASE WHEN %s = '' THEN pg_catalog.pg_table_is_visible(c.oid) "
            "ELSE n.nspname = %s END ORDER BY a.attnum",
            (name, schema, schema),
        ).fetchall()
        # A policy of row security may look at other rows, as a view may.
        return [column for column, _ in found], all(ordinary for _, ordinary in found)

    def columns_of_query(self, query: str) -> list[str]:
        found = self.connection.execute(f"SELECT * FROM ({query}) AS t LIMIT 0".encode())
        return [column.name for column in found.description or []]

    def numbers(self, text: str) -> list[str]:
        found = self.connection.execute(f"{text} LIMIT 0".encode()).description or []
        kinds = {700: FLOAT, 701: FLOAT, 1700: DECIMAL}  # OIDs of float4, float8, numeric
        return [kinds.get(column.type_code, "") for column in found]

    def as_text(self, cell: str) -> str:
        return f"CAST({cell} AS text)"

    def read(self, text: str, width: int) -> Iterator[Sequence[Cell]]:
        ((encoding,),) = self.connection.execute("SHOW server_encoding").fetchall()
        codec = _codec(str(encoding))
        body = text.encode(codec)
        # Cells come as raw bytes, so that one which is no text in the database's own encoding
        # spoils its own row alone.
        self.connection.execute("SET LOCAL client_encoding = 'SQL_ASCII'")
        with self.connection.cursor("fedtune") as cursor:
            cursor.itersize = BATCH
            cursor.execute(body)
            for row in cursor:
                yield [_decode_cell(cell, codec) for cell in row]
        self.connection.execute("SET LOCAL client_encoding = 'UTF8'")  # as it was


def _decode_cell(cell: Any, codec: str) -> Cell:
    if not isinstance(cell, bytes):
        return cell if cell is None or isinstance(cell, str) else Unusable("wrong type")
    try:
        return cell.decode(codec)
    except UnicodeDecodeError:
        return UNDECODABLE if codec == "utf-8" else Unusable("not in the encoding")


def _codec(encoding: str) -> str:
    """Return Python's name of a PostgreSQL encoding. Errors: DataError if Python has none."""
    name = encoding.lower()
    if name in ("utf8", "sql_ascii"):
        return "utf-8"
    try:
        return codecs.lookup(re.sub("^win", "cp", name)).name
    except LookupError:
        raise DataError(
            f"the database's encoding is {encoding}, which Python does not know",
            "UTF8, or another encoding that Python knows",
        ) from None
