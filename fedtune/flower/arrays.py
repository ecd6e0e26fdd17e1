"""Arrays to and from Flower records, strictly: fp32, no pickle, no more memory than was sent."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from fedtune.errors import InputError

Arrays = dict[str, npt.NDArray[np.float32]]


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


def from_record(record: ArrayRecord) -> Arrays:
    """The arrays of a record.

    Guarantee: a body is decoded only if its own header says fp32, C order and exactly the number
    of bytes that follow, so a small message cannot claim a large array; pickle is never read.
    Errors: WireError."""
    return {name: _decode(name, array) for name, array in record.items()}


def _decode(name: str, array: Array) -> npt.NDArray[np.float32]:
    body = io.BytesIO(array.data)
    try:
        if np.lib.format.read_magic(body) != (1, 0):
            raise ValueError
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(body)
    except ValueError:
        raise WireError("an array on the wire is not in .npy format 1.0") from None
    size = int(np.prod(shape, dtype=object))
    if dtype != np.dtype("<f4") or fortran or len(array.data) - body.tell() != 4 * size:
        raise WireError(f"array {name[:80]!r} on the wire is not plain fp32 of its stated shape")
    return np.frombuffer(array.data, dtype="<f4", offset=body.tell()).reshape(shape).copy()
