"""Convert arrays to records of Flower's messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from fedtune.core.wire.arrays import Record, pack_arrays


def to_record(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Encode name -> array for a message, in the form of `wire.arrays.pack_arrays`."""
    return as_record(pack_arrays(arrays))


def as_record(packed: Record) -> ArrayRecord:
    """Put packed arrays into a record of Flower, with their bytes unchanged."""
    return ArrayRecord(
        {
            name: Array(dtype=one.dtype, shape=tuple(one.shape), stype=one.stype, data=one.data)
            for name, one in packed.items()
        }
    )
