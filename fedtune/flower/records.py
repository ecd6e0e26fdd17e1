"""Convert arrays to records of Flower's messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from fedtune.core.wire.arrays import Record, pack_arrays


def to_record(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Encode arrays as a record for a Flower message. arrays: name -> array. An array of fp16,
    int8, uint32 or uint64 keeps its type; any other becomes fp32."""
    return as_record(pack_arrays(arrays))


def as_record(packed: Record) -> ArrayRecord:
    """Convert arrays that are encoded already to a record for a Flower message. Their bytes stay
    unchanged. packed: the encoded arrays by name, as `wire.arrays.pack_arrays` returns them."""
    return ArrayRecord(
        {
            name: Array(dtype=one.dtype, shape=tuple(one.shape), stype=one.stype, data=one.data)
            for name, one in packed.items()
        }
    )
