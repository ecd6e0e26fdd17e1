"""Rows of a JSONL, CSV or Parquet file, or of a folder of one of them.

A bad row is a reason from a fixed list, never an exception. A bad file is a DataError for a person
who can still correct it, and a reason like any other once a site takes part: no row, and no file of
a folder, decides whether the others are read. Neither holds content, and no library's error is
chained, since its message may quote a row.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from fedtune.errors import DataError

Row = dict[str, object]
Keys = Mapping[str, str]  # a configuration key, "data.columns.text", to the column that it names

BOM = b"\xef\xbb\xbf"
SHOWN = 20  # column names in a message
LINE = 64 * 2**20  # bytes of one line of JSONL


class Rejected(Exception):
    """One record cannot be used; the only argument is the reason, a fixed string."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


@dataclass
class Names:
    """The column names met in all files of a dataset, and those that a message may show: a key of a
    few JSON records may itself be content, and so may the first line of a CSV file without one."""

    headers: set[str] = field(default_factory=set)
    shown: list[str] = field(default_factory=list)
    keys: Counter[str] = field(default_factory=Counter)
    objects: int = 0

    def header(self, names: list[str], shown: bool = True) -> None:
        self.headers.update(names)
        if shown:
            self.shown += [name for name in names if name not in self.shown]

    def require(self, where: Path, wanted: Keys) -> None:
        """Errors: DataError for a column that `wanted` names and no file has."""
        present = self.headers | set(self.keys)
        absent = [(key, column) for key, column in wanted.items() if column not in present]
        if not absent or not present:
            return
        key, column = absent[0]
        listed = self.shown + [name for name, n in self.keys.items() if 2 * n >= self.objects]
        if listed:
            more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
            expected = "one of " + ", ".join(repr(name[:40]) for name in listed[:SHOWN]) + more
        else:
            expected = "a first line that names the columns, separated by commas"
        raise DataError(
            f"{where}: no column {column!r}, which {key} names", expected, f"correct {key}"
        )


def rows(where: Path, keys: Keys, *, strict: bool = True) -> Iterator[Row | str]:
    """Each row as a dict, or the reason why it is rejected, in the order of the sorted files.

    strict: for a person who can correct the files before they are used.
    Errors: DataError for a path that is missing or of another kind; if strict also for a single
    file that is unreadable, for CSV that is not well-formed, and for a column that `keys` names and
    no file has. Only `where` is named: a file inside a folder may bear a patient's name.
    Guarantee: if not strict, what is said of a row follows from that row alone, in CSV from a
    well-formed file's; a file that cannot be read is one rejected row.
    """
    names = Names()
    for path in _paths(where):
        try:
            yield from READERS[path.suffix.lower()](path, where, keys, names)
        except NotWellFormed:
            if strict:
                raise
            yield "not well-formed CSV"
        except Exception as error:  # whatever one file makes a library do is that file's matter
            if strict and where.is_file():
                own = error if isinstance(error, DataError) else _unreadable(where, error)
                raise own from None
            yield "unreadable file"
    if strict:
        names.require(where, keys)


class NotWellFormed(DataError):
    """CSV whose quoting is broken: nobody knows where a record ends and the next begins."""


def _unreadable(where: Path, error: Exception) -> DataError:
    return DataError(f"{where}: cannot be read ({type(error).__name__})")


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
        raise _unreadable(where, error) from None
    found = [p for p in inside if p.suffix.lower() in READERS and p.name[0] != "." and p.is_file()]
    if not found:
        raise DataError(f"{where}: the folder has no data file", f"files of one of {kinds}")
    return found


def _jsonl(path: Path, where: Path, keys: Keys, names: Names) -> Iterator[Row | str]:
    with path.open("rb") as handle:
        for number, line in enumerate(_lines(handle)):
            line = line.removeprefix(BOM) if number == 0 else line
            if not line.strip():
                continue
            row = _json_object(line) if len(line) <= LINE else "too long"
            if isinstance(row, dict):
                names.objects += 1
                names.keys.update(row.keys())
            yield row


def _lines(handle: BinaryIO) -> Iterator[bytes]:
    """The lines; of one above LINE bytes the beginning alone, which is above it too."""
    while line := handle.readline(LINE + 1):
        rest = line
        while len(rest) > LINE and not rest.endswith(b"\n"):
            rest = handle.readline(LINE + 1)
        yield line


def _json_object(line: bytes) -> Row | str:
    if b"\0" in line:
        return "NUL byte"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except Exception:  # no JSON, too deep, too large: a line of no use, whatever it is
        return "not JSON"
    return value if isinstance(value, dict) else "wrong type"


def _csv(path: Path, where: Path, keys: Keys, names: Names) -> Iterator[Row | str]:
    csv.field_size_limit(2**31 - 1)
    # surrogateescape: an undecodable byte stays inside its own row, which is then rejected.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        lines = _csv_lines(handle, where)
        header = [name.strip() for name in next(lines, [])]
        if not header:
            return
        # Without a header the first line is a record: its cells are shown only if it is a header.
        names.header(header, shown=any(column in header for column in keys.values()))
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
        raise NotWellFormed(
            f"{where}: not well-formed CSV at line {reader.line_num}",
            "fields with a quote, comma or newline in double quotes, and quotes inside doubled",
            "export the file again, or use .jsonl",
        ) from None


def _parquet(path: Path, where: Path, keys: Keys, names: Names) -> Iterator[Row | str]:
    try:
        with pq.ParquetFile(path) as source:
            present = source.schema_arrow.names
            names.header(present)
            wanted = sorted(set(keys.values()) & set(present))
            for batch in source.iter_batches(batch_size=1024, columns=wanted):
                yield from (_parquet_row(batch, index) for index in range(batch.num_rows))
    except (pa.ArrowException, OSError) as error:
        kind = type(error).__name__
        raise DataError(f"{where}: not a readable Parquet file ({kind})") from None


def _parquet_row(batch: pa.RecordBatch, index: int) -> Row | str:
    try:
        return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return "not UTF-8"
    except Exception:  # a value that Python has no type for: a date in the year 300,000
        return "wrong type"


def unclean(text: str) -> str:
    """Why a string cannot be used whatever it says, or "". Lone surrogates count as not UTF-8."""
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "not UTF-8"
    return ""


READERS: dict[str, Callable[[Path, Path, Keys, Names], Iterator[Row | str]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
