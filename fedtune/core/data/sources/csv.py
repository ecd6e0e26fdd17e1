"""Read CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fedtune.core.data.sources._encoding import all_of_a_byte, encoding_of
from fedtune.core.data.sources._interface import (
    DELIMITERS,
    UTF_16,
    BadCell,
    Names,
    NotWellFormed,
    Row,
    Source,
    find_unclean,
    is_header,
)
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.files import reading


@dataclass(frozen=True)
class Csv(Source):
    """Reads CSV files: a first line of column names, then rows.

    - delimiter: the character between two cells
    - encoding: UTF-8, or an encoding of one byte for each character (`encoding_of`)"""

    suffixes = (".csv",)

    delimiter: str = ","
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        encoding_of(self.encoding)
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise ConfigError(
                f"data.options.delimiter = {self.delimiter!r}",
                'one character, such as ";", that is neither a double quote nor a line end',
            )

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        csv.field_size_limit(2**31 - 1)
        encoding = encoding_of(self.encoding)
        with reading.open_regular(path) as file:
            # These bytes are of the header's line, which is no record.
            if file.peek(2).startswith(UTF_16):
                raise DataError(
                    f"{names.where}: the file is UTF-16",
                    "UTF-8",
                    "export it as CSV UTF-8, or: iconv -f UTF-16 -t UTF-8 FILE",
                )
            # surrogateescape: an undecodable byte stays inside its own row, which is then rejected.
            handle = io.TextIOWrapper(
                file,
                encoding="utf-8-sig" if encoding == "utf-8" else encoding,
                errors="surrogateescape",
                newline="",
            )
            lines = self._lines(handle, names.where)
            number, first = next(lines, (0, []))
            header = [name.strip() for name in first]
            if not header:
                return
            self._register(header, names)
            # All rows are read before the first is yielded: after a broken quote no row can be
            # read, and one of the unread rows may withdraw consent.
            for number, cells in list(lines):
                names.row = number
                reason = find_unclean("".join(cells))
                if reason == "not UTF-8" and encoding != "utf-8":
                    reason = "not in the encoding"
                if reason or len(cells) != len(header):
                    found: Row = dict(zip(header, cells, strict=False))
                    yield BadCell(reason or "wrong column count", found)
                else:
                    yield dict(zip(header, cells, strict=True))

    def _register(self, header: list[str], names: Names) -> None:
        """Add the columns in a file's header to `names`. Also add a hint if the file seems to use
        another delimiter. Errors: DataError if a column that study.toml or site.toml names occurs
        twice."""
        # In a file without a header the first line is a record, and must not be shown.
        names.header(header, shown=is_header(header, names.keys))
        for mark, word in DELIMITERS.items():
            if len(header) == 1 and mark != self.delimiter and mark in header[0]:
                parts = [part.strip(' "') for part in header[0].split(mark)]
                if is_header(parts, names.keys):
                    names.shown = [name for name in names.shown if name != header[0]] + parts
                toml = "\\t" if mark == "\t" else mark
                names.suspect(
                    f'the cells seem to be separated by {word}: set in [data] source = "csv" and '
                    f'options = {{ delimiter = "{toml}" }}'
                )
        for key, column in names.keys.items():
            if header.count(column) > 1:
                raise DataError(
                    f"{names.where}: column {column!r} ({key}) occurs twice in the header",
                    "each column once",
                    "rename or remove one of them",
                )

    def _lines(self, handle: TextIO, where: Path | str) -> Iterator[tuple[int, list[str]]]:
        """Yield (number, cells) for each non-empty row of the open file. The number is the one that
        a spreadsheet shows: the header's is 1. where: the name of the data in an error. Errors:
        NotWellFormed if the quoting is broken."""
        reader = csv.reader(handle, strict=True, delimiter=self.delimiter)
        try:
            yield from ((number, cells) for number, cells in enumerate(reader, 1) if cells)
        except csv.Error:
            # After a broken quote the start of the next record is unknown: stop.
            raise NotWellFormed(
                f"{where}: not well-formed CSV at line {reader.line_num}",
                "fields with a quote, comma or newline in double quotes, and quotes inside doubled",
                "export the file again, or use .jsonl; if another character than "
                f"{self.delimiter!r} separates the cells, name it in [data], as in: "
                'source = "csv", options = { delimiter = ";" }',
            ) from None


LINE = 2**16  # bytes of a header at most
WESTERN = "cp1252"  # the encoding of a spreadsheet in western Europe that is not UTF-8


def guess_format(path: Path, wanted: Iterable[str]) -> Csv | None:
    """Guess the delimiter and the encoding of a CSV file, and return a source that reads it so.
    Return None for commas and UTF-8, and for a file that is not CSV. The delimiter is the one with
    which the header has all columns in `wanted`; the encoding follows from the file's bytes.

    A person's own file may need this, since in much of Europe a spreadsheet separates cells by
    semicolons; site.toml then states the dialect. While a site takes part nothing is guessed.

    >>> from pathlib import Path
    >>> file = Path("nord.csv")
    >>> _ = file.write_bytes("Befund;Fach\\nÖdem;Innere\\n".encode("latin-1"))
    >>> guess_format(file, ["Befund", "Fach"])
    Csv(delimiter=';', encoding='cp1252')
    """
    if path.suffix.lower() not in Csv.suffixes:
        return None
    encoding, decoding = "utf-8", "utf-8-sig"
    try:
        if all_of_a_byte(path):
            encoding = decoding = WESTERN
        with reading.open_regular(path) as file:
            line = file.readline(LINE).decode(decoding, "replace")
    except OSError:  # the reader of the file reports it
        return None
    names = {*wanted}
    marks = (mark for mark in (",", *DELIMITERS) if names <= {*_header(line, mark)})
    found = Csv(delimiter=next(marks, ","), encoding=encoding)
    return found if found != Csv() else None


def _header(text: str, mark: str) -> list[str]:
    """Return the cells of the first row of a text; [] if the text is not CSV (an error that is left
    to whoever reads the whole file). mark: the delimiter."""
    try:
        first = next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), [])
    except csv.Error:
        return []
    return [name.strip() for name in first]
