"""Arrays to and from Flower records, strictly: fp32, no pickle, no more memory than was sent."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from fedtune.errors import InputError

Arrays = dict[str, npt.NDArray[np.float32]]

_MAGIC = b"\x93NUMPY\x01\x00"
_START = len(_MAGIC) + 2  # then the header's length, little-endian
_LONGEST_HEADER = 512  # bytes; NumPy pads to a multiple of 64
# What NumPy writes for a C-ordered fp32 array of at most 8 axes, and nothing else. NumPy's own
# reader evaluates a header as a Python literal, which a crafted one can make fail in many ways.
_HEADER = re.compile(
    rb"\{'descr': '<f4', 'fortran_order': False, 'shape': "
    rb"\(((?:[0-9]{1,12}, ?){0,8}[0-9]{0,12})\), \} *\n"
)


class WireError(InputError):
    """Arrays that came over the wire and are not what was agreed; names and shapes, no values."""


def to_record(arrays: Mapping[str, npt.NDArray[np.float32]]) -> ArrayRecord:
    """Arrays by name, as fp32 (little-endian NumPy .npy bodies on the wire)."""
    return ArrayRecord(
        {n: Array(np.array(a, dtype="<f4", order="C")) for n, a in sorted(arrays.items())}
    )


def bodies(record: ArrayRecord) -> dict[str, bytes]:
    """The bytes of each array as they travel, not parsed: what a seal covers."""
    return {name: array.data for name, array in record.items()}


def check_agreed(record: ArrayRecord, like: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Compare what a record says of itself with `like`, before any body is read.

    | more, fewer or other names        | WireError                                  |
    | a shape, or a type other than fp32 | WireError                                 |
    | more or fewer bytes than the shape | WireError, whatever the body says of itself |
    Guarantee: nothing is allocated in proportion to what the message claims."""
    if len(record) != len(like) or set(record) != set(like):
        raise WireError("other arrays than agreed")
    for name, array in record.items():
        if tuple(array.shape) != like[name].shape:
            raise WireError(f"array {name!r} has another shape than agreed")
        if array.dtype != "float32" or array.stype != "numpy.ndarray":
            raise WireError(f"array {name!r} is not plain fp32")
        extra = len(array.data) - 4 * like[name].size
        if not _START < extra <= _START + _LONGEST_HEADER:
            raise WireError(f"array {name!r} has not the bytes of its shape in plain fp32")


def from_record(record: ArrayRecord) -> Arrays:
    """The arrays of a record.

    Guarantee: a body is decoded only if its own header says fp32, C order and exactly the number
    of bytes that follow, so a small message cannot claim a large array; pickle is never read.
    Errors: WireError."""
    return {name: _decode(name, array.data) for name, array in record.items()}


def _decode(name: str, body: bytes) -> npt.NDArray[np.float32]:
    if body[: len(_MAGIC)] != _MAGIC or len(body) < _START:
        raise WireError(f"array {name[:80]!r} is not in .npy format 1.0")
    start = _START + int.from_bytes(body[len(_MAGIC) : _START], "little")
    found = None
    if start <= _START + _LONGEST_HEADER:
        found = _HEADER.fullmatch(body[_START:start])
    if found is None:
        raise WireError(f"array {name[:80]!r} is not plain fp32 by its header")
    shape = tuple(int(axis) for axis in found[1].split(b",") if axis.strip())
    if len(body) - start != 4 * math.prod(shape):
        raise WireError(f"array {name[:80]!r} is not plain fp32 of its stated shape")
    return np.frombuffer(body, dtype="<f4", offset=start).reshape(shape).copy()
