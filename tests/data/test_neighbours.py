"""One patient's file, cell or key is nothing to the records of the others, and a no in it is
heard."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtune.core.config import Columns, ConsentTable, SiteData, load_site
from fedtune.core.data import media
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import Read, read_file
from fedtune.officer import sheet
from tests import databases
from tests.data.test_fhir_source import document

COLUMNS = Columns(text="note", patient="who")
UNREADABLE = "x" * 300  # a link to it cannot be followed: the name is longer than one can be


def read(data: SiteData) -> Read:
    return read_file(data, unit="patient", strict=False)


def units(found: Read) -> list[str]:
    return [record.unit for record in found.records]


def a_file_a_patient(folder: Path) -> SiteData:
    folder.mkdir()
    for who in "abc":
        (folder / f"{who}.jsonl").write_text(json.dumps({"who": who, "note": "cough"}) + "\n")
    return SiteData(path=folder, columns=COLUMNS)


@pytest.mark.parametrize("strict", [True, False])
def test_a_link_that_cannot_be_followed_is_one_file(tmp_path: Path, strict: bool) -> None:
    data = a_file_a_patient(tmp_path / "notes")
    os.symlink(UNREADABLE, tmp_path / "notes" / "b-odd.jsonl")
    try:
        found = read_file(data, unit="patient", strict=strict)
    except OSError as error:
        pytest.fail(f"one patient's link is everybody's: {type(error).__name__}")
    assert units(found) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["DocumentReference.b.ndjson", "Encounter.b.ndjson"])
def test_such_a_link_in_a_bulk_export_too(tmp_path: Path, name: str) -> None:
    lines = "".join(json.dumps(document(f"d{who}", who)) + "\n" for who in "abc")
    (tmp_path / "DocumentReference.a.ndjson").write_text(lines)
    os.symlink(UNREADABLE, tmp_path / name)
    columns = Columns(text="text", patient="patient")
    found = read(SiteData(path=tmp_path, source="fhir", columns=columns))
    assert units(found) == ["a", "b", "c"] and not found.rejected


@pytest.mark.parametrize("name", ["link", b"M\xfcller.jsonl"])
def test_a_data_sheet_is_hashed_whatever_a_file_is_called(tmp_path: Path, name: Any) -> None:
    a_file_a_patient(tmp_path / "notes")
    (tmp_path / "site.toml").write_text(
        '[site]\nname = "n"\ndeclared_size = 20\n[data]\npath = "notes"\n'
        'columns = { text = "note", patient = "who" }\n'
    )
    site = load_site(tmp_path / "site.toml")
    before = sheet.records_hash(site)
    if name == "link":
        os.symlink(UNREADABLE, tmp_path / "notes" / "b-odd.jsonl")
        assert sheet.records_hash(site) == before
        return
    with open(os.path.join(os.fsencode(tmp_path / "notes"), name), "wb") as file:
        file.write(b'{"who": "d", "note": "rash"}\n')
    assert sheet.records_hash(site) != before


# ------------------------------------------------------ a no in a row whose other cell is bad


def a_bad_note(folder: Path, kind: str, agreed: str) -> SiteData:
    """p7's second row, whose note is no text, and whether it agrees; p8's beside it."""
    fields: dict[str, Any] = {"columns": COLUMNS, "consent": ConsentTable(column="ok")}
    path = folder / f"data.{kind.partition(' ')[0]}"
    said = agreed.encode()
    if kind == "sqlite":
        made = databases.made("sqlite", folder)
        made.execute("CREATE TABLE n (who, note, ok)")
        rows = [("p7", "first", "yes"), ("p7", b"blob", agreed), ("p8", "x", "yes")]
        made.fill("n", rows)
        return SiteData(url=made.url, options={"table": "n"}, **fields)
    if kind == "fhir":
        columns = Columns(text="text", patient="patient")
        fields |= {
            "columns": columns,
            "consent": ConsentTable(column="doc_status", values=("yes",)),
        }
        odd = base64.b64encode(b"x").decode() + "%"
        bad = document("b", "p7", docStatus=agreed)
        bad["content"][0]["attachment"]["data"] = odd
        lines = [document("a", "p7", docStatus="yes"), bad, document("c", "p8", docStatus="yes")]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "DocumentReference.ndjson").write_text(text)
        return SiteData(path=folder, source="fhir", **fields)
    if kind in ("parquet", "arrow"):
        notes = pa.array([b"first", b"caf\xe9", b"x"]).view(pa.string())
        table = pa.table({"who": ["p7", "p7", "p8"], "note": notes, "ok": ["yes", agreed, "yes"]})
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as to:
                to.write_table(table)
        return SiteData(path=path, **fields)
    note = {"NUL": b"a\0b", "comma": b"x"}.get(kind.partition(" ")[2], b"caf\xe9")
    if path.suffix == ".csv":
        end = b"," if kind == "csv comma" else b""
        rest = b"p7," + note + b"," + said + end + b"\np8,x,yes\n"
        path.write_bytes(b"who,note,ok\np7,first,yes\n" + rest)
        return SiteData(path=path, **fields)
    line = b'{"who":"p7","note":"%s","ok":"%s"}\n'
    path.write_bytes(line % (b"first", b"yes") + line % (note, said))
    with path.open("ab") as file:
        file.write(b'{"who":"p8","note":"x","ok":"yes"}\n')
    return SiteData(path=path, **fields)


BAD = {
    "csv": "not UTF-8",
    "csv NUL": "NUL byte",
    "csv comma": "wrong column count",
    "jsonl": "not UTF-8",
    "jsonl NUL": "NUL byte",
    "parquet": "not UTF-8",
    "arrow": "not UTF-8",
    "sqlite": "wrong type",
    "fhir": "wrong type",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_no_is_heard_though_another_cell_of_its_row_is_bad(tmp_path: Path, kind: str) -> None:
    found = read(a_bad_note(tmp_path, kind, "no"))
    assert units(found) == ["p8"], "somebody who said no trains"
    assert found.withheld == 2 and not found.rejected


@pytest.mark.parametrize("kind", BAD)
def test_a_yes_beside_a_bad_cell_costs_that_row_alone(tmp_path: Path, kind: str) -> None:
    found = read(a_bad_note(tmp_path, kind, "yes"))
    assert sorted(units(found)) == ["p7", "p8"]
    assert found.withheld == 0 and found.rejected == {BAD[kind]: 1}


def test_a_row_without_an_owner_speaks_for_nobody(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"who,note,ok\np7,first,yes\n\xff,second,no\n")
    data = SiteData(path=path, columns=COLUMNS, consent=ConsentTable(column="ok"))
    assert units(read(data)) == ["p7"]


# --------------------------------------------------------------------- keys and joins of databases


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    yield from databases.serving()


@pytest.fixture(params=["sqlite", "duckdb", "postgresql"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> databases.Made:
    if why := databases.missing(request.param):
        pytest.skip(why)
    server = request.getfixturevalue("server") if request.param == "postgresql" else None
    return databases.made(request.param, tmp_path, server)


def table(made: databases.Made, name: str = "n", **more: Any) -> SiteData:
    fields = {"url": made.url, "columns": COLUMNS, "options": {"table": name}} | more
    return SiteData.model_validate(fields)


KEYS = {  # of a column's type: what is written there, and the key that files have for it
    "sqlite": {"": (10**16, 1e16), "numeric": ("7", "7.00")},
    "duckdb": {"decimal(9,3)": ("7", "7.000"), "double": ("7", "7.0")},
    "postgresql": {
        "numeric": ("7", "7.0", "7.00"),
        "double precision": ("1e16", "10000000000000000"),
    },
}


def test_equal_numbers_are_one_patient(made: databases.Made) -> None:
    for at, (kind, written) in enumerate(KEYS[made.kind].items()):
        made.execute(f"CREATE TABLE n{at} (who {kind}, note text)")
        for key in written:
            made.execute(f"INSERT INTO n{at} VALUES ({key}, 'cough')")
        key = str(int(float(written[0])))
        assert units(read(table(made, f"n{at}"))) == [key] * len(written)
        opted = made_list(Path(tempfile.mkdtemp()), key)
        assert units(read(table(made, f"n{at}", consent={"opt_outs": opted}))) == []


def made_list(folder: Path, key: str) -> Path:
    path = folder / "opt-outs"
    path.touch(mode=0o600)
    path.write_text(hashlib.sha256(key.encode()).hexdigest() + "\n")
    return path


def test_a_key_that_is_no_whole_number_is_its_digits(made: databases.Made) -> None:
    kind = {"sqlite": "real", "duckdb": "decimal(9,3)"}.get(made.kind, "numeric")
    made.execute(f"CREATE TABLE n (who {kind}, note text)")
    made.execute("INSERT INTO n VALUES (7.50, 'cough'), (-0.125, 'rash'), (1200, 'fever')")
    assert sorted(units(read(table(made)))) == ["-0.125", "1200", "7.5"]


FOLDED = {"sqlite": "text COLLATE NOCASE", "duckdb": "varchar COLLATE NOCASE"}


def test_another_patient_is_not_joined_whatever_the_database_calls_equal(
    made: databases.Made,
) -> None:
    kind = FOLDED.get(made.kind, "text COLLATE ci")
    if made.kind == "postgresql":
        rule = "provider = icu, locale = 'und-u-ks-level2', deterministic = false"
        made.execute(f"CREATE COLLATION ci ({rule})")
    made.execute(f"CREATE TABLE n (who {kind}, note text)")
    made.execute(f"CREATE TABLE p (who {kind}, ward text)")
    made.execute("INSERT INTO n VALUES ('ab', 'of ab'), ('AB', 'of AB'), (' c', 'of c')")
    made.execute("INSERT INTO p VALUES ('ab', 'south'), ('AB', 'north'), ('c', 'north')")
    join = {"table": "n", "join": "p", "on": "who"}
    found = read(table(made, options=join, filter={"ward": "north"}))
    assert sorted(units(found)) == ["AB", "c"] and found.filtered == 1


def test_numbers_are_joined_as_keys_are(made: databases.Made) -> None:
    kind = {"sqlite": "real", "duckdb": "double"}.get(made.kind, "numeric")
    made.execute(f"CREATE TABLE n (who {kind}, note text)")
    made.execute("CREATE TABLE p (who text, ward text)")
    made.execute("INSERT INTO n VALUES (7.0, 'of 7'), (8.0, 'of 8')")
    made.execute("INSERT INTO p VALUES ('7', 'north'), ('8', 'south')")
    join = {"table": "n", "join": "p", "on": "who"}
    assert units(read(table(made, options=join, filter={"ward": "north"}))) == ["7"]


def test_a_table_whose_name_hides_a_view_is_not_read(tmp_path: Path) -> None:
    made = databases.made("sqlite", tmp_path)
    made.execute('CREATE TABLE "main.n" (who, note)')
    made.table("raw", ("who", "note"), [("a", "cough"), ("b", "rash")])
    made.execute("CREATE VIEW n AS SELECT * FROM raw LIMIT 1")
    for name in ("n", "main.n"):
        assert read(table(made, name)).rejected == {"unreadable file": 1}


# --------------------------------------------------------------------------------- broken files


def test_who_says_no_behind_a_broken_quote_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    data = SiteData(path=tmp_path, columns=COLUMNS, consent=ConsentTable(column="ok"))
    (tmp_path / "b.csv").write_text("who,note,ok\nb,cough,yes\n")
    path.write_text('who,note,ok\np7,first,yes\np5,"a "quoted" word,yes\np7,second,no\n')
    found = read(data)
    assert units(found) == ["b"] and found.rejected == {"not well-formed CSV": 1}


@contextmanager
def not_waited_for(pipe: Path) -> Iterator[None]:
    os.mkfifo(pipe)
    writer = threading.Timer(5, lambda: pipe.write_bytes(b""))
    writer.daemon = True
    writer.start()  # else code that waits would wait for ever
    yield
    assert writer.is_alive(), "a pipe was waited for"
    writer.cancel()


@pytest.mark.parametrize("swapped", [False, True], ids=["there", "swapped in"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "arrow", "ndjson"])
def test_a_pipe_among_the_files_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, swapped: bool
) -> None:
    """Nor one that takes a file's place after it was looked at."""
    listed = [{"filename": "data-0.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": listed}))
    fhir = suffix == "ndjson"
    name = f"{'DocumentReference.' if fhir else ''}data-0.{suffix}"
    if suffix != "arrow":
        (tmp_path / "state.json").unlink()
    (tmp_path / name.replace("0", "1")).touch()
    data = SiteData(path=tmp_path, columns=COLUMNS)
    if fhir:
        columns = Columns(text="text", patient="patient")
        data = SiteData(path=tmp_path, columns=columns, source="fhir")
    with not_waited_for(tmp_path / name):
        if swapped:
            monkeypatch.setattr(os.path, "isfile", lambda path: not os.path.isdir(path))
        found = read(data)
    assert found.records == [] and set(found.rejected) <= {"unreadable file", "cannot be read"}


def test_a_pipe_that_takes_a_pictures_place_is_not_waited_for(tmp_path: Path) -> None:
    with not_waited_for(tmp_path / "a.png"), pytest.raises(Rejected, match="unreadable image"):
        media.read_file(tmp_path / "a.png", "image")
