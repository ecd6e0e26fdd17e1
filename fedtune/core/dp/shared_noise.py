"""Compute the grid and the word size of a sum to which several sites add shares of the noise.

Each site rounds its numbers to multiples of one grid, so that sums are exact integers. Each number
is then masked as a word of 32 or 64 bits, in which the sum must fit. Grid and word size follow from
the plan and from sizes that people declared."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedtune.core.config import Study, noise_shares
from fedtune.core.errors import ConfigError

FINEST = 16  # the grid is at most 2⁻¹⁶ of a site's own noise
SLACK = 0.005  # share of C that rounding to the grid may add to one row's norm
TAIL = 8.5  # standard deviations of noise that a word leaves room for: all but 2 · 10⁻¹⁷
WORDS = (32, 64)  # bits
LARGEST = 2**34  # most numbers of an adapter
ROWS = 2  # a sum cannot wrap while each site has at most this many times its declared size


def own_sigma(sigma: float, shares: int) -> float:
    """Return the σ that each of `shares` sites must add so that their noise together has σ; for one
    site this is σ itself."""
    return sigma if shares == 1 else math.nextafter(sigma / math.sqrt(shares), math.inf)


def joint_sigma(own: float, shares: int) -> float:
    """Return the σ of the noise in a sum to which each of `shares` sites added noise of σ `own`. If
    `own` was returned by `own_sigma`, this is at least the σ that was passed to it.

    >>> all(joint_sigma(own_sigma(s / 7, n), n) >= s / 7 for s in range(1, 50) for n in range(1, 9))
    True
    """
    return own if shares == 1 else own * math.sqrt(shares)


def grid(noise_std: float, max_grad_norm: float, dimension: int) -> float:
    """Return the grid, in gradient units, of which every site's sum counts multiples. It is the
    largest power of two that is at most 2⁻¹⁶ of a site's own noise (`noise_std`), and so small that
    √d/2 times the grid is at most 0.5 % of C.

    - noise_std: the standard deviation of one site's noise, in gradient units
    - max_grad_norm: C, the bound on a row's norm
    - dimension: d, how many numbers the sum has

    This grid is coarser than that of a site whose sum is opened by itself, so that sums fit 32
    bits. The noise is at least 2¹⁶ times the grid, so that a sum of rounded Gaussians differs from
    a rounded Gaussian by no more than exp(-π² 2³²) (decision 0047).

    >>> grid(1.0, 1.0, 100) == 2.0**-16
    True
    >>> grid(1.0, 1.0, 1_000_000)
    7.62939453125e-06"""
    steps = min(noise_std * 2.0**-FINEST, 2 * SLACK * max_grad_norm / math.sqrt(max(dimension, 1)))
    return 2.0 ** math.floor(math.log2(steps))


def grid_of(study: Study, sigma: float | None, dimension: int) -> float:
    """Return the grid, in gradient units, of which the sums in a study with [secure_aggregation]
    count multiples.

    - study: the plan, which says C and how many sites share the noise
    - sigma: σ of the sum's noise, in multiples of C; None if privacy is off, and the grid is then
      that for noise of standard deviation C
    - dimension: how many numbers the sum has"""
    assert study.clipping is not None
    norm = study.clipping.max_grad_norm
    own = 1.0 if sigma is None else own_sigma(sigma, noise_shares(study))
    return grid(own * norm, norm, dimension)


def bits_of(study: Study, sigma: float | None, sizes: Iterable[int], dimension: int) -> int:
    """Return how many bits, 32 or 64, a masked number needs so that the sum over all sites fits.

    - study: the plan, which says C, the most rows of a unit, and how many sites share the noise
    - sigma: σ of the sum that is opened, in multiples of C; None if privacy is off
    - sizes: the declared size of each site in the sum
    - dimension: how many numbers the sum has, on which the grid depends

    Errors: ConfigError as for `word_bits`."""
    assert study.clipping is not None
    norm, noise = study.clipping.max_grad_norm, 0.0 if sigma is None else sigma
    step = grid_of(study, sigma, dimension)
    std = own_sigma(noise, noise_shares(study)) * norm
    return word_bits(sizes, study.records_per_draw, norm, std, step)


def word_bits(
    units: Iterable[float], rows: int, max_grad_norm: float, noise_std: float, step: float
) -> int:
    """Return how many bits, 32 or 64, a masked number needs so that twice the largest possible sum
    fits.

    - units: each site's declared size
    - rows: the most rows of one unit
    - max_grad_norm: C, which no coordinate of a clipped row exceeds
    - noise_std: the standard deviation of each site's noise, in gradient units
    - step: the grid, in gradient units

    >>> word_bits([400, 400, 200], 1, 1.0, 1.0, 2.0**-16)
    32
    >>> word_bits([40_000, 40_000, 20_000], 1, 1.0, 1.0, 2.0**-16)
    64

    Errors: ConfigError if even 64 bits are too few."""
    largest = 0.0
    for size in units:
        reach = ROWS * size * rows * (max_grad_norm + step) + TAIL * noise_std + step
        largest += reach / step
    for bits in WORDS:
        if largest < 2.0 ** (bits - 2):
            return bits
    raise ConfigError(
        "the sites' declared sizes are so large that a word needs more than 64 bits",
        "declared sizes whose largest possible sum fits into 64 bits",
        "check site.declared_size at the site where it is by far the largest",
    )
