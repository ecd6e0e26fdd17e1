"""One patient's file, cell or key is nothing to the records of the others, and a no in it is
heard."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtune.client import sheet
from fedtune.config import Columns, ConsentTable, SiteData, load_site
from fedtune.data.records import Read, read_file
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
