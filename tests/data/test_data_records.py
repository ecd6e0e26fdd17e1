"""Every reason, every named error, three formats; and no content in any of it."""

from __future__ import annotations

import csv
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtune.core.config import Columns, DataFile, EvaluationTable
from fedtune.core.data.group_reader import GroupReader
from fedtune.core.data.records import Record, read_records
from fedtune.core.data.sources import jsonl as jsonl_module
from fedtune.core.data.sources._interface import Names
from fedtune.core.data.sources.jsonl import Jsonl
from fedtune.core.errors import DataError

Lines = Callable[..., Path]

SECRET = "Zaphod-Beeblebrox-1979"
PAIR = Columns(prompt="p", completion="c", patient="who")
TEXT = Columns(text="t")
LABELLED = Columns(text="t", label="y")
CHAT = Columns(messages="m")


def said(role: str, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


def dialogue(*roles: str) -> dict[str, Any]:
    return {"m": [said(role) for role in roles]}


REASONS = [
    (TEXT, b'{"t": "Zaphod', "not JSON"),
    (TEXT, b"[" * 100_000, "not JSON"),
    (TEXT, b'{"t": ' + b"9" * 5000 + b"}", "not JSON"),
    (TEXT, b'{"t": "\xff\xfe"}', "not UTF-8"),
    (TEXT, b'{"t": "\\ud800 lone"}', "not UTF-8"),
    (TEXT, b'{"t": "a\0b"}', "NUL byte"),
    (TEXT, {"t": "a\0b"}, "NUL byte"),
    (TEXT, {"u": "x"}, "missing value"),
    (TEXT, {"t": None}, "missing value"),
    (TEXT, {"t": 3}, "wrong type"),
    (TEXT, ["t"], "wrong type"),
    (TEXT, {"t": " \n "}, "empty text"),
    (PAIR, {"p": "x", "c": "", "who": 1}, "empty text"),
    (PAIR, {"p": "", "c": "x", "who": 1}, "empty text"),
    (PAIR, {"p": "x", "c": "y", "who": " "}, "missing value"),
    (PAIR, {"p": "x", "c": "y", "who": None}, "missing value"),
    (PAIR, {"p": "x", "c": "y", "who": float("nan")}, "missing value"),
    (PAIR, {"p": "x", "c": "y", "who": True}, "wrong type"),
    (PAIR, {"p": "x", "c": "y", "who": 1.5}, "wrong type"),
    (PAIR, {"p": "x", "c": "y", "who": {}}, "wrong type"),
    (LABELLED, {"t": "x", "y": None}, "missing value"),
    (LABELLED, {"t": "x", "y": []}, "wrong type"),
    (CHAT, {"m": None}, "missing value"),
    (CHAT, {"m": []}, "empty text"),
    (CHAT, {"m": {"role": "user"}}, "wrong type"),
    (CHAT, {"m": ["hello"]}, "wrong type"),
    (CHAT, {"m": "hello"}, "not JSON"),
    (CHAT, {"m": [said("user"), {"role": "assistant"}]}, "missing value"),
    (CHAT, {"m": [said("user"), said("assistant", [{"type": "text"}])]}, "wrong type"),
    (CHAT, {"m": [said("user"), said("assistant", "  ")]}, "empty text"),
    (CHAT, dialogue("user"), "bad message roles"),
    (CHAT, dialogue("assistant", "user"), "bad message roles"),
    (CHAT, dialogue("system"), "bad message roles"),
    (CHAT, dialogue("user", "system", "assistant"), "bad message roles"),
    (CHAT, dialogue("user", "doctor"), "bad message roles"),
]
GOOD = {"p": "x", "c": "y", "who": 1, "t": "x", "y": "z", "m": [said("user"), said("assistant")]}


@pytest.mark.parametrize(("columns", "row", "reason"), REASONS)
def test_a_bad_record_is_counted_by_its_reason(
    jsonl: Lines, columns: Columns, row: Any, reason: str
) -> None:
    file = DataFile(path=jsonl(GOOD, row, GOOD), columns=columns)
    records, rejected = read_records(file, unit="patient" if columns.patient else "record")
    assert len(records) == 2
    assert rejected == {reason: 1}


def test_shapes(jsonl: Lines) -> None:
    row = {"p": " a ", "c": "b\n", "t": "c", "y": 7, "m": [said("system", ""), *GOOD["m"]]}

    def read(columns: Columns) -> Record:
        return read_records(DataFile(path=jsonl(row), columns=columns))[0][0]

    pair = read(Columns(prompt="p", completion="c"))
    assert (pair.prompt, pair.completion) == (" a ", "b\n")
    assert (read(TEXT).prompt, read(TEXT).completion) == ("", "c")
    assert (read(LABELLED).prompt, read(LABELLED).label) == ("c", "7")
    assert read(CHAT).messages == (("system", ""), ("user", "x"), ("assistant", "x"))


def test_public_text_needs_nothing_to_predict(jsonl: Lines) -> None:
    for columns, row in [
        (Columns(prompt="p"), {"p": "x"}),
        (Columns(prompt="p", completion="c"), {"p": "x", "c": None}),
        (LABELLED, {"t": "x", "y": None}),
        (CHAT, dialogue("user")),
    ]:
        file = DataFile(path=jsonl(row), columns=columns)
        records, rejected = read_records(file, labelled=False)
        assert (len(records), rejected) == (1, {})


def test_a_patient_is_the_same_however_the_key_is_typed(jsonl: Lines) -> None:
    keys = [7, "7", 7.0, " 7 "]
    file = DataFile(path=jsonl(*({"p": "x", "c": "y", "who": k} for k in keys)), columns=PAIR)
    assert {record.unit for record in read_records(file, unit="patient")[0]} == {"7"}
    assert len({record.unit for record in read_records(file)[0]}) == 4


def test_blank_lines_and_bom_are_no_records(jsonl: Lines) -> None:
    path = jsonl(b'\xef\xbb\xbf{"t": "x"}', b"", b"  ", {"t": "y\u2028z"})
    records, rejected = read_records(DataFile(path=path, columns=TEXT))
    assert [record.completion for record in records] == ["x", "y\u2028z"]
    assert not rejected


def test_csv_quotes_newlines_bom_and_bad_bytes(tmp_path: Path) -> None:
    path = tmp_path / "data.CSV"
    cells = ['He said "no",\r\nthen left', "é"]
    with path.open("w", encoding="utf-8-sig", newline="") as handle:
        csv.writer(handle).writerows([["p", "c "], cells, ["x"], ["x", "y", "z"], [], ["x", ""]])
    with path.open("ab") as handle:
        handle.write(b'"\xff",y\r\n"a\0",y\r\n' + b"x" * 200_000 + b",y\r\n")
    columns = Columns(prompt="p", completion="c")
    records, rejected = read_records(DataFile(path=path, columns=columns))
    assert (records[0].prompt, records[0].completion) == tuple(cells)
    assert len(records) == 2 and len(records[1].prompt) == 200_000
    assert rejected == {"wrong column count": 2, "empty text": 1, "not UTF-8": 1, "NUL byte": 1}


def test_csv_messages_are_json(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    with path.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([["m"], [json.dumps(GOOD["m"])], ["[nothing"]])
    records, rejected = read_records(DataFile(path=path, columns=CHAT))
    assert records[0].messages == (("user", "x"), ("assistant", "x"))
    assert rejected == {"not JSON": 1}


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    bad = pa.array([b"fine", b"\xff\xff", b"fine"]).view(pa.string())
    chat = [[said("user"), said("assistant", content)] for content in ("a", "b", "c")]
    patients = pa.array([1.0, 2.0, None])
    table = pa.table({"t": bad, "m": chat, "who": patients, "other": [1, 2, 3]})
    pq.write_table(table, path)
    records, rejected = read_records(DataFile(path=path, columns=TEXT))
    assert ([r.completion for r in records], rejected) == (["fine", "fine"], {"not UTF-8": 1})
    columns = Columns(messages="m", patient="who")
    records, rejected = read_records(DataFile(path=path, columns=columns), unit="patient")
    assert [(r.unit, r.messages[1][1]) for r in records] == [("1", "a"), ("2", "b")]
    assert rejected == {"missing value": 1}


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path, jsonl: Lines) -> None:
    jsonl({"t": "second"}, name="b.jsonl")
    jsonl({"t": "first"}, name="a.jsonl")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.csv").write_text("not data")
    records, _ = read_records(DataFile(path=tmp_path, columns=TEXT))
    assert [record.completion for record in records] == ["first", "second"]
    (tmp_path / "c.csv").write_text("t\nthird\n")
    records, _ = read_records(DataFile(path=tmp_path, columns=TEXT))
    assert [record.completion for record in records] == ["first", "second", "third"]


def a_file_a_patient(folder: Path, kind: str, odd: Any = None) -> None:
    """Three patients' files of one kind, and one of `odd` rows, or bytes, in the middle."""
    folder.mkdir()
    files: dict[str, Any] = {f"p{n}": [{"t": f"note {n}", "y": "a"}] for n in range(3)}
    for name, rows in (files | ({"p1-odd": odd} if odd is not None else {})).items():
        path = folder / f"{name}.{kind}"
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif kind == "csv":
            with path.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("odd", "reasons"),
    [
        ([{"t": "no label"}], {"missing value": 1}),
        ([{"other": 1}], {"missing value": 1}),
        (b"\xff\xfe\x00 neither", None),
        (b"", None),
    ],
)
def test_one_patients_file_is_nothing_to_the_others(
    tmp_path: Path, kind: str, odd: Any, reasons: dict[str, int] | None
) -> None:
    a_file_a_patient(tmp_path / "without", kind)
    a_file_a_patient(tmp_path / "with", kind, odd)
    for strict in (True, False):
        found = {}
        for name in ("without", "with"):
            file = DataFile(path=tmp_path / name, columns=LABELLED)
            try:
                found[name] = read_records(file, strict=strict)
            except DataError as error:
                pytest.fail(f"{name} as {kind}: {error}")
        texts = {name: [r.prompt for r in records] for name, (records, _) in found.items()}
        assert texts["with"] == texts["without"] == ["note 0", "note 1", "note 2"]
        if reasons is not None:
            assert found["with"][1] == reasons


@pytest.mark.parametrize("error", [OverflowError, ValueError, RecursionError])
def test_a_file_that_makes_a_library_raise_is_nothing_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    a_file_a_patient(tmp_path / "with", "jsonl", [{"t": SECRET, "y": "a"}])
    honest = Jsonl.rows

    def rows(self: Jsonl, path: Path, names: Names) -> Any:
        if "odd" in path.name:
            raise error(SECRET)
        return honest(self, path, names)

    monkeypatch.setattr(Jsonl, "rows", rows)
    file = DataFile(path=tmp_path / "with", columns=LABELLED)
    try:
        records, rejected = read_records(file, strict=False)
    except error:
        pytest.fail("one file's error is everybody's")
    assert len(records) == 3 and rejected == {"unreadable file": 1}
    alone = tmp_path / "with" / "p1-odd.jsonl"  # a person is told, without its words
    assert "cannot be read" in str(error_of(alone, LABELLED))


def test_a_file_that_decides_about_all_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a column that one file lacks is an error of the dataset."""
    honest = Names.header

    def header(self: Names, names: list[str], shown: bool = True) -> None:
        honest(self, names, shown)
        if "y" not in names:
            raise DataError("no column 'y'")

    monkeypatch.setattr(Names, "header", header)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_one_patients_file_is_nothing_to_the_others(
            tmp_path, "csv", [{"t": "no label"}], {"missing value": 1}
        )


def test_once_it_takes_part_a_site_reads_what_it_can(tmp_path: Path, jsonl: Lines) -> None:
    """The guarantee of CSV begins at a well-formed file; before it joins, a site is told. Of one
    that is none no row is used: who says no behind the broken quote is not heard."""
    path = tmp_path / "data.csv"
    path.write_text('t\nx\n"a quote" inside\ny\n')
    try:
        records, rejected = read_records(DataFile(path=path, columns=TEXT), strict=False)
    except DataError as error:
        pytest.fail(str(error))
    assert not records and rejected == {"not well-formed CSV": 1}
    assert "not well-formed" in str(error_of(path))
    assert "not well-formed" in str(error_of(tmp_path))  # in a folder too
    absent = DataFile(path=jsonl({"n": "x"}), columns=TEXT)
    assert read_records(absent, strict=False) == ([], {"missing value": 1})


def test_a_line_without_end_is_one_record_too_long(
    jsonl: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl_module, "LINE", 100)
    path = jsonl({"t": "x"}, {"t": "long " * 200}, {"t": "y"}, {"t": "z" * 85}, {"t": "é" * 300})
    records, rejected = read_records(DataFile(path=path, columns=TEXT))
    assert [r.completion for r in records] == ["x", "y", "z" * 85] and rejected == {"too long": 2}


def error_of(path: Path, columns: Columns = TEXT, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(DataFile(path=path, columns=columns), **options)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown + str(caught.value) + repr(caught.value)
    return caught.value


def test_errors_of_the_file(tmp_path: Path, jsonl: Lines) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    other = tmp_path / "data.xlsx"
    other.write_text(SECRET)
    broken = tmp_path / "data.parquet"
    broken.write_text(SECRET * 10)
    assert "no such file" in str(error_of(tmp_path / "absent.jsonl"))
    assert "no records" in str(error_of(empty))
    assert "no data file" in str(error_of(folder))
    assert "unsupported suffix; expected .arrow, .csv, .jsonl, .parquet" in str(error_of(other))
    assert "CSV UTF-8" in str(error_of(other))  # what a person does about it
    assert "not a readable Parquet file" in str(error_of(broken))
    for content in ("", "t\n"):
        (tmp_path / "empty.csv").write_text(content)
        assert "no records" in str(error_of(tmp_path / "empty.csv"))


def test_an_absent_column_is_named_with_its_key_and_the_others_listed(
    tmp_path: Path, jsonl: Lines
) -> None:
    columns = Columns(text="t", label="diagnosis")
    row = {"t": SECRET, "y": SECRET}
    csv_path, parquet_path = tmp_path / "data.csv", tmp_path / "data.parquet"
    csv_path.write_text(f"t,y\n{SECRET},{SECRET}\n")
    pq.write_table(pa.Table.from_pylist([row]), parquet_path)
    for path in (jsonl(row, row), csv_path, parquet_path):
        message = str(error_of(path, columns))
        assert "no column 'diagnosis', which data.columns.label names" in message
        assert "expected one of 't', 'y'" in message
    table = EvaluationTable(path=csv_path, columns=columns)
    with pytest.raises(DataError, match=r"evaluation\.columns\.label"):
        read_records(table)


def test_what_may_be_a_record_is_not_listed_as_a_column(tmp_path: Path, jsonl: Lines) -> None:
    headerless = tmp_path / "data.csv"
    headerless.write_text(f"{SECRET},yes\nother,no\n")
    assert "a first line that names the columns" in str(error_of(headerless))
    by_name = jsonl({SECRET: "x", "n": 1}, {"n": 1, "m": 2}, {"n": 2})
    assert "not shown: it may itself be content" in str(error_of(by_name))
    twin = jsonl(*[{f"{SECRET} {n}": "x", "n": 1, "Anna Bell": 2, "größe": 3} for n in range(9)])
    assert "expected one of 'n', 'größe';" in str(error_of(twin))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 40])
def test_a_key_that_is_a_patients_is_in_no_message(jsonl: Lines, count: int) -> None:
    """A site that keeps its records by patient: each key is somebody's name."""
    rows = [{f"Anna_{n}": "a note", "Bell, Tom": "another"} for n in range(count)]
    said = str(error_of(jsonl(*rows)))
    assert "Anna" not in said and "Bell" not in said and "no column" in said


def test_an_absent_patient_column_is_named(jsonl: Lines) -> None:
    message = str(error_of(jsonl({"t": SECRET}), unit="patient"))
    assert "data.columns.patient" in message
    columns = Columns(text="t", patient="mrn")
    assert "'mrn'" in str(error_of(jsonl({"t": SECRET}), columns, unit="patient"))


def test_broken_csv_stops_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    for bad in (f'"{SECRET}" x,y\n', f'"{SECRET},y\nx,y\nx,y\n'):
        path.write_text(f"t,y\na,b\n{bad}")
        assert "not well-formed CSV at line" in str(error_of(path))
    path.write_text(f"t,t\n{SECRET},b\n")
    assert "occurs twice" in str(error_of(path))


def test_a_file_inside_a_folder_is_not_named(tmp_path: Path, jsonl: Lines) -> None:
    jsonl({"n": "x"}, name=f"{SECRET}.jsonl")
    assert str(tmp_path) in str(error_of(tmp_path))


def test_a_record_shows_nothing_of_itself(jsonl: Lines) -> None:
    path = jsonl({"p": SECRET, "c": SECRET, "who": SECRET})
    records, rejected = read_records(DataFile(path=path, columns=PAIR), unit="patient")
    assert records[0].unit == SECRET
    assert SECRET not in repr(records) + str(records[0]) + repr(rejected)


def test_a_column_of_groups_is_named_by_its_key_in_the_site_file() -> None:
    """The key has the plan's name of the axis, and two axes may have one column."""
    axes = (("sex", "code", ("f", "m"), ()), ("ward", "code", ("a", "b"), ()))
    keys = {"evaluation.groups.sex": "code", "evaluation.groups.ward": "code"}
    assert GroupReader(axes).keys == keys
