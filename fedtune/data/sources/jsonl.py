"""JSON Lines data source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedtune.data.sources._interface import Names, Row, Source

BOM = b"\xef\xbb\xbf"
LINE = 64 * 2**20  # bytes of one line


@dataclass(frozen=True)
class Jsonl(Source):
    """One JSON object a line. UTF-8."""

    suffixes = (".jsonl",)

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        with path.open("rb") as handle:
            for number, line in enumerate(_lines(handle)):
                line = line.removeprefix(BOM) if number == 0 else line
                if not line.strip():
                    continue
                row = _json_object(line) if len(line) <= LINE else "too long"
                if isinstance(row, dict):
                    names.object(row)
                yield row


def _lines(handle: BinaryIO) -> Iterator[bytes]:
    """Yield the lines; of one above LINE bytes only a beginning that is above it too."""
    while line := handle.readline(LINE + 1):
        tail = line
        while len(tail) > LINE and not tail.endswith(b"\n"):
            tail = handle.readline(LINE + 1)
        yield line


def _json_object(line: bytes) -> Row | str:
    if b"\0" in line:
        return "NUL byte"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except Exception:  # no JSON, too deep, too large: an unusable line
        return "not JSON"
    return value if isinstance(value, dict) else "wrong type"
