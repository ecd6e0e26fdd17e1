"""A table of SQLite, DuckDB or PostgreSQL as a site's records."""

from __future__ import annotations

import importlib.util
import logging
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedtune.core.config import Columns, SiteData, load_site, save
from fedtune.core.data.records import Read, read_file
from fedtune.core.data.sources import sql
from fedtune.core.errors import ConfigError, DataError
from tests import databases
from tests.databases import Made

COLUMNS = Columns(text="note_text", label="desk", patient="person_id")
NOTE = ("note_id", "person_id", "note_text", "desk")
SECRET = "Zaphod-Beeblebrox-1979"
ROWS = [
    ("1", "7", "cough", "lung"),
    ("2", "8", "fever", "heart"),
    ("3", "7", None, "lung"),
    ("4", None, "rash", "skin"),
    ("5", "9", "  ", "skin"),
    ("6", "9", "pain", "heart"),
]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    yield from databases.serving()


@pytest.fixture(params=["sqlite", "duckdb", "postgresql"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    if why := databases.missing(request.param):
        pytest.skip(why)
    server = request.getfixturevalue("server") if request.param == "postgresql" else None
    return databases.made(request.param, tmp_path, server)


def data(made: Made, table: str = "note", **changes: Any) -> SiteData:
    options = {"table": table} | changes.pop("options", {})
    fields = {"url": made.url, "columns": COLUMNS, "options": options} | changes
    return SiteData.model_validate(fields)


def read(made: Made, table: str = "note", strict: bool = True, **changes: Any) -> Read:
    return read_file(data(made, table, **changes), unit="patient", strict=strict)


def records(found: Read) -> list[tuple[str, str, str]]:
    return [(r.unit, r.prompt, r.label) for r in found.records]


def test_rows_are_read_as_text_and_a_bad_cell_costs_its_row(made: Made) -> None:
    made.table("note", NOTE, ROWS)
    found = read(made)
    assert sorted(records(found)) == [
        ("7", "cough", "lung"), ("8", "fever", "heart"), ("9", "pain", "heart")
    ]  # fmt: skip
    assert found.rejected == {"missing value": 2, "empty text": 1}
    assert sorted(f.row for f in found.failed) == [3, 4, 5] and found.failed[0].file == "note"
    kept = read(made, filter={"desk": "heart", "person_id": ("8", 9)})
    assert sorted(r[0] for r in records(kept)) == ["8", "9"] and kept.filtered == 4


def test_the_order_of_a_database_is_nobodys(made: Made) -> None:
    made.table("note", NOTE, ROWS)
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    made.table("other", NOTE, shuffled)
    assert records(read(made)) == records(read(made, "other"))


def test_columns_of_other_types_are_text_too(made: Made) -> None:
    if made.kind == "sqlite":
        pytest.skip("its columns have no type")
    types = "person_id bigint, note_text text, desk integer, amount double precision"
    made.execute(f"CREATE TABLE note ({types})")
    made.fill("note", [(7, "cough", 1, 2.0), (8, "fever", 2, 2.5)])
    columns = Columns(text="note_text", label="desk", patient="person_id")
    assert records(read(made, columns=columns)) == [("7", "cough", "1"), ("8", "fever", "2")]
    columns = Columns(text="note_text", label="amount", patient="person_id")
    assert [r[2] for r in records(read(made, columns=columns))] == ["2", "2.5"]


def test_cells_of_sqlite_each_have_a_type(tmp_path: Path) -> None:
    made = databases.made("sqlite", tmp_path)
    made.execute("CREATE TABLE note (person_id, note_text, desk)")
    rows = [(7, "a", 1), (7.0, "b", 1.0), ("7", "c", "1"), (8, b"\xff", 1), (8, "d", None)]
    made.fill("note", rows)
    made.execute("INSERT INTO note VALUES (8, CAST(x'ff' AS TEXT), 1)")
    made.execute("INSERT INTO note VALUES (8, CAST(x'4100' AS TEXT), 1)")
    found = read(made, strict=False)
    assert sorted(records(found)) == [("7", "a", "1"), ("7", "b", "1"), ("7", "c", "1")]
    assert found.rejected == {"wrong type": 1, "missing value": 1, "not UTF-8": 1, "NUL byte": 1}


def test_of_another_table_columns_of_the_same_patient_are_joined(made: Made) -> None:
    made.table("note", NOTE, [("1", "7", "cough", "lung"), ("2", "8", "fever", "heart")])
    made.table("person", ("person_id", "care_site_id"), [("7", "3"), ("8", "4"), ("9", "3")])
    join = {"join": "person", "on": "person_id"}
    found = read(made, options=join, filter={"care_site_id": "3"})
    assert records(found) == [("7", "cough", "lung")] and found.filtered == 1


def test_a_row_of_another_patient_is_not_joined(made: Made) -> None:
    """A note of 8 that names a visit of 7: whose the visit is would else decide what 8 says."""
    columns = (*NOTE, "visit_id")
    rows = [("1", "7", "cough", "lung", "v1"), ("2", "8", "fever", "heart", "v1")]
    made.table("note", columns, rows)
    made.table("visit", ("visit_id", "person_id", "care_site_id"), [("v1", "7", "3")])
    join = {"join": "visit", "on": "visit_id"}
    found = read(made, options=join, filter={"care_site_id": "3"})
    assert records(found) == [("7", "cough", "lung")]
    made.table("shared", ("visit_id", "care_site_id"), [("v1", "3")])
    with pytest.raises(DataError, match="join rows of different patients"):
        read(made, options={"join": "shared", "on": "visit_id"})
    with pytest.raises(DataError, match="not a column of both tables"):
        read(made, options={"join": "shared", "on": "note_id"})


@pytest.mark.parametrize("bound", ["JOINED", "CHARACTERS"])
def test_a_join_that_adds_too_much_to_a_patients_rows_rejects_them_alone(
    made: Made, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(sql, bound, {"JOINED": 8, "CHARACTERS": 90}[bound])
    made.table("note", NOTE, [])
    made.table("seen", ("person_id", "care_site_id", "note_id"), [])
    join = {"join": "seen", "on": "person_id"}
    for who, notes, visits in (("7", 4, 4), ("8", 3, 3), ("9", 9, 1), ("10", 2, 0)):
        made.fill("note", [(f"{who}-{n}", who, f"cough {n}", "lung") for n in range(notes)])
        made.fill("seen", [(who, "3", "-") for _ in range(visits)])
    found = read(made, options=join, columns=COLUMNS.model_copy(update={"label": "care_site_id"}))
    assert Counter(record.unit for record in found.records) == {"8": 9, "9": 9}
    assert found.rejected == {"too long": 4, "missing value": 2}
    # A refusal of consent in one of these rows counts all the same.
    made.fill("note", [("8-9", "8", "cough", "no"), ("7-9", "7", "cough", "no")])
    consent = {"column": "desk", "values": ("lung",)}
    found = read(made, options=join, consent=consent)
    assert {record.unit for record in found.records} == {"9", "10"} and not found.rejected


def test_rows_that_all_fit_each_other_are_not_multiplied(tmp_path: Path) -> None:
    made = databases.made("sqlite", tmp_path)
    made.table("note", NOTE, [(str(n), "7", f"cough {n}", "lung") for n in range(200)])
    made.table("visit", ("person_id", "care_site_id"), [("7", str(n)) for n in range(200)])
    made.fill("note", [("1", "8", "fever", "heart")])
    found = read(made, options={"join": "visit", "on": "person_id"})
    assert records(found) == [("8", "fever", "heart")] and found.rejected == {"too long": 200}


def test_a_view_is_refused_until_the_site_says_that_it_is_one(made: Made) -> None:
    made.table("note", NOTE, ROWS)
    made.execute("CREATE VIEW newest AS SELECT * FROM note ORDER BY note_id DESC LIMIT 2")
    with pytest.raises(DataError, match="not an ordinary table"):
        read(made, "newest")
    assert read(made, "newest", strict=False).rejected == {"unreadable file": 1}
    said = data(made, "newest", options={"view": True})
    assert said.free_query and not data(made).free_query
    assert records(read_file(said, unit="patient")) == [("9", "pain", "heart")]


def test_a_query_is_read_where_the_site_names_one(made: Made) -> None:
    made.table("note", NOTE, ROWS)
    query = "SELECT person_id, note_text, desk FROM note ORDER BY note_id LIMIT 1"
    asked = data(made, options={"table": "", "query": query})
    assert asked.free_query
    assert records(read_file(asked, unit="patient")) == [("7", "cough", "lung")]


def test_a_table_that_tells_patients_apart_is_read_by_patient(made: Made) -> None:
    made.table("note", NOTE, ROWS)
    alone = data(made, columns=Columns(text="note_text", label="desk"))
    with pytest.raises(DataError, match=r"has a column 'person_id', but data.columns.patient"):
        read_file(alone, unit="record")


def test_what_is_not_there_is_said_without_a_cell_or_a_password(made: Made) -> None:
    made.table("note", NOTE, [(SECRET, SECRET, SECRET, SECRET)])
    with pytest.raises(DataError, match=r"no column 'absent', which data\.columns") as one:
        read(made, columns=Columns(text="absent", patient="person_id"))
    with pytest.raises(DataError, match=r"has no table that data\.options names") as two:
        read(made, "absent")
    query = f"SELECT absent(note_text, '{SECRET}') FROM note"
    with pytest.raises(DataError, match="the database cannot be read") as three:
        read(made, options={"table": "", "query": query})
    for caught in (one, two, three):
        assert SECRET not in str(caught.value) and caught.value.__cause__ is None
    assert read(made, "absent", strict=False).rejected == {"unreadable file": 1}


@pytest.mark.parametrize("kind", ["sqlite", "duckdb"])
def test_a_file_that_is_no_database_is_an_error(tmp_path: Path, kind: str) -> None:
    if why := databases.missing(kind):
        pytest.skip(why)
    made = databases.made(kind, tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read(made)
    (tmp_path / "clinic.db").write_bytes(SECRET.encode() * 99)
    with pytest.raises(DataError, match="the database cannot be read") as caught:
        read(made)
    assert SECRET not in str(caught.value)


def test_nothing_can_be_written(made: Made) -> None:
    from fedtune.core.data.sources._databases import connected

    made.table("note", NOTE, ROWS)
    with (
        pytest.raises(DataError, match="cannot be read"),
        connected(made.url, None, "here") as database,
    ):
        list(database.read("DELETE FROM note RETURNING note_id", 1))
    assert read(made).rows == len(ROWS)


def test_in_postgresql_a_text_in_no_encoding_costs_its_row(server: str) -> None:
    import psycopg

    name = "ascii" + sys.platform[:3]
    with psycopg.connect(f"{server}&dbname=postgres", autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name}")
        connection.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0")
    made = Made("postgresql", f"{server}&dbname={name}")
    made.table("note", NOTE, [("1", "7", "naïve", "lung"), ("3", "9", "pain", "heart")])
    made.execute("INSERT INTO note VALUES ('2', '8', E'\\xff', 'heart')")
    found = read(made)
    assert sorted(r[1] for r in records(found)) == ["naïve", "pain"]
    assert found.rejected == {"not UTF-8": 1}


def test_a_password_comes_from_a_file_or_the_environment(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = databases.made("postgresql", tmp_path, server)
    made.table("note", NOTE, ROWS)
    made.execute("DROP ROLE IF EXISTS locked")
    made.execute(f"CREATE ROLE locked LOGIN PASSWORD '{SECRET}'")
    made.execute("GRANT SELECT ON note TO locked")
    locked = Made("postgresql", made.url.replace("ward@", "locked@"))
    caplog.set_level(logging.DEBUG)
    with pytest.raises(DataError, match="cannot be read"):
        read(locked)
    monkeypatch.setenv("CLINIC_PASSWORD", SECRET)
    assert read(locked, options={"password_env": "CLINIC_PASSWORD"}).rows == len(ROWS)
    path = tmp_path / "password"
    path.touch(mode=0o600)
    path.write_text(SECRET + "\n")
    assert read(locked, options={"password_file": str(path)}).rows == len(ROWS)
    path.chmod(0o640)
    with pytest.raises(DataError, match="other users can read it"):
        read(locked, options={"password_file": str(path)})
    monkeypatch.setenv("CLINIC_PASSWORD", "wrong" + SECRET)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read(locked, options={"password_env": "CLINIC_PASSWORD"})
    assert SECRET not in str(caught.value) + caplog.text
    made.execute("DROP OWNED BY locked")
    made.execute("DROP ROLE locked")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"postgresql://a:{SECRET}@h/db", "must hold no password"),
        (f"postgresql://a@h/db?password={SECRET}", "must hold no password"),
        (f"mysql://{SECRET}/db", "must begin with one of"),
        (f"{SECRET}.csv", "must begin with one of"),
        (f"sqlite://{SECRET}/db", "must be sqlite:///FILE"),
        ("duckdb:///", "must be duckdb:///FILE"),
        (f"postgresql://a:{SECRET}?b@h/db", "must hold no password"),
        (f"postgresql://a:{SECRET}#b@h/db", "must hold no password"),
        (f"postgresql://a:{SECRET}/b@h/db", "must hold no password"),
        (f"postgresql://h/db?password&{SECRET}", "must hold no password"),
        (f"postgresql:a:{SECRET}@h", "must begin with one of"),
        (f"sqlite:///{SECRET}#note", "options.table"),
        (f"postgresql://[{SECRET}", "must be a url"),
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(
    tmp_path: Path, url: str, said: str
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        f'[site]\nname = "s"\ndeclared_size = 10\n[data]\nurl = "{url}"\n'
        'options = { table = "note" }\n[data.columns]\ntext = "t"\n'
    )
    with pytest.raises(ConfigError, match=said) as caught:
        load_site(site)
    assert SECRET not in str(caught.value)
    with pytest.raises(ValidationError) as made:
        SiteData(url=url, columns=Columns(text="t"))
    assert SECRET not in str(made.value)


def test_no_message_has_what_may_be_a_secret(tmp_path: Path) -> None:
    if why := databases.missing("postgresql"):
        pytest.skip(why)
    url = f"postgresql://{SECRET}@/db?host={tmp_path}/{SECRET}"
    absent = Made("postgresql", url)
    for options in ({}, {"password_env": SECRET}):
        with pytest.raises(DataError) as caught:
            read(absent, options=options)
        assert SECRET not in str(caught.value)
    assert data(absent).where == "postgresql:///db"
    with pytest.raises(ValidationError, match="path: is a url"):
        SiteData(path=Path(f"postgresql://a:{SECRET}@h/db"), columns=COLUMNS)


def test_a_query_writes_nothing_though_it_ends_the_transaction(server: str, tmp_path: Path) -> None:
    from fedtune.core.data.sources._databases import connected

    made = databases.made("postgresql", tmp_path, server)
    made.table("note", NOTE, ROWS)
    trick = "SELECT 1) AS t LIMIT 0; COMMIT; DELETE FROM note; SELECT * FROM (SELECT 1"
    with pytest.raises(ConfigError, match="semicolon"):
        read(made, options={"table": "", "query": trick})
    with (
        pytest.raises(DataError, match="cannot be read"),
        connected(made.url, None, "here") as database,
    ):
        database.columns_of_query(trick)
    assert read(made).rows == len(ROWS)


def test_row_level_security_counts_as_a_view(server: str, tmp_path: Path) -> None:
    made = databases.made("postgresql", tmp_path, server)
    made.table("note", NOTE, ROWS)
    made.execute("ALTER TABLE note ENABLE ROW LEVEL SECURITY")
    with pytest.raises(DataError, match="not an ordinary table"):
        read(made)
    assert read(made, options={"view": True}).rows == len(ROWS)


def test_the_file_of_a_database_is_relative_to_site_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        '[site]\nname = "s"\ndeclared_size = 10\n[data]\nurl = "sqlite:///a%20b/clinic.db"\n'
        'options = { table = "note", password_file = "secret" }\n[data.columns]\ntext = "t"\n'
    )
    databases.made("sqlite", tmp_path / "a b").table("note", ("t",), [("cough",), ("fever",)])
    monkeypatch.chdir("/")
    loaded = load_site(site)
    assert loaded.data.options["password_file"] == str(tmp_path / "secret")
    again = load_site(save(loaded, tmp_path / "copy.toml"))
    for each in (loaded, again):
        plain = each.data.model_copy(update={"options": {"table": "note"}})
        assert len(read_file(plain).records) == 2


def test_path_or_url_and_nothing_beside_it() -> None:
    with pytest.raises(ValidationError, match="path: key is missing"):
        SiteData(columns=COLUMNS)
    with pytest.raises(ValidationError, match='source = "sql"'):
        SiteData(url="sqlite:///x.db", source="csv", columns=COLUMNS)
    for options, said in (
        ({}, "a table and a query, or neither"),
        ({"table": "a", "query": "b"}, "a table and a query, or neither"),
        ({"table": "a", "join": "b"}, "table, join and `on`"),
        ({"table": "a", "password_env": "A", "password_file": "b"}, "two passwords"),
        ({"tabel": "a"}, "one of url, table"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_file(SiteData(url="sqlite:///x.db", columns=COLUMNS, options=options))


def test_without_its_driver_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "psycopg" else find(name)
    )
    asked = SiteData(url="postgresql://h/db", columns=COLUMNS, options={"table": "note"})
    with pytest.raises(ConfigError, match="needs the package psycopg"):
        read_file(asked)
