"""Encode updates and adapters for the wire: fp32, fp16, or int8 in blocks.

    float32   the numbers themselves
    float16   BLOCK numbers at a time, divided by a power of two that brings the largest of them
              just below 2¹⁵
    int8      BLOCK numbers at a time, divided by 1/127 of the largest of them, then rounded to
              the nearest integer

All tensors travel as one array VALUES, one after another in name order: names and shapes follow
from the plan, and each further array would cost Flower more. The divisors of the blocks travel in a
second array, SCALES, fp32. No block has numbers of two tensors, so that a small tensor beside a
large one keeps its digits.

x is a number, m the largest magnitude in its block, and both are finite:

| encoding | |decoded - x| is at most         | bytes a number | GROWTH: how far a norm can rise |
| float32  | 0                                | 4              | 1                               |
| float16  | the larger of |x|/2¹¹ and m/2³⁹  | 2.016          | 1 + 2⁻¹⁰                        |
| int8     | m/254 · (1 + 2⁻¹⁵) + 2⁻¹²⁷       | 1.016          | 1 + √BLOCK/254 · (1 + 2⁻¹⁵)     |

(int8: ‖error‖² ≤ Σ BLOCK · (m/254)² over the blocks, and no block's m is above its norm.)
Guarantee: the same numbers give the same bytes. A number that is not finite makes its block's scale
not finite, which `decode` refuses. Encoding is post-processing of noised updates and costs no ε."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.core.config import Encoding
from fedtune.core.errors import InputError

Arrays = dict[str, npt.NDArray[np.float32]]
Encoded = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]

VALUES, SCALES = "values", "scales"
BLOCK = 256
GROWTH: dict[Encoding, float] = {
    "float32": 1.0,
    "float16": 1 + 2.0**-10,
    "int8": 1 + math.sqrt(BLOCK) / 254 * (1 + 2.0**-15),
}
_LARGEST_FP16 = 32752.0  # the largest below 2¹⁵: a scale of 2¹¹³ carries it below fp32's largest
_SMALLEST = np.float32(2.0**-126)  # smallest scale; smaller ones would not be normal fp32


class WireError(InputError):
    """Received arrays do not have the agreed form. The message of this error holds names and
    shapes, no values."""


class Form(NamedTuple):
    """The type (NumPy's name) and the shape that an array in transit must have; the array is not
    read yet."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


def shapes(arrays: Mapping[str, npt.NDArray[Any]]) -> Shapes:
    return {name: array.shape for name, array in arrays.items()}


def digest(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the sha256 over the arrays' names, shapes and fp32 bytes, in name order, as "sha256:"
    and hexadecimal digits."""
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name], dtype=np.float32)
        sha256.update(f"{name} {value.shape}\n".encode())
        sha256.update(value.data)
    return "sha256:" + sha256.hexdigest()


def length(arrays: Arrays) -> float:
    """Compute the Euclidean norm of all numbers of the arrays together, in fp64. It is not finite
    if one of the numbers is not."""
    # No sum of squares of fp32 numbers overflows in fp64. A dot product would wake BLAS' threads.
    squares = (np.square(array, dtype=np.float64).sum() for array in arrays.values())
    return math.sqrt(sum(map(float, squares)))


def layout(agreed: Shapes, encoding: Encoding) -> dict[str, Form]:
    """Return the type and shape of each array that `encode` makes with this encoding from tensors
    of the `agreed` shapes, by name (VALUES, SCALES)."""
    forms = {VALUES: Form(encoding, (_size(agreed),))}
    if encoding != "float32":
        forms[SCALES] = Form("float32", _starts(agreed).shape)
    return forms


def encode(arrays: Mapping[str, npt.NDArray[np.float32]], encoding: Encoding) -> Encoded:
    """Encode fp32 arrays for the wire. Return all their numbers as the array VALUES and, for
    float16 and int8, the blocks' divisors as the array SCALES."""
    parts = [np.asarray(array, np.float32).ravel() for _, array in sorted(arrays.items())]
    flat = np.concatenate([np.zeros(0, np.float32), *parts])
    if encoding == "float32":
        return {VALUES: flat}
    starts = _starts(shapes(arrays))
    largest = np.maximum.reduceat(np.abs(flat), starts)
    scale = _int8_scale(largest) if encoding == "int8" else _float16_scale(largest)
    with np.errstate(invalid="ignore"):
        codes = np.divide(flat, _spread(scale, starts, flat.size), out=flat)
    if not np.isfinite(scale).all():  # 0, under a scale that is not finite
        np.nan_to_num(codes, copy=False)
    if encoding == "int8":
        np.rint(codes, out=codes)
    else:
        np.clip(codes, -_LARGEST_FP16, _LARGEST_FP16, out=codes)
    return {VALUES: codes.astype(encoding), SCALES: scale}


def decode(encoded: Encoded, agreed: Shapes) -> Arrays:
    """Decode what `encode` returned, and return the tensors in fp32, by name. The type of the
    encoded numbers tells which encoding was used. agreed: the tensors' shapes, by name.

    Guarantee: how many numbers and blocks are read follows from the `agreed` shapes alone.
    Errors: WireError in these cases: the arrays have other names or types than `encode` gives them;
    there are more or fewer numbers than agreed; the scales are missing, or one of them is not
    positive and finite, or their number is not that of the blocks."""
    values, scales = encoded.get(VALUES), encoded.get(SCALES)
    if values is None or set(encoded) - {VALUES, SCALES}:
        raise WireError("the message has other arrays than agreed")
    if values.shape != (_size(agreed),):
        raise WireError("there are not as many numbers as agreed")
    if scales is None and values.dtype != np.float32:
        raise WireError("there are numbers without their scales")
    if scales is not None:
        values = _scale_values(values, scales, _starts(agreed))
    tensors, at = Arrays(), 0
    for name, shape in sorted(agreed.items()):
        tensors[name] = values[at : at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)
    return tensors


def _scale_values(
    values: npt.NDArray[Any], scales: npt.NDArray[Any], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    if values.dtype.name not in ("float16", "int8") or scales.dtype != np.float32:
        raise WireError(
            "there are scales, but the numbers are not float16 or int8, or the scales are not "
            "float32"
        )
    if scales.shape != starts.shape:
        raise WireError("there is not one scale for each block")
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise WireError("there is a scale that is not a positive number")
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile code: caught as not finite
        decoded = _spread(scales, starts, values.size)
        decoded *= values
    return decoded


def _size(agreed: Shapes) -> int:
    return sum(map(math.prod, agreed.values()))


def _starts(agreed: Shapes) -> npt.NDArray[np.int64]:
    """Return, for each block, the index of its first number. The numbers of all tensors are counted
    one after another, in name order of the tensors. agreed: the tensors' shapes, by name."""
    starts, at = list[int](), 0
    for _, shape in sorted(agreed.items()):
        starts += range(at, at + math.prod(shape), BLOCK)
        at += math.prod(shape)
    return np.array(starts, np.int64)


def _spread(
    scale: npt.NDArray[np.float32], starts: npt.NDArray[np.int64], size: int
) -> npt.NDArray[np.float32]:
    """Repeat the scale of each block for all its numbers. starts: the index of each block's first
    number; size: the number of all numbers, which is the length of the result."""
    return np.repeat(scale, np.diff(starts, append=size))


def _int8_scale(largest: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the divisor of each int8 block: the largest fp32 scale with 127 · scale ≤ `largest`,
    so that decoding cannot overflow. largest: the largest magnitude in each block."""
    exact = largest.astype(np.float64)
    scale = (exact / 127).astype(np.float32)
    above = scale.astype(np.float64) * 127 > exact
    scale = np.where(above, np.nextafter(scale, np.float32(0)), scale)
    return np.maximum(scale, _SMALLEST)


def _float16_scale(largest: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    _, exponent = np.frexp(largest)  # largest < 2 ** exponent
    scale = np.ldexp(np.float32(1), np.maximum(exponent - 15, -126)).astype(np.float32)
    return np.where(np.isfinite(largest), scale, largest)
