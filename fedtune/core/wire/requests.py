"""Pass requests and answers between the two halves of a site, the courier and the vault.

    courier: Flower, TLS ── Request ──> vault: records, ledger, keys
                         <── Answer ──

A request holds the content of a coordinator's message: tables of plain values, and arrays whose
bytes nobody has parsed. An answer is one table, and arrays. Both cross a socket, or lie in a file
of a spool (spool.py), as JSON and raw bytes (`send`, `receive_request`, `receive_answer`); in a
simulation they are passed as objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from fedtune.core.errors import InputError

if TYPE_CHECKING:  # NumPy starts threads, and the vault imports this before it is confined
    from fedtune.core.wire.arrays import Packed, Record

Kind = Literal["prepare", "train", "ready", "masked", "evaluate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Scalar = str | int | float | bool
Table = Mapping[str, Any]  # a message's values, which are checked where they are read

# The only text that is sent about a failure: its class would reveal something about the records, or
# about the space that they leave on this machine. The site's own log says what happened.
FAILED = "the site's own log says why"
MOST_WORDS = 64 << 20  # bytes of a request's tables: a plan, or the statements of many sites
MOST_ARRAYS = 10_001  # most arrays in a message
MOST_BYTES = 4 << 30  # most bytes of all its arrays together


class Channel(Protocol):
    """A channel for requests and answers, which sends and receives them part by part: a
    multiprocessing Connection, or a file in memory. recv_bytes takes the largest number of bytes
    that the next part may have."""

    def send_bytes(self, sent: bytes, /) -> None: ...

    def recv_bytes(self, most: int, /) -> bytes: ...


class RequestError(InputError):
    """A request or an answer does not have the agreed form, or is longer than one may be."""


@dataclass(frozen=True, repr=False)
class Request:
    """A coordinator's request to a site.

    - kind: what is asked, one of KINDS, such as "prepare" (a plan) or "train"
    - tables: the message's tables of plain values, by name: "plan", "order" or "set"
    - arrays: the adapter, or a plan's frozen arrays, not parsed, by name"""

    kind: Kind
    tables: Mapping[str, Table]
    arrays: Record = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Answer:
    """A site's answer: a table of plain values, and arrays.

    - table: the name under which the values are sent: "admission" (the answer to a plan), "site"
      (to an order) or "" (a failure, without values)
    - fields: the plain values, by name
    - arrays_name: the name under which the arrays are sent; "" if there are none
    - arrays: the arrays in transit, by name"""

    table: str
    fields: Mapping[str, Scalar]
    arrays_name: str = ""
    arrays: Record = field(default_factory=dict)

    @property
    def status(self) -> str:
        return str(self.fields["status"])


def send(connection: Channel, sent: Request | Answer) -> None:
    """Send a request or an answer: a header, then each array's bytes as they are.

    Errors: RequestError if the other half would not read all of it; nothing is sent then. OSError
    if the other half has ended."""
    header: dict[str, Any]
    if isinstance(sent, Request):
        tables = {name: _plain(table) for name, table in sent.tables.items()}
        header = {"kind": sent.kind, "tables": tables}
    else:
        header = {"table": sent.table, "fields": dict(sent.fields), "arrays_name": sent.arrays_name}
    arrays = sorted(sent.arrays.items())
    header["arrays"] = [
        [name, array.dtype, list(array.shape), array.stype] for name, array in arrays
    ]
    announced = json.dumps(header).encode()
    if _is_too_long(len(announced), len(arrays), sum(len(array.data) for _, array in arrays)):
        raise RequestError(
            "the message is too long for the process that receives it (vault or courier)",
            f"at most {MOST_WORDS:,} bytes of tables, and {MOST_ARRAYS:,} arrays of at most "
            f"{MOST_BYTES:,} bytes together",
        )
    connection.send_bytes(announced)
    for _, array in arrays:
        connection.send_bytes(array.data)


def receive_request(connection: Channel) -> Request:
    """Receive a request from the courier. Errors: EOFError or OSError if the courier has ended, or
    if it sends more than a request can hold or a header that cannot be read; RequestError if the
    message does not have the agreed form. After a RequestError, but not after the others, the next
    message can be received."""
    header, arrays = _receive(connection)
    kind, tables = header.get("kind"), header.get("tables")
    if kind not in KINDS or not isinstance(tables, dict) or not all(map(_is_table, tables.items())):
        raise RequestError("not a request", "one of " + ", ".join(KINDS))
    return Request(kind, tables, arrays)


def receive_answer(connection: Channel) -> Answer:
    """Receive an answer from the vault. Errors: EOFError or OSError if the vault has ended, or if
    it sends more than an answer can hold or a header that cannot be read; RequestError if the
    message does not have the agreed form."""
    header, arrays = _receive(connection)
    table = header.get("table")
    fields = header.get("fields")
    name = header.get("arrays_name")
    if not (isinstance(table, str) and isinstance(name, str) and isinstance(fields, dict)):
        raise RequestError("not an answer", "one table of values, and arrays")
    if not _is_table(("", fields)) or not {"status", "reason"} <= set(fields):
        raise RequestError("the answer has no status or no reason", "a status and a reason")
    return Answer(table, fields, name, arrays)


def _receive(connection: Channel) -> tuple[dict[str, Any], dict[str, Packed]]:
    """Receive a message: return its header, and the arrays that the header announces, by name.
    Errors: EOFError, OSError."""
    from fedtune.core.wire.arrays import Packed

    announced = connection.recv_bytes(MOST_WORDS)
    try:
        header = json.loads(announced)
        listed = [(str(n), str(t), tuple(map(int, s)), str(k)) for n, t, s, k in header["arrays"]]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise OSError("a message whose header does not list the arrays that follow") from None
    if _is_too_long(len(announced), len(listed), 0):
        raise OSError("more arrays than a message holds")
    arrays, left = dict[str, Packed](), MOST_BYTES
    for name, dtype, shape, stype in listed:
        body = connection.recv_bytes(left)
        left -= len(body)
        arrays[name] = Packed(dtype, shape, body, stype)
    return header, arrays


def _is_too_long(words: int, arrays: int, data: int) -> bool:
    """Return whether a message is longer than its receiver will read. The sender checks this before
    it sends the first byte: a receiver cannot find the end of a message that is too long, and so
    could not receive any later message.

    - words: the number of bytes of its header, which holds its tables
    - arrays: the number of its arrays
    - data: the number of bytes of all its arrays together"""
    return words > MOST_WORDS or arrays > MOST_ARRAYS or data > MOST_BYTES


def _plain(table: Table) -> dict[str, Scalar]:
    """Return the named values of a message in a form that JSON can hold: a value that is not a
    bool, int, float or str becomes text."""
    return {
        str(name): value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in table.items()
    }


def _is_table(named: tuple[str, Any]) -> bool:
    _, table = named
    return isinstance(table, dict) and all(
        isinstance(value, bool | int | float | str) for value in table.values()
    )


__all__ = [
    "FAILED",
    "KINDS",
    "Answer",
    "Channel",
    "Kind",
    "Request",
    "RequestError",
    "receive_answer",
    "receive_request",
    "send",
]
