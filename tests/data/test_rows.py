"""Encodings, delimiters and the filter of a site's files, and where a rejected row stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtune.core.config import Columns, DataFile, SiteData, load_site
from fedtune.core.data.load import load_dataset
from fedtune.core.data.records import read_file, read_records
from fedtune.core.data.sources._encoding import encoding_of
from fedtune.core.data.sources.csv import Csv, guess_format
from fedtune.core.data.sources.jsonl import json_lines
from fedtune.core.errors import ConfigError, DataError
from tests.data.data_tokens_kit import LABELLED, SECRET, Jsonl, MakeStudy, Tok

TEXT = Columns(text="t")


def dataset(path: Path, columns: Columns = TEXT, **keys: Any) -> SiteData:
    return SiteData(path=path, columns=columns, **keys)


def error_of(file: SiteData) -> str:
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert SECRET not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("name", ["latin-1", "cp1252", "iso8859-15", "mac_roman", "koi8-r"])
def test_a_file_in_an_encoding_of_one_byte_a_character(tmp_path: Path, name: str) -> None:
    text = "Ж" if name == "koi8-r" else "é"
    csv, jsonl = tmp_path / "data.csv", tmp_path / "data.jsonl"
    csv.write_bytes(f"t,u\n{text},1\n".encode(name))
    jsonl.write_bytes(f'{{"t": "{text}"}}\n'.encode(name))
    for path, source in ((csv, "csv"), (jsonl, "jsonl")):
        records, rejected = read_records(
            dataset(path, source=source, options={"encoding": name}), strict=False
        )
        assert [record.completion for record in records] == [text] and not rejected
        assert read_records(dataset(path), strict=False)[1] == {"not UTF-8": 1}


def test_a_byte_that_the_encoding_does_not_have_costs_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"t\na\n\x81\nb\n")
    file = dataset(path, source="csv", options={"encoding": "cp1252"})
    records, rejected = read_records(file)
    assert [r.completion for r in records] == ["a", "b"] and rejected == {"not in the encoding": 1}


@pytest.mark.parametrize(
    "name", ["utf-16", "utf-7", "shift_jis", "gb18030", "cp037", "unicode_escape", "none such", ""]
)
def test_an_encoding_in_which_a_row_could_change_another_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="one byte a character"):
        encoding_of(name)


@pytest.mark.parametrize("first", ["", '{"t": "x", "note_id": "0"}\n'])
def test_a_mark_in_any_line_is_taken_off(tmp_path: Path, first: str) -> None:
    """As where files were joined, each with its own: whether a row is read follows from that row,
    not from whether somebody's stands before it."""
    path, mark = tmp_path / "joined.jsonl", "\N{BYTE ORDER MARK}"
    path.write_text(mark * bool(first) + first + mark + '{"t": "y", "note_id": "1"}\n')
    found = read_file(DataFile(path=path, columns=Columns(text="t")), strict=False)
    assert found.records[-1].completion == "y" and not found.rejected
    bundle = [row for _, row in json_lines(path)]
    assert bundle[-1] == {"t": "y", "note_id": "1"}


def test_utf_8_with_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes("\ufefft\né\n".encode())
    assert [r.completion for r in read_records(dataset(path))[0]] == ["é"]


# ----------------------------------------------------------------------- what a wrong file is told


@pytest.mark.parametrize(("mark", "toml"), [(";", '";"'), ("\t", r'"\t"'), ("|", '"|"')])
def test_another_delimiter_is_suspected_and_its_columns_are_listed(
    tmp_path: Path, mark: str, toml: str
) -> None:
    path = tmp_path / "data.csv"
    path.write_text(f"t{mark}note_id\n{SECRET}{mark}1\n")
    message = error_of(dataset(path))
    assert f"delimiter = {toml}" in message and "expected one of 't', 'note_id'" in message
    site = tmp_path / "site.toml"
    site.write_text(
        f'[site]\nname = "s"\ndeclared_size = 10\n[data]\npath = "data.csv"\nsource = "csv"\n'
        f'options = {{ delimiter = {toml} }}\n[data.columns]\ntext = "t"\n'
    )
    assert [r.completion for r in read_records(load_site(site).data)[0]] == [SECRET]


def test_how_a_public_csv_is_written_is_guessed_and_a_sites_never(tmp_path: Path) -> None:
    """At a site one row's bytes would have a say in how every other is read."""
    path = tmp_path / "data.csv"
    for mark, name in ((";", "cp1252"), ("\t", "utf-8"), (",", "latin-1")):
        path.write_bytes(f"t{mark}u\r\né{mark}1\r\nplain{mark}2\r\n".encode(name))
        public = DataFile(path=path, columns=Columns(text="t"))
        assert [r.completion for r in read_records(public)[0]] == ["é", "plain"]
        records, _ = read_records(dataset(path), strict=False)
        assert [r.completion for r in records] == (["plain"] if mark == "," else [])
    for content in (b"t;u\ra;1\r", b'"t\n";u\n', b"\0", b'"', b""):  # no error but the reader's own
        path.write_bytes(content)
        assert guess_format(path, ["t"]) in (Csv(delimiter=";"), None)
    path.write_bytes(b"t;u\ra;1\r")  # lines as an old Mac ends them
    assert [r.completion for r in read_records(public)[0]] == ["a"]


def test_the_columns_that_were_found_are_listed_unless_they_may_be_a_record(
    tmp_path: Path,
) -> None:
    path = tmp_path / "data.csv"
    path.write_text("note,department\nx,y\n")
    assert "expected one of 'note', 'department'" in error_of(dataset(path))
    for line in (f"{SECRET},fever", f"note,{SECRET} has a fever", f"{SECRET};fever"):
        path.write_text(f"{line}\nx,y\n")
        assert "a first line that names the columns" in error_of(dataset(path))


def test_utf_16_is_called_by_its_name(tmp_path: Path) -> None:
    for name, text in (("data.csv", f"t\n{SECRET}\n"), ("data.jsonl", f'{{"t": "{SECRET}"}}\n')):
        path = tmp_path / name
        path.write_bytes(text.encode("utf-16"))
        assert "UTF-16" in error_of(dataset(path)) and "iconv" in error_of(dataset(path))
        records, rejected = read_records(dataset(path), strict=False)
        assert not records and sum(rejected.values()) in (1, 2)


# ---------------------------------------------------------------------------------------- filter

ROWS = [
    {"t": "a", "ward": "3", "ok": "yes"},
    {"t": "b", "ward": " 3 ", "ok": "no"},
    {"t": "c", "ward": 3, "ok": "yes"},
    {"t": "d", "ward": "4", "ok": "yes"},
    {"t": "e", "ward": None, "ok": "yes"},
    {"t": "f", "ward": ["3"], "ok": "yes"},
    {"t": "g", "ok": "yes"},
]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"ward": "3"}, "abc"),
        ({"ward": 3}, "abc"),
        ({"ward": ("3", 4)}, "abcd"),
        ({"ward": "3", "ok": "yes"}, "ac"),
        ({}, "abcdefg"),
    ],
)
def test_rows_with_the_filters_values_take_part(
    jsonl: Jsonl, keep: dict[str, Any], left: str
) -> None:
    read = read_file(dataset(jsonl(*ROWS), filter=keep))
    assert "".join(record.completion for record in read.records) == left
    assert (read.rows, read.filtered, read.failed) == (7, 7 - len(left), [])


def test_what_the_filter_says_of_a_row_follows_from_that_row(jsonl: Jsonl) -> None:
    keep = {"ward": "3"}
    every = [r.completion for r in read_records(dataset(jsonl(*ROWS), filter=keep))[0]]
    for at, row in enumerate(ROWS):
        less = jsonl(*ROWS[:at], *ROWS[at + 1 :])
        left = [r.completion for r in read_records(dataset(less, filter=keep), strict=False)[0]]
        assert left == [text for text in every if text != row["t"]]


def test_a_filter_reads_a_column_of_parquet_and_names_one_that_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"t": ["a", "b"], "ward": [3, 4], "x": [0, 0]}), path)
    records, _ = read_records(dataset(path, filter={"ward": 3}))
    assert [record.completion for record in records] == ["a"]
    message = error_of(dataset(path, filter={"wards": 3}))
    assert "no column 'wards', which data.filter.wards names" in message


def test_a_filter_that_leaves_nothing(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    with pytest.raises(DataError, match=r"data\.filter leaves none of 7 rows"):
        load_dataset(dataset(jsonl(*ROWS), filter={"ward": "9"}), study(), tokenizer)
    with pytest.raises(ValueError, match="no row would match"):
        dataset(Path("x"), filter={"ward": ()})


# ------------------------------------------------------------------------ where a bad row stands


def test_a_rejected_row_is_named_by_its_file_and_row(
    tmp_path: Path, study: MakeStudy, tokenizer: Tok
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    (folder / "a.csv").write_text('t,u\n"a\nb",1\n\n,2\nc\nd,3\n')
    (folder / "b.csv").write_bytes(b"t,u\n\xff,1\n" + f"{'x' * 90},1\ny,2\n".encode())
    data = load_dataset(dataset(folder), study(max_length=64), tokenizer)
    assert [tuple(failed) for failed in data.counts.failed] == [
        ("a.csv", 4, "empty text"),  # as a spreadsheet counts: the empty line is row 3
        ("a.csv", 5, "wrong column count"),
        ("b.csv", 2, "not UTF-8"),
        ("b.csv", 3, "too long"),
    ]
    assert data.counts.rows == 7 and sum(data.rejected.values()) == 4
    lines = tmp_path / "data.jsonl"
    lines.write_text('{"t": "a"}\n\nno json\n{"t": "a"}\n{"t": "b"}\n')
    data = load_dataset(dataset(lines), study(), tokenizer)
    assert data.counts.failed == (("data.jsonl", 3, "not JSON"),)
    assert data.counts.duplicates == 1 and len(data.examples) == 3  # counted, and kept


def test_records_over_the_cap_and_of_patients_who_are_left_out_are_counted(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    path = jsonl(*({"t": f"text {n}", "who": n % 3} for n in range(12)))
    plan = study(privacy={"unit": "patient", "max_records_per_unit": 3})
    columns = Columns(text="t", patient="who")
    file = SiteData(path=path, columns=columns)
    data = load_dataset(file, plan, tokenizer, exclude_unit=lambda unit: unit == "1")
    assert (len(data.examples), data.counts.over_cap, data.counts.excluded) == (6, 2, 4)


# ----------------------------------------------------------------------------------------- labels


def test_white_space_around_a_label_does_not_count(
    jsonl: Jsonl, study: MakeStudy, encoder_tokenizer: Tok
) -> None:
    plan = study(name="classify", labels=[" a", "b\n"])
    rows = [{"t": "lion", "y": y} for y in ("a", " a ", "b", "\tb", "c")]
    data = load_dataset(dataset(jsonl(*rows), LABELLED), plan, encoder_tokenizer)
    assert [example.label for example in data.examples] == [0, 0, 1, 1]
    assert data.counts.failed == (("data.jsonl", 5, "unknown label"),)
    with pytest.raises(ValueError, match="labels: two labels are equal"):
        study(name="classify", labels=["a", "a "])
