"""Bad records of every source, and bad words about them in site.toml."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from tests.fuzz.case import DEEP, PLAN, SITE, Case, Damage

COMMANDS = (
    ("doctor", SITE),
    ("data", "report", SITE),
    ("withdraw", SITE, "--file", "keys.txt"),
    ("simulate", PLAN, SITE, "--out", "new"),
)
CODES = frozenset({0, 2})  # 0: a report of what cannot be read; a withdrawal of who was there
OLD = 'path = "north.jsonl"\ncolumns = { prompt = "q", completion = "a", patient = "who" }\n'
SQLITE = 'url = "sqlite:///clinic.db"\noptions = { table = "note" }\n'
FHIR = 'path = "bulk"\nsource = "fhir"\n'
ARROW = 'path = "set"\n'
COLUMNS = 'columns = { prompt = "q", completion = "a", patient = "who" }\n'
BULK = 'columns = { text = "text", patient = "patient" }\n'


def _site(data: str, make: Callable[[Path], None] = lambda world: None) -> Damage:
    """Another [data] in site.toml, and what it reads."""

    def damage(world: Path) -> None:
        path = world / SITE
        text = path.read_text(encoding="utf-8")
        assert OLD in text
        path.write_text(text.replace(OLD, data), encoding="utf-8")
        make(world)

    return damage


def _file(name: str, content: bytes, mode: int = 0o600) -> Callable[[Path], None]:
    def make(world: Path) -> None:
        path = world / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    return make


def _database(*statements: str) -> Callable[[Path], None]:
    def make(world: Path) -> None:
        with closing(sqlite3.connect(world / "clinic.db")) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    return make


def _folder(name: str) -> Callable[[Path], None]:
    return lambda world: (world / name).mkdir()


DOCUMENT = {"resourceType": "DocumentReference", "subject": {"reference": "Patient/1"}}
STATE = json.dumps({"_data_files": [{"filename": "x.arrow"}]}).encode()
TABLE = "CREATE TABLE note (who, q, a)"
SOURCES: dict[str, Damage] = {
    "sqlite: missing": _site(SQLITE + COLUMNS),
    "sqlite: noise": _site(SQLITE + COLUMNS, _file("clinic.db", b"SQLite format 3\0" + b"x" * 999)),
    "sqlite: empty": _site(SQLITE + COLUMNS, _file("clinic.db", b"")),
    "sqlite: a folder": _site(SQLITE + COLUMNS, _folder("clinic.db")),
    "sqlite: no rows": _site(SQLITE + COLUMNS, _database(TABLE)),
    "sqlite: no columns": _site(SQLITE + COLUMNS, _database("CREATE TABLE note (x)")),
    "sqlite: a view": _site(SQLITE + COLUMNS, _database("CREATE VIEW note AS SELECT 1 AS who")),
    "sqlite: a view of itself": _site(
        SQLITE + COLUMNS, _database("CREATE VIEW note AS SELECT * FROM note")
    ),
    "sqlite: bad cells": _site(
        SQLITE + COLUMNS,
        _database(TABLE, "INSERT INTO note VALUES (x'ff', CAST(x'ff' AS TEXT), 9e999)"),
    ),
    "sqlite: a query that is none": _site(
        'url = "sqlite:///clinic.db"\noptions = { query = "; DROP TABLE note" }\n' + COLUMNS,
        _database(TABLE),
    ),
    "sqlite: a name with quotes": _site(
        'url = "sqlite:///clinic.db"\noptions = { table = \'a"b\' }\n' + COLUMNS, _database(TABLE)
    ),
    "url: a password": _site('url = "postgresql://u:hunter2@h/d"\n' + COLUMNS),
    "url: of nothing": _site('url = "://"\n' + COLUMNS),
    "url: a number": _site("url = 5\n" + COLUMNS),
    "url: no table": _site('url = "sqlite:///clinic.db"\n' + COLUMNS, _database(TABLE)),
    "postgresql: nobody there": _site(
        'url = "postgresql://h/d?host=/nowhere"\noptions = { table = "note" }\n' + COLUMNS
    ),
    "postgresql: no password": _site(
        'url = "postgresql://h/d?host=/nowhere"\n'
        'options = { table = "note", password_file = "none" }\n' + COLUMNS
    ),
    "fhir: missing": _site(FHIR + BULK),
    "fhir: empty folder": _site(FHIR + BULK, _folder("bulk")),
    "fhir: noise": _site(FHIR + BULK, _file("bulk/DocumentReference.ndjson", b"\xff\0{[")),
    "fhir: deep": _site(FHIR + BULK, _file("bulk/DocumentReference.ndjson", b"[" * DEEP)),
    "fhir: no text": _site(
        FHIR + BULK, _file("bulk/DocumentReference.ndjson", json.dumps(DOCUMENT).encode())
    ),
    "fhir: other columns": _site(
        FHIR + COLUMNS, _file("bulk/DocumentReference.ndjson", json.dumps(DOCUMENT).encode())
    ),
    "fhir: no such resource": _site(FHIR + 'options = { resource = "x" }\n' + BULK),
    "arrow: empty": _site('path = "x.arrow"\n' + COLUMNS, _file("x.arrow", b"")),
    "arrow: noise": _site('path = "x.arrow"\n' + COLUMNS, _file("x.arrow", b"ARROW1" * 99)),
    "arrow: a state of nothing": _site(ARROW + COLUMNS, _file("set/state.json", STATE)),
    "arrow: a broken state": _site(ARROW + COLUMNS, _file("set/state.json", b"{" * DEEP)),
    "arrow: splits": _site(ARROW + COLUMNS, _file("set/dataset_dict.json", b'{"splits": 7}')),
    "consent: nothing": _site(OLD + "consent = {}\n"),
    "consent: no column": _site(OLD + 'consent = { column = "none" }\n'),
    "consent: no list": _site(OLD + 'consent = { opt_outs = "none" }\n'),
    "consent: a list for all": _site(
        OLD + 'consent = { opt_outs = "list" }\n', _file("list", b"", 0o644)
    ),
    "consent: a list of names": _site(
        OLD + 'consent = { opt_outs = "list" }\n', _file("list", b"p1\n\xff\0\n")
    ),
    "consent: a folder": _site(OLD + 'consent = { opt_outs = "list" }\n', _folder("list")),
    "consent: no salt": _site(
        OLD + 'consent = { opt_outs = "list", hashing = "hmac-sha256" }\n', _file("list", b"")
    ),
}  # fmt: skip


def sources() -> Iterator[Case]:
    """Every bad source, for one of the commands that read a site's records, in turn."""
    for number, (name, damage) in enumerate(SOURCES.items()):
        command = COMMANDS[number % len(COMMANDS)]
        yield Case(f"source {name}: {command[0]}", damage, command, CODES)
