"""Encode rows as JSON of limited length, for the pipe between the process that holds the records
(the vault) and the process that runs a converter.

JSON is used and not pickle, since decoding it runs no code of the other process. The vault sends a
value of type bytes as {"$bytes": base64}; the other process must not return bytes."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence

from fedtune.core.data.sources._interface import Row

BYTES = 16 * 2**20  # largest size of the rows that a conversion returns
GIVEN_BYTES = 128 * 2**20  # largest size of the rows that it is given
VALUES = 2**20  # most values, counted by separators; a decoded one takes up to 100 bytes
SEPARATORS = (b",", b"[", b"{", b":")
MARK = "$bytes"


def given_bytes(rows: Sequence[Row]) -> bytes:
    """Encode one unit's rows, to be sent to the process that converts them. A value of a type that
    JSON does not have, other than bytes, becomes a text. Errors: ValueError if the result is longer
    than GIVEN_BYTES."""
    texts = (value for row in rows for value in row.values() if isinstance(value, str))
    if sum(map(len, texts)) > GIVEN_BYTES:  # a text that many rows share is written for each
        raise ValueError("the rows of a unit are too long to be converted")
    written = json.dumps(list(rows), default=_plain, ensure_ascii=False)
    content = written.encode("utf-8", "surrogatepass")
    if len(content) > GIVEN_BYTES:
        raise ValueError("the rows of a unit are too long to be converted")
    return content


def given_rows(content: bytes) -> list[Row]:
    """Decode the rows that the vault encoded with `given_bytes`."""
    found: list[Row] = json.loads(content.decode("utf-8", "surrogatepass"), object_hook=_with_bytes)
    return found


def returned_bytes(rows: object) -> bytes:
    """Encode the rows that a conversion returned, to be sent back to the vault. Errors: TypeError
    or ValueError if they are not a list of rows of plain values, or are too long."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TypeError("a conversion must return a list of dicts")
    content = json.dumps(rows, ensure_ascii=False, allow_nan=False).encode()
    if len(content) > BYTES:
        raise ValueError("the rows that the conversion returned are too long")
    return content


def returned_rows(content: bytes) -> list[Row]:
    """Decode the rows that a conversion returned in another process, whose bytes are not trusted.
    Errors: ValueError unless they hold a list of dicts with plain, finite values by column, of at
    most BYTES bytes and VALUES values."""
    if len(content) > BYTES or sum(map(content.count, SEPARATORS)) > VALUES:
        raise ValueError("the rows that the conversion returned are too long")
    try:
        found = json.loads(content.decode(), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("the rows that the conversion returned are nested too deep") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError("a conversion must return a list of dicts")
    waiting: list[object] = list(found)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError("not finite")
    return found


def _plain(value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        return {MARK: base64.b64encode(value).decode()}
    return str(value)


def _with_bytes(found: Row) -> object:
    marked = found.get(MARK) if len(found) == 1 else None
    if isinstance(marked, str):
        return base64.b64decode(marked)
    return found


def _refuse(constant: str) -> object:
    raise ValueError(f"the conversion returned {constant}, which is no finite number")
