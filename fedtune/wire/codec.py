"""Updates and adapters as they travel: plain fp32, fp16, or int8 in blocks.

    float32   the numbers themselves
    float16   a tensor over a power of two that brings its largest number just below 2¹⁵
    int8      each BLOCK numbers of a tensor over 1/127 of their largest, rounded to the nearest

A tensor keeps its name and shape. What it was divided by travels beside it, as one fp32 array under
the name SCALES: a number per block (float16: per tensor), tensors in name order.

For a number x, m the largest magnitude in its block (float16: in its tensor), both finite:

| encoding | |decoded - x| is at most         | bytes a number | GROWTH: how far a norm can rise |
| float32  | 0                                | 4              | 1                               |
| float16  | the larger of |x|/2¹¹ and m/2³⁹  | 2              | 1 + 2⁻¹⁰                        |
| int8     | m/254 · (1 + 2⁻¹⁵) + 2⁻¹²⁷       | 1.016          | 1 + √BLOCK/254 · (1 + 2⁻¹⁵)     |

(int8: ‖error‖² ≤ Σ BLOCK · (m/254)² over the blocks, and no block's m is above its norm.)
Guarantee: the same numbers give the same bytes. A number that is not finite makes its block's scale
not finite, which `decode` refuses. All of it works on what was noised already: no ε.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.config import Encoding
from fedtune.errors import InputError

Arrays = dict[str, npt.NDArray[np.float32]]
Encoded = dict[str, npt.NDArray[Any]]

SCALES = "scales"
BLOCK = 256
GROWTH: dict[Encoding, float] = {
    "float32": 1.0,
    "float16": 1 + 2.0**-10,
    "int8": 1 + math.sqrt(BLOCK) / 254 * (1 + 2.0**-15),
}
_LARGEST_FP16 = 32752.0  # the largest below 2¹⁵: a scale of 2¹¹³ carries it below fp32's largest
_SMALLEST = np.float32(2.0**-126)  # of a scale; smaller ones would not be normal fp32


class WireError(InputError):
    """Arrays that came over the wire and are not what was agreed; names and shapes, no values."""


class Form(NamedTuple):
    """Type (as NumPy names it) and shape of an array that is yet to be read."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


def layout(like: Mapping[str, npt.NDArray[np.float32]], encoding: Encoding) -> dict[str, Form]:
    """What arrays with the names and shapes of `like` travel as: `encode`, without the numbers."""
    forms = {name: Form(encoding, array.shape) for name, array in like.items()}
    if encoding != "float32":
        forms[SCALES] = Form("float32", (sum(_blocks(a.size, encoding) for a in like.values()),))
    return forms


def encode(arrays: Mapping[str, npt.NDArray[np.float32]], encoding: Encoding) -> Encoded:
    """fp32 arrays as they travel; no name may be SCALES."""
    if encoding == "float32":
        return dict(arrays)
    assert SCALES not in arrays
    found: Encoded = {}
    scales = [np.zeros(0, np.float32)]
    for name, array in sorted(arrays.items()):
        found[name], scale = _packed(np.asarray(array, np.float32), encoding)
        scales.append(scale)
    return {**found, SCALES: np.concatenate(scales)}


def decode(encoded: Encoded) -> Arrays:
    """The inverse of `encode`, in fp32; the encoding is told by the arrays' type.

    Guarantee: how many blocks there are follows from the tensors alone.
    Errors: WireError where the arrays are of several types, or the scales are not one positive and
    finite number for each block."""
    encoded = dict(encoded)
    scales = encoded.pop(SCALES, None)
    kinds = {array.dtype.name for array in encoded.values()}
    if scales is None:
        if kinds - {"float32"}:
            raise WireError("arrays without their scales")
        return encoded
    if len(kinds) != 1 or not kinds <= {"float16", "int8"} or scales.dtype != np.float32:
        raise WireError("scales beside arrays that have none")
    encoding: Encoding = "int8" if kinds == {"int8"} else "float16"
    blocks = [_blocks(array.size, encoding) for _, array in sorted(encoded.items())]
    if scales.shape != (sum(blocks),):
        raise WireError("not one scale for each block")
    if not (np.isfinite(scales) & (scales > 0)).all():
        raise WireError("a scale that is not a positive number")
    ends = np.cumsum(blocks)
    return {
        name: _unpacked(encoded[name], scales[end - count : end], encoding)
        for name, count, end in zip(sorted(encoded), blocks, ends, strict=True)
    }


def _width(size: int, encoding: Encoding) -> int:
    return BLOCK if encoding == "int8" else max(size, 1)


def _blocks(size: int, encoding: Encoding) -> int:
    return -(-size // _width(size, encoding))


def _packed(
    array: npt.NDArray[np.float32], encoding: Encoding
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Codes in the shape of `array`, and the scale of each of its blocks."""
    rows = np.zeros((_blocks(array.size, encoding), _width(array.size, encoding)), np.float32)
    rows.ravel()[: array.size] = array.ravel()
    largest = np.abs(rows).max(axis=1, initial=0.0)
    scale = _int8_scale(largest) if encoding == "int8" else _float16_scale(largest)
    with np.errstate(invalid="ignore"):  # not finite: 0, under a scale that is not finite
        codes = np.nan_to_num(rows / scale[:, None]).ravel()[: array.size]
    if encoding == "int8":
        return np.rint(codes).astype(np.int8).reshape(array.shape), scale
    codes = np.clip(codes, -_LARGEST_FP16, _LARGEST_FP16)
    return codes.astype(np.float16).reshape(array.shape), scale


def _int8_scale(largest: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The largest fp32 of which 127 times is not above `largest`: nothing overflows on the way
    back."""
    exact = largest.astype(np.float64)
    scale = (exact / 127).astype(np.float32)
    above = scale.astype(np.float64) * 127 > exact
    scale = np.where(above, np.nextafter(scale, np.float32(0)), scale)
    return np.maximum(scale, _SMALLEST)


def _float16_scale(largest: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    _, exponent = np.frexp(largest)  # largest < 2 ** exponent
    scale = np.ldexp(np.float32(1), np.maximum(exponent - 15, -126)).astype(np.float32)
    return np.where(np.isfinite(largest), scale, largest)


def _unpacked(
    codes: npt.NDArray[Any], scale: npt.NDArray[np.float32], encoding: Encoding
) -> npt.NDArray[np.float32]:
    each = np.repeat(scale, _width(codes.size, encoding))[: codes.size]
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile code: caught as not finite
        return (codes.astype(np.float32).ravel() * each).reshape(codes.shape)
