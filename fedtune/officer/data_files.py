"""Describe the files and tables of a site's records for a data report, by counts."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fedtune.core.config import SiteData
from fedtune.core.data.records import Read, source_of
from fedtune.core.data.sources import by_suffix
from fedtune.core.data.sources._encoding import found_encoding

BINARY = (".parquet", ".arrow")
COUPLED = "selected by a query or a view, which may couple patients: outside the guarantee"


@dataclass(frozen=True)
class FileFacts:
    """A file of records or a table of a database.

    The fields: name, size in bytes, apparent encoding, separator of cells (CSV only), number of
    rows, and number of rows that failed."""

    name: str
    size: int
    encoding: str
    delimiter: str
    rows: int
    failed: int


def files_of(data: SiteData, read: Read) -> list[FileFacts]:
    """Return the facts about each file or table that has rows. It does not matter whether the rows
    were read, were left out or failed. If data.path is a single file, its facts are returned even
    if it has no row. read: the result of reading."""
    rows = Counter(record.place.file for record in read.records if record.place)
    failed = Counter(each.file for each in read.failed)
    if data.url:
        return _tables(rows, failed, read)
    folder = data.path if data.path.is_dir() else data.path.parent
    source = source_of(data) or by_suffix().get(".csv")
    delimiter = {",": "comma", ";": "semicolon", "\t": "tab"}
    mark = str(getattr(source, "delimiter", ","))
    facts = []
    named = {data.path.name} if data.path.is_file() else set()
    for name in sorted({*rows, *failed, *read.filtered_in, *read.withheld_in} | named):
        path = folder / name
        csv, there = path.suffix.lower() == ".csv", os.path.isfile(path)
        facts.append(
            FileFacts(
                name,
                path.stat().st_size if there else 0,
                "–" if path.suffix.lower() in BINARY or not there else _encoding(path, source),
                delimiter.get(mark, mark) if csv else "–",
                rows[name] + failed[name] + read.filtered_in[name] + read.withheld_in[name],
                failed[name],
            )
        )
    return facts


def _encoding(path: Path, source: object) -> str:
    """Return the name of the encoding that a file's bytes show. If this is not UTF-8, and the site
    states the encoding by which the file is read, the returned text names the stated encoding too.
    source: the reader of the file's format, which holds the site's statement."""
    found, asked = found_encoding(path), str(getattr(source, "encoding", "utf-8"))
    return f"{found}, read as {asked}" if found.startswith("not") and asked != "utf-8" else found


def _tables(rows: Counter[str], failed: Counter[str], read: Read) -> list[FileFacts]:
    """Return the facts about each table of a database, without size and encoding, which are not
    known. rows, failed: table → its number of rows that were read, and of those that failed. read:
    the result of reading, with the rows that were left out."""
    left_out = read.filtered_in + read.withheld_in
    names = sorted({*rows, *failed, *left_out})
    return [FileFacts(n, 0, "–", "–", rows[n] + failed[n] + left_out[n], failed[n]) for n in names]
