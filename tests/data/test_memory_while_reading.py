"""Memory that runs out while records are read is no row's fault, since what is held of others
decides when it does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtune.core.config import Columns, DataFile, SiteData
from fedtune.core.data import records
from fedtune.core.data.records import read_records
from fedtune.core.data.sources import _arrow, fhir, jsonl
from fedtune.core.data.sources._interface import Names
from fedtune.core.data.sources.jsonl import Jsonl

COLUMNS = Columns(text="note", patient="who")
ROWS = [{"who": f"p{number}", "note": f"note {number}"} for number in range(3)]


def at_second_call(honest: Callable[..., Any]) -> Callable[..., Any]:
    """As `honest`, but that memory runs out in the second call."""
    calls = iter((False, True))

    def made(*arguments: Any, **named: Any) -> Any:
        if next(calls, False):
            raise MemoryError
        return honest(*arguments, **named)

    return made


def file_of(folder: Path, kind: str) -> DataFile:
    path = folder / f"r.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "arrow":
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as to:
            to.write_table(table)
    else:
        lines = [{"resourceType": "DocumentReference", "id": row["who"]} for row in ROWS]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "DocumentReference.ndjson").write_text(text)
        columns = Columns(text="text", patient="patient")
        return SiteData(path=folder, source="fhir", columns=columns)
    return SiteData(path=path, columns=COLUMNS)


PLACES = {  # where memory runs out
    "a line": ("jsonl", jsonl.json, "loads"),
    "a cell of Parquet": ("parquet", _arrow, "_value"),
    "a cell of Arrow": ("arrow", _arrow, "_value"),
    "a file": ("jsonl", jsonl, "_json_object"),
    "a record": ("jsonl", records, "_record"),
    "a collection": ("fhir", fhir.Fhir, "_row"),
}


def read_short(folder: Path, patch: pytest.MonkeyPatch, place: str) -> None:
    kind, owner, name = PLACES[place]
    file = file_of(folder, kind)
    patch.setattr(owner, name, at_second_call(getattr(owner, name)))
    with pytest.raises(MemoryError):
        read_records(file, unit="patient", strict=False)


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_runs_out_rejects_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The reading ends, and the site takes part with noise alone: the same for every row."""
    read_short(tmp_path, monkeypatch, place)


def test_a_reader_that_takes_it_for_a_rows_fault_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Jsonl.rows

    def taken(self: Jsonl, path: Path, names: Names) -> Iterator[Any]:
        found = honest(self, path, names)
        while True:
            try:
                yield next(found)
            except StopIteration:
                return
            except MemoryError:
                yield "not JSON"

    monkeypatch.setattr(Jsonl, "rows", taken)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        read_short(tmp_path, monkeypatch, "a line")


def test_a_patients_text_is_read_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which rows are left out follows from the patient's own."""
    monkeypatch.setattr(records, "CHARACTERS", 20)
    path = tmp_path / "r.jsonl"
    rows = [{"who": who, "note": "x" * 8} for who in ("long", "p1", "long", "p2", "long", "long")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, rejected = read_records(SiteData(path=path, columns=COLUMNS), unit="patient")
    assert [record.unit for record in found] == ["long", "p1", "long", "p2"]
    assert rejected == {"too long": 2}
