"""Read JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedtune.core.data.sources._encoding import encoding_of
from fedtune.core.data.sources._interface import UTF_16, BadCell, Names, Row, Source
from fedtune.core.files import reading

BOM = b"\xef\xbb\xbf"
LINE = 64 * 2**20  # bytes of one line


@dataclass(frozen=True)
class Jsonl(Source):
    """Reads JSON Lines files: one JSON object on each line. encoding: UTF-8, or an encoding of one
    byte for each character (`encoding_of`)."""

    suffixes = (".jsonl",)

    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        encoding_of(self.encoding)

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        encoding = encoding_of(self.encoding)
        with reading.open_regular(path) as handle:
            for number, line in enumerate(_lines(handle), 1):
                if number == 1 and line.startswith(UTF_16):
                    names.suspect("the file seems to be UTF-16: iconv -f UTF-16 -t UTF-8 FILE")
                line = line.removeprefix(BOM)  # in any line, since files are joined
                if not line.strip():
                    continue
                names.row = number
                row = _json_object(line, encoding) if len(line) <= LINE else "too long"
                if isinstance(row, dict):
                    names.object(row)
                yield row


def json_lines(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Yield (number, row) for each non-empty line of a UTF-8 file; all lines are counted, from 1.
    The row is the line's JSON object, or the reason (a str) why there is none. Errors: OSError."""
    with reading.open_regular(path) as handle:
        for number, line in enumerate(_lines(handle), 1):
            line = line.removeprefix(BOM)
            if line.strip():
                yield number, _json_object(line, "utf-8") if len(line) <= LINE else "too long"


def _lines(handle: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of an open file, with their line ends. Of a line longer than LINE bytes only
    the first LINE + 1 bytes are yielded."""
    while line := handle.readline(LINE + 1):
        tail = line
        while len(tail) > LINE and not tail.endswith(b"\n"):
            tail = handle.readline(LINE + 1)
        yield line


def _json_object(line: bytes, encoding: str) -> Row | str:
    if b"\0" in line:
        return _bad_cell("NUL byte", line, encoding)
    try:
        value = json.loads(line.decode(encoding))
    except UnicodeDecodeError:
        reason = "not UTF-8" if encoding == "utf-8" else "not in the encoding"
        return _bad_cell(reason, line, encoding)
    except MemoryError:  # not the line's fault
        raise
    except Exception:  # no JSON, too deep, too large: an unusable line
        return "not JSON"
    return value if isinstance(value, dict) else "wrong type"


def _bad_cell(reason: str, line: bytes, encoding: str) -> str:
    """Return the reason why a line cannot be used. If the line is a JSON object, and only some
    texts in it have unusable bytes, return the reason as a BadCell, which also holds the object's
    values. encoding: the file's, as Python names it."""
    try:
        value = json.loads(line.decode(encoding, "surrogateescape"), strict=False)
    except MemoryError:
        raise
    except Exception:
        return reason
    return BadCell(reason, value) if isinstance(value, dict) else reason
