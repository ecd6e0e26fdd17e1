"""Encode arrays for the wire: NumPy .npy bodies, each with the type and shape that it declares.

Decoding uses no pickle, and no more memory than was sent. This module does not import Flower: it
makes a `Packed` of each array, and flower/records.py puts these into Flower's ArrayRecord."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedtune.core.config import LoraTable
from fedtune.core.registry.arrays import CLASS_BASIS, CLASS_MEAN, MOST_DIRECTIONS
from fedtune.core.wire.codec import (
    GROWTH,
    VALUES,
    Arrays,
    Encoded,
    Form,
    Shapes,
    WireError,
    decode,
    layout,
)

__all__ = [
    "Arrays",
    "Encoded",
    "Packed",
    "WireError",
    "bodies",
    "check_agreed",
    "pack_arrays",
    "read_agreed",
    "read_frozen",
    "unpack_arrays",
]

NPY = "numpy.ndarray"  # Flower's name of NumPy's .npy format
MATRICES = 10_000
LONGEST_NAME = 512
WIDEST = 1 << 20  # most rows, and most columns, of a frozen matrix
_MAGIC = b"\x93NUMPY\x01\x00"
_START = len(_MAGIC) + 2  # where the header's length stands, little-endian
_LONGEST_HEADER = 512  # bytes; NumPy pads to a multiple of 64
# By name: as .npy bodies spell them.
_TYPES = {"float32": "<f4", "float16": "<f2", "int8": "|i1", "uint32": "<u4", "uint64": "<u8"}
# Matches what NumPy writes for a C-ordered array of these types and at most 8 axes, and nothing
# else. NumPy's own reader evaluates a header as a Python literal, and a crafted header can make it
# fail in many ways.
_HEADER = re.compile(
    rb"\{'descr': '(<f4|<f2|\|i1|<u4|<u8)\', 'fortran_order': False, 'shape': "
    rb"\(((?:[0-9]{1,12}, ?){0,8}[0-9]{0,12})\), \} *\n"
)


class InTransit(Protocol):
    """An array in transit, whose bytes nobody has parsed: NumPy's name of its type, its shape, its
    bytes and their encoding. Flower's `Array` has these attributes, and so has `Packed`."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def stype(self) -> str: ...
    @property
    def data(self) -> bytes: ...


@dataclass(frozen=True, repr=False)
class Packed:
    """An array in transit.

    - dtype: NumPy's name of the numbers' type, as the sender states it
    - shape: the array's shape, as the sender states it
    - data: the bytes that were or will be sent, not parsed
    - stype: how `data` is encoded; "numpy.ndarray", the usual value, is NumPy's .npy format"""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    stype: str = NPY


Record = Mapping[str, InTransit]


def pack_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Packed]:
    """Encode arrays for the wire, each as a little-endian NumPy .npy body; return them by name.
    Arrays of fp16, int8 and unsigned words (32 or 64 bits) keep their type; any other type becomes
    fp32."""
    return {name: _pack_array(array) for name, array in sorted(arrays.items())}


def _pack_array(array: npt.NDArray[Any]) -> Packed:
    plain = np.array(array, dtype=_TYPES.get(array.dtype.name, "<f4"), order="C")
    written = io.BytesIO()
    np.lib.format.write_array(written, plain, version=(1, 0), allow_pickle=False)
    return Packed(str(plain.dtype), plain.shape, written.getvalue())


def bodies(record: Record) -> dict[str, bytes]:
    """Return, by name, the bytes of each array in transit as they were sent, unparsed. A seal
    covers these bytes."""
    return {name: array.data for name, array in record.items()}


def check_agreed(record: Record, agreed: Mapping[str, Form]) -> None:
    """Check, before any body is read, that the names, types and shapes that a record declares are
    the agreed ones.

    | the record has                                        | result    |
    | more, fewer or other names                            | WireError |
    | another shape or type                                 | WireError |
    | a body with more or fewer bytes than its shape needs  | WireError |
    The header inside a body is not read. Guarantee: no memory is allocated in proportion to what
    the message claims."""
    if len(record) != len(agreed) or set(record) != set(agreed):
        raise WireError("the message has other arrays than agreed")
    for name, array in record.items():
        if tuple(array.shape) != agreed[name].shape:
            raise WireError(f"array {name!r} has another shape than agreed")
        if array.dtype != agreed[name].dtype or array.stype != NPY:
            raise WireError(
                f"array {name!r} is not {agreed[name].dtype} in NumPy's format, as was agreed"
            )
        extra = len(array.data) - agreed[name].nbytes
        if not _START < extra <= _START + _LONGEST_HEADER:
            raise WireError(f"array {name!r} has not as many bytes as its shape needs")


def read_agreed(record: Record, agreed: Shapes) -> Arrays:
    """Decode an adapter or an update that was received, and return its tensors in fp32, by name.
    They must have the `agreed` shapes; any encoding of codec.py is accepted. No body is read before
    `check_agreed` has passed. Errors: WireError."""
    encoding = record[VALUES].dtype if VALUES in record else ""
    if encoding not in GROWTH:
        raise WireError("the numbers are in no known encoding")
    check_agreed(record, layout(agreed, encoding))
    return decode(unpack_arrays(record), agreed)


def read_frozen(record: Record, lora: LoraTable | None, has_basis: bool = False) -> Arrays:
    """Decode a plan's frozen arrays, and return them in fp32, by name. The names and shapes of all
    are checked before one is read.

    - record: the arrays as the coordinator sent them with the plan
    - lora: the plan's table [lora]; None if it has none
    - has_basis: whether the plan names a basis of class statistics

    With LoRA, these arrays are allowed: the matrices A, with `rank` rows, if A comes from public
    text; and the matrices of the preconditioner (W or U, lora.preconditioner). A plan for class
    statistics (`has_basis`) must have their basis and mean, and nothing else.
    Errors: WireError."""
    shapes = {name: tuple(array.shape) for name, array in record.items()}
    if has_basis and lora is None:
        _check_basis(shapes)
        check_agreed(record, {name: Form("float32", shape) for name, shape in shapes.items()})
        return unpack_arrays(record)
    if shapes and (lora is None or (lora.a_init == "seed" and not lora.preconditioner)):
        raise WireError("there are arrays that the plan has no use for")
    if len(shapes) > MATRICES or any(len(name) > LONGEST_NAME for name in shapes):
        raise WireError("there are more matrices, or longer names, than a network has")
    for name, shape in shapes.items():
        if lora is None or len(shape) != 2 or not _fits(name, *shape, lora):
            raise WireError("a matrix has another shape than the plan gives it")
    check_agreed(record, {name: Form("float32", shape) for name, shape in shapes.items()})
    return unpack_arrays(record)


def _check_basis(shapes: Shapes) -> None:
    """Check that the names and shapes are those of a basis of class statistics, (k, H), and its
    mean, (H,), and that no other array came with them. Errors: WireError."""
    basis, mean = shapes.get(CLASS_BASIS, ()), shapes.get(CLASS_MEAN, ())
    if set(shapes) != {CLASS_BASIS, CLASS_MEAN} or len(basis) != 2 or mean != basis[1:]:
        raise WireError("the plan names a basis of class statistics, and other arrays came with it")
    if not (0 < basis[0] <= MOST_DIRECTIONS and 0 < basis[1] <= WIDEST):
        raise WireError("the basis has another shape than a plan can have")


def _fits(name: str, rows: int, columns: int, lora: LoraTable) -> bool:
    """Return whether a plan may have a frozen matrix of this name and shape: a public A, or a
    matrix of the preconditioner with as many columns as lora.preconditioner states."""
    table = lora.preconditioner
    if not any(mark in name for mark in (".lora_M.", ".lora_U.")):
        return lora.a_init == "public" and rows == lora.rank and 0 < columns <= WIDEST
    if table is None or (".lora_U." in name) != table.narrow:
        return False
    return 0 < columns == min(table.rank, rows - 1) and rows <= WIDEST


def unpack_arrays(record: Record) -> Encoded:
    """Decode arrays in transit; return NumPy arrays by name.

    Guarantee: a body is decoded only if its own header states C order, the type that the record
    declares, and a shape that needs exactly as many bytes as follow. So a small message cannot
    claim a large array. Pickle is never read. Errors: WireError."""
    return {name: _decode(name, array.dtype, array.data) for name, array in record.items()}


def _decode(name: str, dtype: str, data: bytes) -> npt.NDArray[Any]:
    label = f"array {name[:80]!r}"
    if data[: len(_MAGIC)] != _MAGIC or len(data) < _START:
        raise WireError(f"{label} is not in .npy format 1.0")
    start = _START + int.from_bytes(data[len(_MAGIC) : _START], "little")
    header = None
    if start <= _START + _LONGEST_HEADER:
        header = _HEADER.fullmatch(data[_START:start])
    if header is None or _TYPES.get(dtype) != header[1].decode():
        raise WireError(f"{label} is not plain {dtype[:20]}: its header says otherwise")
    shape = tuple(int(axis) for axis in header[2].split(b",") if axis.strip())
    kind = np.dtype(_TYPES[dtype])
    if len(data) - start != kind.itemsize * math.prod(shape):
        raise WireError(f"{label} has not as many bytes as its shape needs")
    return np.frombuffer(data, dtype=kind, offset=start).reshape(shape).copy()
