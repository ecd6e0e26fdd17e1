"""Databases for tests: SQLite always, DuckDB and PostgreSQL where they are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # where Debian has them
HBA = "local all locked scram-sha-256\nlocal all all trust\n"


@dataclass(frozen=True)
class Made:
    """A database of one test. execute: statements, each with the rows that it is run for."""

    kind: str
    url: str

    def execute(self, statement: str, rows: Sequence[Sequence[Any]] | None = None) -> None:
        if self.kind == "postgresql":
            import psycopg

            with psycopg.connect(self.url) as connection:
                _run(connection.cursor(), statement.replace("?", "%s"), rows)
        elif self.kind == "duckdb":
            import duckdb

            with duckdb.connect(self.url.removeprefix("duckdb:///")) as connection:
                _run(connection, statement, rows)
        else:
            with closing(sqlite3.connect(self.url.removeprefix("sqlite:///"))) as connection:
                _run(connection, statement, rows)
                connection.commit()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A new table, each column of text; without rows, an empty one."""
        self.execute(f"CREATE TABLE {name} ({', '.join(f'{c} text' for c in columns)})")
        self.fill(name, rows)

    def fill(self, name: str, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            self.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(rows[0]))})", rows)


def _run(cursor: Any, statement: str, rows: Sequence[Sequence[Any]] | None) -> None:
    if rows is None:
        cursor.execute(statement)
    else:
        cursor.executemany(statement, [list(row) for row in rows])


def made(kind: str, folder: Path, server: str | None = None) -> Made:
    """A new database in a folder; server: the url of PostgreSQL's."""
    if kind == "postgresql":
        import psycopg

        assert server is not None
        name = "t" + os.urandom(8).hex()
        with psycopg.connect(f"{server}&dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")  # a name of our own
        return Made(kind, f"{server}&dbname={name}")
    folder.mkdir(parents=True, exist_ok=True)
    return Made(kind, f"{kind}:///{folder / 'clinic.db'}")


def missing(kind: str) -> str:
    """Why a kind of database cannot be tested here; "" where it can."""
    package = {"duckdb": "duckdb", "postgresql": "psycopg"}.get(kind)
    if package:
        try:
            __import__(package)
        except ImportError:
            return f"{package} is not installed"
    if kind == "postgresql" and not BINARIES:
        return "PostgreSQL is not installed (apt-get install postgresql)"
    if kind == "postgresql" and os.geteuid() == 0 and _user() is None:
        return "PostgreSQL does not run as root, and there is no other user"
    return ""


def serving() -> Iterator[str]:
    """Start a PostgreSQL server on a socket in a new folder; yields its url."""
    if why := missing("postgresql"):
        pytest.skip(why)
    user, binaries = (_user() if os.geteuid() == 0 else None), BINARIES[-1]
    folder = Path(tempfile.mkdtemp(prefix="fedtune-pg-", dir="/tmp"))  # a socket's path is short
    try:
        if user:
            shutil.chown(folder, user)
        options = ["-A", "trust", "-U", "ward", "-E", "UTF8", "--no-sync", "--locale=C"]
        _command([binaries / "initdb", "-D", folder / "data", *options], user, folder)
        (folder / "data" / "pg_hba.conf").write_text(HBA)
        served = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=20"
        start = [binaries / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log"]
        _command([*start, "-o", served, "start"], user, folder)
        try:
            yield f"postgresql://ward@/?host={folder}"
        finally:
            stop = [binaries / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop"]
            _command(stop, user, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _command(command: Sequence[object], user: str | None, folder: Path) -> None:
    subprocess.run(
        [str(part) for part in command],
        check=True,
        user=user,
        cwd=folder,
        timeout=120,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )


def _user() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)
