"""Draw Gaussian noise in multiples of a grid. Its random bits come from a keystream that no seed
can repeat."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

if TYPE_CHECKING:
    import torch

_BLOCK = 2**14  # pairs drawn at once: the working set stays in the processor's cache


def _keystream(sizes: Iterator[int]) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield, for each of `sizes`, an array of so many random uint64. All come from one AES-256-CTR
    keystream under a fresh key of the system's generator."""
    encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    for size in sizes:
        yield np.frombuffer(encryptor.update(bytes(8 * size)), dtype=np.uint64)


def gaussian_on_grid(dimension: int, std: float, grid: float) -> torch.Tensor:
    """Draw Gaussian noise for a sum that counts multiples of `grid`, as such multiples: round(N(0,
    std²) / grid), int64 (dimension,).

    Each number is rounded from the sum of two Gaussians of variance std²/2, by Box–Muller in fp64
    on 53-bit uniforms. One Gaussian would not suffice: Box–Muller takes both numbers of a pair from
    one radius. Beyond 6.8 standard deviations neighbouring radii are further apart than the grid,
    so that some grid points cannot occur, and a result at one of them would exclude a neighbouring
    dataset. A sum of two has such gaps only if both radii are so large, with a probability of 2⁻⁷⁰
    for a pair. The tail ends at 12.1 std (10⁻³³).
    Guarantee: sum and noise lie on the grid, so the result equals a rounded continuous Gaussian
    mechanism. Rounding is post-processing, and no floating-point attack is left. Each call has a
    key of its own; nothing that a caller passes or sets decides the random bits.
    Source: Mironov 2012; Balle & Wang 2018; Holohan & Braghin 2021, "Secure random sampling in
    differential privacy" (sums of several Gaussians against what fp64 shows of one).
    Memory: 8 bytes for each number of the result, and at most 2¹⁵ pairs at once.
    Errors: ValueError when std or grid is not positive and finite, or their ratio does not fit the
    integers. No argument gives zero noise."""
    import torch  # here alone, as in clip.py

    scale = std / grid if std > 0 and grid > 0 else math.nan
    if not (math.isfinite(std) and math.isfinite(grid) and 0 < scale < 2.0**59):
        raise ValueError(
            "noise needs a standard deviation and a grid that are positive and finite, and a "
            "standard deviation of less than 2⁵⁹ grid steps"
        )
    noise = np.empty(dimension, dtype=np.int64)
    starts = range(0, dimension, 2 * _BLOCK)
    pairs = [min(_BLOCK, (dimension - start + 1) // 2) for start in starts]
    for start, bits in zip(starts, _keystream(4 * n for n in pairs), strict=True):
        half = len(bits) // 4
        first, second = (_pairs(part, scale / math.sqrt(2.0)) for part in np.split(bits, 2))
        # Each pair's cosine and sine go half a block apart; an odd dimension drops the last sine.
        noise[start : start + 2 * half] = np.rint(first + second)[: dimension - start]
    return torch.from_numpy(noise)


def _pairs(bits: npt.NDArray[np.uint64], scale: float) -> npt.NDArray[np.float64]:
    """Convert random bits to Gaussians of standard deviation `scale`, as many as `bits` has
    numbers. Two numbers make a pair, which gives a cosine and a sine; first the cosines of all
    pairs are returned, then the sines."""
    half = len(bits) // 2
    uniform = (bits >> np.uint64(11)).astype(np.float64)
    radius = scale * np.sqrt(-2.0 * np.log((uniform[:half] + 1.0) * 2.0**-53))  # log of (0, 1]
    angle = (2.0 * np.pi * 2.0**-53) * uniform[half:]
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
