"""A value of one row is nothing to the others, in Arrow and in Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtune.core.data.files import rows
from fedtune.core.data.sources import _arrow, parquet
from fedtune.core.data.sources._interface import Names
from fedtune.core.data.sources.parquet import Parquet
from fedtune.core.errors import DataError

ROWS = 4
MIDNIGHT = 86_400 * 10**6  # 24:00:00 in microseconds, which a database's time type has
KEYS = {"data.columns.text": "note", "data.columns.patient": "who"}


def texts(*cells: bytes) -> pa.Array:
    return pa.array(cells, pa.binary()).view(pa.string())


def each(good: Any, bad: Any, at: int | None) -> list[Any]:
    return [bad if row == at else good for row in range(ROWS)]


def notes(at: int | None) -> pa.Array:
    return texts(*each(b"a note", b"caf\xe9", at))


def starts(kind: pa.DataType, many: int = ROWS + 1) -> pa.Array:
    return pa.array(range(many), kind)


def chats(field: pa.Array) -> pa.Array:
    """A conversation of one turn a row, beside a field that nobody reads."""
    turn = pa.StructArray.from_arrays([texts(*[b"user"] * ROWS), field], ["role", "other"])
    return pa.ListArray.from_arrays(starts(pa.int32()), turn)


def times(at: int | None) -> pa.Array:
    return chats(pa.array(each(36_000 * 10**6, MIDNIGHT, at), pa.int64()).view(pa.time64("us")))


def decimals(at: int | None) -> pa.Array:
    wide = pa.array([Decimal(value) for value in each(7, 10**9, at)], pa.decimal128(38, 0))
    return chats(pa.Array.from_buffers(pa.decimal128(5, 0), ROWS, wide.buffers()))


def dictionary(index: int, nested: bool) -> Callable[[int | None], pa.Array]:
    def made(at: int | None) -> pa.Array:
        indices = pa.array(each(0, index, at), pa.int32())
        column = pa.DictionaryArray.from_arrays(indices, texts(b"a note"), safe=False)
        return chats(column) if nested else column

    return made


def dictionary_of_texts(at: int | None) -> pa.Array:
    indices = pa.array(each(0, 1, at), pa.int32())
    return chats(pa.DictionaryArray.from_arrays(indices, texts(b"a note", b"caf\xe9")))


def views(at: int | None) -> pa.Array:
    sizes = pa.array([1] * ROWS, pa.int32())
    return pa.ListViewArray.from_arrays(starts(pa.int32(), ROWS), sizes, notes(at))


# Of each column: how it is made with a bad value in row `at`, and whether that row is rejected.
COLUMNS: dict[str, tuple[Callable[[int | None], pa.Array], bool]] = {
    "time": (times, False),
    "decimal": (decimals, False),
    "text": (notes, True),
    "fixed lists": (lambda at: pa.FixedSizeListArray.from_arrays(notes(at), 1), True),
    "large lists": (
        lambda at: pa.LargeListArray.from_arrays(starts(pa.int64()), notes(at)),
        True,
    ),
    "list views": (views, True),
    "map": (
        lambda at: pa.MapArray.from_arrays(starts(pa.int32()), texts(*[b"k"] * ROWS), notes(at)),
        True,
    ),
    "struct in a list": (lambda at: chats(notes(at)), True),
    "dictionary": (dictionary(7, nested=False), True),
    "dictionary, before its beginning": (dictionary(-5, nested=False), True),
    "nested dictionary": (dictionary(7, nested=True), True),
    "nested dictionary, before its beginning": (dictionary(-5, nested=True), True),
    "nested dictionary of texts": (dictionary_of_texts, True),
}
NOT_IN_PARQUET = ("decimal", "list views")  # what pyarrow itself does not write, or not as it is


def written(folder: Path, kind: str, name: str, at: int | None) -> Path:
    who = pa.array([f"p{row}" for row in range(ROWS)])
    table = pa.table({"who": who, "note": COLUMNS[name][0](at)})
    path = folder / f"{at}.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as to:
            to.write_table(table)
    return path


def read(path: Path) -> list[Any]:
    return [str(row) if isinstance(row, str) else row for row in rows(path, KEYS, strict=False)]


def cases() -> Iterator[tuple[str, str]]:
    for name in COLUMNS:
        yield "arrow", name
        if name not in NOT_IN_PARQUET and "dictionary" not in name:
            yield "parquet", name


def assert_own_matter(folder: Path, kind: str, name: str) -> None:
    """Whichever row has the bad value, the others are read as they are without it."""
    good = read(written(folder, kind, name, None))
    assert all(isinstance(row, dict) for row in good) and len(good) == ROWS
    for at in range(ROWS):
        found = read(written(folder, kind, name, at))
        assert len(found) == ROWS, f"{name}: the file is unreadable for everybody"
        assert [*found[:at], *found[at + 1 :]] == [*good[:at], *good[at + 1 :]]
        assert isinstance(found[at], str) == COLUMNS[name][1]


@pytest.mark.parametrize(("kind", "name"), list(cases()))
def test_a_value_is_its_own_rows_matter(tmp_path: Path, kind: str, name: str) -> None:
    assert_own_matter(tmp_path, kind, name)


@pytest.mark.parametrize("name", ["time", "fixed lists", "map", "nested dictionary"])
def test_a_check_of_the_whole_column_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(_arrow, "_check", lambda column: column.validate(full=True))
    with pytest.raises(AssertionError, match="unreadable for everybody"):
        assert_own_matter(tmp_path, "arrow", name)


def test_a_slice_is_checked_as_what_it_shows() -> None:
    for name, (make, _) in COLUMNS.items():
        batch = pa.RecordBatch.from_arrays([make(2)], names=["note"])
        whole = [str(row) for row in _arrow.rows_of(batch, ["note"])]
        part = [str(row) for row in _arrow.rows_of(batch.slice(1, 2), ["note"])]
        assert part == whole[1:3], name


@pytest.mark.parametrize(
    "column",
    [
        pa.RunEndEncodedArray.from_arrays(pa.array([4], pa.int32()), pa.array(["a"])),
        pa.UnionArray.from_sparse(pa.array([0] * ROWS, pa.int8()), [pa.array(["a"] * ROWS)]),
    ],
)
def test_a_type_that_is_not_read_is_refused_before_any_row(column: pa.Array) -> None:
    nested = pa.StructArray.from_arrays([column], ["x"])
    for one in (column, nested):
        batch = pa.RecordBatch.from_arrays([one], names=["note"])
        with pytest.raises(DataError, match="an Arrow type that is not read"):
            next(_arrow.rows_of(batch, ["note"]))


LONG = 3 * 2**20  # characters of one text: a thousand of them are more than 2 GiB


@pytest.mark.long
def test_long_conversations_of_one_patient_are_not_everybodys_file(tmp_path: Path) -> None:
    """Arrow cannot decode more than 2 GiB of text of a nested column at once; by its dictionary
    such a file is small. Twin: a reader of whole batches alone loses the others' rows."""
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema, text = pa.schema([("who", pa.string()), ("turns", kind)]), "a" * LONG
    of = [("short", str(number)) for number in range(20)] + [(text, "x")] * 800
    with pq.ParquetWriter(tmp_path / "r.parquet", schema, compression="zstd") as writer:
        for at in range(0, len(of), 100):
            part = of[at : at + 100]
            turns = pa.array([[{"role": "user", "content": said}] for said, _ in part], kind)
            writer.write_table(
                pa.table({"who": pa.array([who for _, who in part]), "turns": turns}, schema),
                row_group_size=800,
            )
    path, wanted = tmp_path / "r.parquet", {"columns.messages": "turns", "columns.patient": "who"}
    assert path.stat().st_size < 2**20
    rows = Parquet().rows(path, Names(path, wanted))
    read = [row["who"] for row in rows if isinstance(row, dict)]
    assert [who for who in read if who != "x"] == [str(number) for number in range(20)]


def test_rows_that_cannot_be_decoded_together_are_decoded_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, with a decoder that gives up in the second batch of more than one row."""
    path, honest = tmp_path / "r.parquet", pq.ParquetFile.iter_batches
    pq.write_table(pa.table({"who": [str(n) for n in range(9)]}), path, row_group_size=6)

    def together(source: Any, batch_size: int, *what: Any, **how: Any) -> Iterator[Any]:
        for number, batch in enumerate(honest(source, batch_size, *what, **how)):
            if batch_size > 1 and number:
                raise pa.ArrowNotImplementedError("Nested data conversions")
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", together)
    monkeypatch.setattr(parquet, "BATCH", 4)
    try:
        read = list(Parquet().rows(path, Names(path, {"columns.patient": "who"})))
    except DataError as error:
        pytest.fail(f"a batch is everybody's: {error.happened}")
    assert read == [{"who": str(number)} for number in range(9)]
