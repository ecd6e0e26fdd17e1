"""A Hugging Face data set on disk, and Arrow files."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fedtune.core.config import Columns, SiteData
from fedtune.core.data.records import read_records
from fedtune.core.data.sources._arrow import rows_of
from fedtune.core.errors import DataError

COLUMNS = Columns(text="note", label="desk", patient="who")
SECRET = "Zaphod-Beeblebrox-1979"


def described(*kinds: tuple[str, dict[str, Any]]) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": dict(kinds)}}).encode()}


CLASS = {"names": ["heart", "lung"], "_type": "ClassLabel"}
SCHEMA = pa.schema(
    [("who", pa.int64()), ("note", pa.string()), ("desk", pa.int64())],
    metadata=described(("desk", CLASS), ("note", {"dtype": "string", "_type": "Value"})),
)


def written(path: Path, rows: list[dict[str, Any]], file: bool = False) -> Path:
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    make = pa.ipc.new_file if file else pa.ipc.new_stream
    with make(path, SCHEMA) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def saved(folder: Path, *shards: list[dict[str, Any]]) -> Path:
    """As `Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(shards):05}.arrow" for n in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        written(folder / name, rows)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names]})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


def note(who: int | None, desk: int | None, text: str | None = "cough") -> dict[str, Any]:
    return {"who": who, "note": text, "desk": desk}


def read(path: Path) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
    records, rejected = read_records(SiteData(path=path, columns=COLUMNS), unit="patient")
    return [(r.unit, r.prompt, r.label) for r in records], dict(rejected)


def test_a_folder_is_read_as_its_state_lists_it_and_classes_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", [note(1, 0), note(2, 1, "fever")], [note(3, 1)])
    written(folder / "cache-0123456789abcdef.arrow", [note(9, 0, "of an earlier step")])
    records, rejected = read(folder)
    assert records == [("1", "cough", "heart"), ("2", "fever", "lung"), ("3", "cough", "lung")]
    assert not rejected


def test_what_the_library_itself_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = {"who": [1, 2], "note": ["cough", "fever"], "desk": [1, 0]}
    made = datasets.Dataset.from_dict(rows).cast_column("desk", datasets.ClassLabel(2, ["a", "b"]))
    made.save_to_disk(tmp_path / "set", num_shards=2)
    assert read(tmp_path / "set")[0] == [("1", "cough", "b"), ("2", "fever", "a")]
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "sets")
    with pytest.raises(DataError, match=r"the folder of one of them: train"):
        read(tmp_path / "sets")
    assert read(tmp_path / "sets" / "train")[0] == [("1", "cough", "b"), ("2", "fever", "a")]


def test_a_bad_cell_rejects_its_row_alone(tmp_path: Path) -> None:
    bad = [note(1, 7), note(2, 0, None), note(None, 0), note(4, -1), note(5, None), note(6, 1)]
    records, rejected = read(saved(tmp_path / "set", bad))
    assert records == [("6", "cough", "lung")]
    assert rejected == {"wrong type": 1, "missing value": 4}


def test_text_that_is_not_utf_8_rejects_its_row_alone(tmp_path: Path) -> None:
    columns = [pa.array([1, 2, 3]), pa.array([b"a", b"\xff", b"c"]), pa.array([0, 1, 1])]
    raw = pa.RecordBatch.from_arrays(columns, names=["who", "note", "desk"])
    cast = pa.Array.from_buffers(pa.string(), 3, raw.column("note").buffers())
    batch = pa.RecordBatch.from_arrays([columns[0], cast, columns[2]], schema=SCHEMA)
    with pa.ipc.new_stream(tmp_path / "x.arrow", SCHEMA) as writer:
        writer.write_batch(batch)
    records, rejected = read(tmp_path / "x.arrow")
    assert [r[0] for r in records] == ["1", "3"] and rejected == {"not UTF-8": 1}


@pytest.mark.parametrize("offsets", [(0, 200, 20, 30), (0, 15, 10, 30), (0, 10, 20, 10**9)])
def test_a_damaged_offset_gives_no_cell_another_ones_text(
    tmp_path: Path, offsets: tuple[int, ...]
) -> None:
    """Nor memory beyond the file."""
    where = tmp_path / "x.arrow"
    texts = ("AAAA first", SECRET[:10], "third note")
    table = pa.Table.from_pylist([note(n, 0, t) for n, t in enumerate(texts)], schema=SCHEMA)
    with pa.ipc.new_stream(where, SCHEMA) as writer:
        writer.write_table(table)
    whole, good = where.read_bytes(), struct.pack("<4i", 0, 10, 20, 30)
    assert whole.count(good) == 1 and len(read(where)[0]) == 3
    where.write_bytes(whole.replace(good, struct.pack("<4i", *offsets)))
    with pytest.raises(DataError, match="not a readable Arrow file") as caught:
        read(where)
    assert SECRET[:4] not in str(caught.value)
    records, rejected = read_records(
        SiteData(path=where, columns=COLUMNS), unit="patient", strict=False
    )
    assert not records and rejected == {"unreadable file": 1}


def test_dictionaries_and_nested_cells_are_checked_too() -> None:
    """And text that is not UTF-8 stays its own row's matter there."""
    cells = pa.array([b"a", b"\xff", b"c"])
    strings = pa.Array.from_buffers(pa.string(), 3, cells.buffers())
    indices = pa.array([0, 1, 2])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), strings)
    for column in (
        pa.DictionaryArray.from_arrays(indices, strings),
        lists,
        pa.StructArray.from_arrays([strings], ["x"]),
    ):
        found = list(rows_of(pa.RecordBatch.from_arrays([column], names=["note"]), ["note"]))
        assert [isinstance(row, dict) for row in found] == [True, False, True]
    bent = pa.ListArray.from_arrays(pa.array([0, 3, 1, 3], pa.int32()), strings)
    inside = pa.StructArray.from_arrays([bent], ["x"])
    for column in (bent, inside, pa.FixedSizeListArray.from_arrays(bent, 1)):
        with pytest.raises(pa.ArrowInvalid):
            next(rows_of(pa.RecordBatch.from_arrays([column], names=["note"]), ["note"]))


def test_files_and_streams_and_folders_of_them_are_read(tmp_path: Path) -> None:
    written(tmp_path / "a.arrow", [note(1, 0)], file=True)
    written(tmp_path / "b.arrow", [note(2, 1)])
    (tmp_path / "state.json").write_text('{"of": "another program"}')
    assert [r[0] for r in read(tmp_path)[0]] == ["1", "2"]


@pytest.mark.parametrize(
    "listed", [[], [{}], [{"filename": "../out.arrow"}], [{"filename": "/etc/x"}], {"a": 1}, [7]]
)
def test_a_state_that_lists_no_file_of_its_own_is_refused(tmp_path: Path, listed: Any) -> None:
    folder = saved(tmp_path / "set", [note(1, 0)])
    shutil.copy(folder / "data-00000-of-00001.arrow", tmp_path / "out.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": listed}))
    with pytest.raises(DataError, match="lists no data file, or one that is not in this folder"):
        read(folder)


def test_a_broken_file_is_one_rejected_row_of_a_site_and_an_error_for_a_person(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path / "set", [note(1, 0)], [note(2, 1)])
    broken = folder / "data-00000-of-00002.arrow"
    broken.write_bytes(SECRET.encode() * 9)
    data = SiteData(path=folder, columns=COLUMNS)
    records, rejected = read_records(data, unit="patient", strict=False)
    assert [r.unit for r in records] == ["2"] and rejected == {"unreadable file": 1}
    with pytest.raises(DataError, match="not a readable Arrow file") as caught:
        read(broken)
    assert SECRET not in str(caught.value)
