"""The lemma of decision 0047: a sum of m rounded Gaussians is, but for aliasing, one Gaussian of m
times the variance to which m - 1 uniforms are added before it is rounded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr  # type: ignore[import-untyped]

from fedtune.core.dp.shared_noise import FINEST

SMALL = (0.2, 0.3, 0.5)


def summed(s: float, m: int, reach: int) -> np.ndarray:
    """The law of a sum of m rounded N(0, s²), on -reach..reach."""
    k = np.arange(-reach, reach + 1)
    one = ndtr(-(np.abs(k) - 0.5) / s) - ndtr(-(np.abs(k) + 0.5) / s)
    law = one
    for _ in range(m - 1):
        law = np.convolve(law, one, mode="same")
    return np.asarray(law)


def smoothed(s: float, m: int, reach: int) -> np.ndarray:
    """The law of round(N(0, m s²) + m - 1 uniforms): the density of N(0, m s²) * U^{*m} at the
    integers, from its Fourier transform by the trapezoidal rule (which is exact here but for a
    period of 8 · reach)."""
    step = 1 / (8 * reach)
    xi = np.arange(-math.ceil(3 / (s * math.sqrt(m)) / step), 1) * step
    transform = np.sinc(xi) ** m * np.exp(-2 * (math.pi * s * xi) ** 2 * m)
    waves = np.cos(2 * math.pi * np.outer(np.arange(-reach, reach + 1), xi))
    weights = np.full(len(xi), 2.0)
    weights[-1] = 1.0
    return np.asarray(waves @ (weights * transform) * step)


def variation(s: float, m: int) -> float:
    reach = math.ceil(8 * s * math.sqrt(m)) + 2 * m + 4
    return float(np.abs(summed(s, m, reach) - smoothed(s, m, reach)).sum()) / 2


def bound(s: float, m: int) -> float:
    """The bound of the decision on the difference of the two laws at any one integer."""
    theta = 1 + 2 * sum(math.exp(-2 * (math.pi * s * j) ** 2 / m) for j in range(1, 60))
    return float((theta ** (m - 1) - 1) / (s * math.sqrt(2 * math.pi * m)))


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("s", SMALL)
def test_at_a_small_scale_the_two_laws_differ_by_what_is_predicted(s: float, m: int) -> None:
    reach = math.ceil(8 * s * math.sqrt(m)) + 2 * m + 4
    apart = np.abs(summed(s, m, reach) - smoothed(s, m, reach))
    assert 1e-3 < variation(s, m) < 0.5
    assert apart.max() <= bound(s, m)


def test_of_two_they_differ_by_the_first_cross_term() -> None:
    for s, close in ((0.3, 0.05), (0.5, 1e-3), (0.7, 1e-6)):
        predicted = 4 / math.pi**2 * math.exp(-((math.pi * s) ** 2))
        assert variation(s, 2) == pytest.approx(predicted, rel=close)


@pytest.mark.parametrize("m", [2, 3, 9])
@pytest.mark.parametrize("s", [4.0, 16.0])
def test_from_a_scale_of_four_on_they_are_the_same(s: float, m: int) -> None:
    assert variation(s, m) < 1e-12
    reach = math.ceil(8 * s * math.sqrt(m)) + 2 * m + 4
    # Twin: a Gaussian of the variance of the rounded ones, without the uniforms, is another law.
    k = np.arange(-reach, reach + 1)
    std = s * math.sqrt(m)
    bare = ndtr((k + 0.5) / std) - ndtr((k - 0.5) / std)
    assert np.abs(summed(s, m, reach) - bare).sum() / 2 > 1e-5


def test_at_the_grid_that_is_shipped_nothing_is_left() -> None:
    """s = 2¹⁶: every exponent of the bound is below -10⁶, with ten thousand sites too."""
    s = 2.0**FINEST
    for m in (2, 3, 10_000):
        largest = -2 * (math.pi * s) ** 2 / m  # of exp, in each factor of the bound
        assert largest + math.log(m) < -1e6
        assert bound(s, m) == 0.0
