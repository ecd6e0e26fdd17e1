"""Rows of a JSONL, CSV or Parquet file, or of a folder of one of them.

A bad row is a reason from a fixed list, never an exception; a bad file is a DataError. Neither
holds content, and no library's error is chained, since its message may quote a row.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from fedtune.errors import DataError

Row = dict[str, object]
Keys = Mapping[str, str]  # a configuration key, "data.columns.text", to the column that it names

BOM = b"\xef\xbb\xbf"
SHOWN = 20  # column names in a message


class Rejected(Exception):
    """One record cannot be used; the only argument is the reason, a fixed string."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


def rows(where: Path, keys: Keys) -> Iterator[Row | str]:
    """Each row as a dict, or the reason why it is rejected, in the order of the sorted files.

    Errors: DataError for a file that is missing, of another kind, unreadable or without a column
    that `keys` names. Only `where` is named: a file inside a folder may bear a patient's name."""
    for path in _paths(where):
        try:
            yield from READERS[path.suffix.lower()](path, where, keys)
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({type(error).__name__})") from None


def _paths(where: Path) -> list[Path]:
    kinds = ", ".join(READERS)
    if where.is_file():
        if where.suffix.lower() not in READERS:
            raise DataError(f"{where}: unsupported suffix", kinds, "convert the file")
        return [where]
    if not where.is_dir():
        raise DataError(f"{where}: no such file", f"a file or a folder of {kinds}")
    try:
        inside = sorted(where.iterdir())
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({type(error).__name__})") from None
    found = [p for p in inside if p.suffix.lower() in READERS and p.name[0] != "." and p.is_file()]
    if not found:
        raise DataError(f"{where}: the folder has no data file", f"files of one of {kinds}")
    suffixes = sorted({path.suffix.lower() for path in found})
    if len(suffixes) > 1:
        mixed = " and ".join(suffixes)
        raise DataError(f"{where}: the folder mixes {mixed}", "one kind of file", "name one file")
    return found


def _jsonl(path: Path, where: Path, keys: Keys) -> Iterator[Row | str]:
    seen: Counter[str] = Counter()
    objects = 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle):
            line = line.removeprefix(BOM) if number == 0 else line
            if not line.strip():
                continue
            row = _json_object(line)
            if isinstance(row, dict):
                objects += 1
                seen.update(row.keys())
            yield row
    if objects:
        # A key of a few records may itself be content; what most of them share is structure.
        _require(where, keys, seen, [key for key, n in seen.items() if 2 * n >= objects])


def _json_object(line: bytes) -> Row | str:
    if b"\0" in line:
        return "NUL byte"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not JSON"
    return value if isinstance(value, dict) else "wrong type"


def _csv(path: Path, where: Path, keys: Keys) -> Iterator[Row | str]:
    csv.field_size_limit(2**31 - 1)
    # surrogateescape: an undecodable byte stays inside its own row, which is then rejected.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        lines = _csv_lines(handle, where)
        header = [name.strip() for name in next(lines, [])]
        if not header:
            return
        # Without a header the first line is a record: its cells are shown only if it is a header.
        is_header = any(column in header for column in keys.values())
        _require(where, keys, header, header if is_header else [])
        for key, column in keys.items():
            if header.count(column) > 1:
                raise DataError(f"{where}: column {column!r} ({key}) occurs twice in the header")
        for cells in lines:
            reason = unclean("".join(cells))
            if reason or len(cells) != len(header):
                yield reason or "wrong column count"
            else:
                yield dict(zip(header, cells, strict=True))


def _csv_lines(handle: TextIO, where: Path) -> Iterator[list[str]]:
    reader = csv.reader(handle, strict=True)
    try:
        yield from filter(None, reader)
    except csv.Error:
        # After a broken quote nobody knows where the next record begins: stop, do not guess.
        raise DataError(
            f"{where}: not well-formed CSV at line {reader.line_num}",
            "fields with a quote, comma or newline in double quotes, and quotes inside doubled",
            "export the file again, or use .jsonl",
        ) from None


def _parquet(path: Path, where: Path, keys: Keys) -> Iterator[Row | str]:
    try:
        with pq.ParquetFile(path) as source:
            present = source.schema_arrow.names
            _require(where, keys, present, present)
            names = sorted(set(keys.values()))
            for batch in source.iter_batches(batch_size=1024, columns=names):
                yield from (_parquet_row(batch, index) for index in range(batch.num_rows))
    except (pa.ArrowException, OSError) as error:
        kind = type(error).__name__
        raise DataError(f"{where}: not a readable Parquet file ({kind})") from None


def _parquet_row(batch: pa.RecordBatch, index: int) -> Row | str:
    try:
        return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return "not UTF-8"


def unclean(text: str) -> str:
    """Why a string cannot be used whatever it says, or "". Lone surrogates count as not UTF-8."""
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "not UTF-8"
    return ""


def _require(where: Path, keys: Keys, present: Iterable[str], listed: list[str]) -> None:
    absent = [(key, column) for key, column in keys.items() if column not in present]
    if not absent:
        return
    key, column = absent[0]
    if listed:
        more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        expected = "one of " + ", ".join(repr(name[:40]) for name in listed[:SHOWN]) + more
    else:
        expected = "a first line that names the columns, separated by commas"
    raise DataError(f"{where}: no column {column!r}, which {key} names", expected, f"correct {key}")


READERS: dict[str, Callable[[Path, Path, Keys], Iterator[Row | str]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
