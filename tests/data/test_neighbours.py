"""One patient's file, cell or key is nothing to the records of the others, and a no in it is
heard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedtune.client import sheet
from fedtune.config import Columns, SiteData, load_site
from fedtune.data.records import Read, read_file
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
