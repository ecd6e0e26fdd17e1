"""CSV data source."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fedtune.data.sources._interface import Names, NotWellFormed, Row, Source, unclean
from fedtune.errors import ConfigError, DataError


@dataclass(frozen=True)
class Csv(Source):
    """Comma-separated values: a first line of column names, then rows. UTF-8."""

    suffixes = (".csv",)

    delimiter: str = ","

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise ConfigError(
                f"data.options.delimiter = {self.delimiter!r}", 'one character, such as ";"'
            )

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        csv.field_size_limit(2**31 - 1)
        # surrogateescape: an undecodable byte stays inside its own row, which is then rejected.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
            lines = self._lines(handle, names.where)
            header = [name.strip() for name in next(lines, [])]
            if not header:
                return
            # Without a header the first line is a record: its cells are shown only if it is one.
            names.header(header, shown=any(column in header for column in names.keys.values()))
            for key, column in names.keys.items():
                if header.count(column) > 1:
                    raise DataError(
                        f"{names.where}: column {column!r} ({key}) occurs twice in the header"
                    )
            for cells in lines:
                reason = unclean("".join(cells))
                if reason or len(cells) != len(header):
                    yield reason or "wrong column count"
                else:
                    yield dict(zip(header, cells, strict=True))

    def _lines(self, handle: TextIO, where: Path) -> Iterator[list[str]]:
        reader = csv.reader(handle, strict=True, delimiter=self.delimiter)
        try:
            yield from filter(None, reader)
        except csv.Error:
            # After a broken quote the start of the next record is unknown: stop.
            raise NotWellFormed(
                f"{where}: not well-formed CSV at line {reader.line_num}",
                "fields with a quote, comma or newline in double quotes, and quotes inside doubled",
                "export the file again, or use .jsonl",
            ) from None
