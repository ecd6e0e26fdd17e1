"""The golden grid of ε: 200 points from a slow computation that shares no code with the accountant.

    python -m benchmarks.golden --out tests/dp/golden.json

Each point is an interval [low, high] around the true ε, add-or-remove-one relation:
q = 1      closed form of the composed Gaussian (Balle & Wang 2018, theorem 8), evaluated in logs;
q < 1      the privacy loss L(x) = log p(x)/q(x) of one step, with p the mixture
           Σ_j Binomial(k, q)(j) · N(j, σ²) and q = N(0, σ²), and of the reverse pair. L is
           monotone, so the mass of every cell (iw, (i+1)w] of losses is a difference of normal
           cdfs. Losses rounded down give a lower bound on δ(ε), rounded up an upper bound; T steps
           are the T-th convolution power (FFT). Rounding up is rounding down moved by w
           per step, so one convolution serves both.
What else can err goes into the interval as well: mass beyond the grid and mass that wraps around
(Chernoff) at full weight, floating-point error of the FFT, residual of the inversion of L.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import gammaln, log_ndtr, logsumexp, ndtr

Array = npt.NDArray[np.float64]

FULL_BATCH = [
    # (σ, steps, k)
    *((0.8, 1, 1), (1.536, 8, 1), (2.0, 1, 1), (5.0, 50, 1), (12.0, 300, 1), (40.0, 2000, 1)),
    *((3.3, 20, 1), (6.0, 4, 4), (20.0, 30, 4), (9.0, 1, 8), (30.0, 25, 8), (50.0, 10, 16)),
]
UNITS = [
    # (q, σ, steps)
    *((0.5, 0.7, 1), (0.1, 0.7, 1), (0.01, 0.6, 1), (0.9, 1.0, 5), (0.5, 1.5, 10)),
    *((0.5, 4.0, 100), (0.25, 1.0, 8), (0.25, 2.5, 40), (0.2, 1.2, 30), (0.1, 0.8, 20)),
    *((0.1, 1.0, 100), (0.1, 3.0, 300), (0.05, 0.9, 50), (0.05, 1.5, 200), (0.02, 0.8, 100)),
    *((0.02, 1.0, 500), (0.01, 0.7, 300), (0.01, 1.0, 1000), (0.005, 0.6, 500)),
    *((0.002, 0.7, 1000), (0.75, 8.0, 200), (0.3, 0.9, 3)),
]
RECORDS = [
    # (q, σ, steps, k)
    *((0.5, 1.5, 1, 2), (0.1, 1.0, 50, 2), (0.01, 0.8, 300, 2), (0.25, 3.0, 20, 3)),
    *((0.05, 1.0, 30, 4), (0.1, 2.0, 100, 4), (0.02, 1.2, 200, 4), (0.9, 8.0, 10, 4)),
    *((0.3, 5.0, 40, 6), (0.05, 1.5, 60, 8), (0.01, 1.0, 100, 8), (0.2, 8.0, 50, 10)),
    *((0.1, 4.0, 20, 12), (0.05, 4.0, 100, 16), (0.01, 1.5, 200, 16), (0.5, 25.0, 30, 16)),
]
DELTAS = (1e-3, 1e-4, 1e-5, 1e-6)
RELATIVE = 4e-4  # aim of the interval's width, relative to ε
MOST_BINS = 2**22


class Interval(NamedTuple):
    low: float
    high: float


def full_batch(sigma: float, steps: int, records: int, delta: float) -> Interval:
    """The closed form; its only error is the root finder's and fp64's."""
    mu = records * math.sqrt(steps) / sigma

    def gap(eps: float) -> float:
        first, second = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
        return float(first + np.log(-np.expm1(second - first)) - math.log(delta))

    epsilon = brentq(gap, 1e-12, 2 * mu * mu + 60 * mu, xtol=1e-13, rtol=1e-13)
    return Interval(epsilon * (1 - 1e-9), epsilon * (1 + 1e-9))


class Pair:
    """One step's two output distributions, p against q, and the loss log p/q, in x.

    reverse: q and p change places: the unit's data is absent in the first."""

    def __init__(self, rate: float, sigma: float, records: int, reverse: bool) -> None:
        j = np.arange(records + 1.0)
        choose = gammaln(records + 1) - gammaln(j + 1) - gammaln(records - j + 1)
        self.log_weight = choose + j * math.log(rate) + (records - j) * math.log1p(-rate)
        self.rows, self.sigma, self.reverse = j, sigma, reverse

    def ratio(self, x: Array) -> tuple[Array, Array]:
        """log mixture/normal at x, and its derivative; increasing and convex in x."""
        terms = self.log_weight - self.rows**2 / (2 * self.sigma**2)
        terms = terms + x[:, None] * (self.rows / self.sigma**2)
        value = logsumexp(terms, axis=1)
        return value, np.exp(terms - value[:, None]) @ self.rows / self.sigma**2

    def cdf(self, x: Array, above: bool) -> Array:
        """Mass of the first distribution below (or above) x: a sum of small numbers, so that
        neither tail loses digits."""
        sign = -1.0 if above else 1.0
        if self.reverse:
            return np.asarray(ndtr(sign * x / self.sigma))
        masses = ndtr(sign * (x[:, None] - self.rows) / self.sigma)
        return np.asarray(masses @ np.exp(self.log_weight))

    def range(self) -> tuple[float, float]:
        """x beyond which less than 10⁻¹⁸ of the first distribution lies on either side."""
        lows, highs = -9.0 * self.sigma, 9.0 * self.sigma
        if not self.reverse:
            likely = self.rows[np.cumsum(np.exp(self.log_weight[::-1]))[::-1] > 1e-18]
            highs += float(likely[-1])
        return lows, highs

    def invert(self, losses: Array, low: float, high: float) -> tuple[Array, float]:
        """x with ratio(x) = losses, and the largest residual of the ratio."""
        table = np.linspace(low, high, 20_001)
        values, _ = self.ratio(table)
        x = np.interp(losses, values, table)
        for _ in range(4):
            value, slope = self.ratio(x)
            x = np.clip(x - (value - losses) / slope, low, high)
        value, _ = self.ratio(x)
        return x, float(np.max(np.abs(value - losses)))


class Losses(NamedTuple):
    """Masses of one step's losses rounded down to (first + i) · width; `lost` has no cell."""

    first: int
    mass: Array
    width: float
    lost: float
    residual: float


def one_step(pair: Pair, width: float) -> Losses:
    low, high = pair.range()
    ends = pair.ratio(np.array([low, high]))[0]
    edges = np.arange(math.ceil(ends[0] / width), math.floor(ends[1] / width) + 1)
    x, residual = _chunked(pair, edges * width, low, high)
    below, above = pair.cdf(x, above=False), pair.cdf(x, above=True)
    cells = np.where(below[1:] < 0.5, np.diff(below), -np.diff(above)).clip(min=0.0)
    # What lies between an end of the range and its nearest edge is a cell like the others.
    mass = np.concatenate([below[:1], cells, above[-1:]])
    first = int(edges[0]) - 1
    if pair.reverse:  # the loss is −ratio: cell (a, b] of the ratio is [−b, −a) of the loss
        mass, first = mass[::-1], -int(edges[-1]) - 1
    ends = np.array([low, high])
    lost = pair.cdf(ends, above=False)[0] + pair.cdf(ends, above=True)[1]
    return Losses(first, mass, width, float(lost), residual)


def _chunked(pair: Pair, losses: Array, low: float, high: float) -> tuple[Array, float]:
    chunks = np.array_split(losses, len(losses) // 50_000 + 1)
    parts = [pair.invert(part, low, high) for part in chunks]
    return np.concatenate([x for x, _ in parts]), max(residual for _, residual in parts)


class Composed(NamedTuple):
    losses: Array  # rounded down
    mass: Array
    shift: float  # what rounding up adds to every loss
    slack: float  # δ that the two bounds may be off by


def compose(step: Losses, steps: int) -> Composed:
    """The `steps`-fold sum, on a window beside which Chernoff allows 10⁻¹³ of mass on each side."""
    values: Array = (step.first + np.arange(len(step.mass), dtype=np.float64)) * step.width
    low, high = _window(values, step.mass, steps)
    first, last = math.floor(low / step.width), math.ceil(high / step.width)
    size = 1 << (last - first).bit_length()
    folded = np.zeros(size)  # the cyclic group: wrapping before the power wraps the sum alike
    np.add.at(folded, np.arange(len(step.mass)) % size, step.mass)
    mass = np.fft.irfft(np.fft.rfft(folded) ** steps, size) if steps > 1 else folded
    start = step.first * steps  # of cell 0
    cell = np.arange(first, first + size)
    mass = mass[(cell - start) % size]
    noise = 8 * steps * 2.0**-52 * math.sqrt(size)  # ℓ1 ≤ √size · ℓ2 of the FFT's error
    slack = steps * step.lost + 2e-13 + noise
    shift = steps * (step.width + step.residual)
    losses: Array = cell.astype(np.float64) * step.width - steps * step.residual
    return Composed(losses, mass, shift, slack)


def _window(values: Array, mass: Array, steps: int) -> tuple[float, float]:
    log_mass = np.log(np.maximum(mass, 1e-300))
    least = math.log(1e-13)
    ends = []
    for sign in (-1.0, 1.0):
        bounds = [
            (steps * float(logsumexp(log_mass + sign * t * values)) - least) / t
            for t in np.geomspace(0.05, 200, 40)
        ]
        ends.append(sign * min(bounds))
    full_range = (steps * values[0], steps * values[-1])
    return max(ends[0], full_range[0]), min(ends[1], full_range[1])


def epsilon_at(composed: Composed, delta: float, up: bool) -> float:
    """The ε with δ(ε) = delta: from above (losses moved up, slack against us) or from below."""
    shift, target = (
        (composed.shift, delta - composed.slack) if up else (0.0, delta + composed.slack)
    )
    losses = composed.losses + shift

    def gap(eps: float) -> float:
        start = int(np.searchsorted(losses, eps))
        tail = -np.expm1(eps - losses[start:])
        return float(tail @ composed.mass[start:]) - target

    if gap(0.0) <= 0:
        return 0.0
    return float(brentq(gap, 0.0, float(losses[-1]), xtol=1e-12, rtol=1e-12))


def sampled(rate: float, sigma: float, steps: int, records: int) -> list[Interval]:
    """One interval per δ of DELTAS: the larger of the two directions."""
    directions = [_direction(Pair(rate, sigma, records, r), steps) for r in (False, True)]
    return [
        Interval(max(i.low for i in bounds), max(i.high for i in bounds))
        for bounds in zip(*directions, strict=True)
    ]


def _direction(pair: Pair, steps: int) -> list[Interval]:
    width = 1e-3 / steps**0.5
    smallest = _intervals(pair, steps, width)[0].high
    return _intervals(pair, steps, min(width, RELATIVE * smallest / steps))


def _intervals(pair: Pair, steps: int, width: float) -> list[Interval]:
    low, high = pair.range()
    ends, _ = pair.ratio(np.array([low, high]))
    width = max(width, float(ends[1] - ends[0]) / MOST_BINS)
    composed = compose(one_step(pair, width), steps)
    return [
        Interval(epsilon_at(composed, d, up=False), epsilon_at(composed, d, up=True))
        for d in DELTAS
    ]


def points() -> Iterator[dict[str, Any]]:
    for sigma, steps, records in FULL_BATCH:
        for delta in DELTAS:
            yield _point(
                1.0, sigma, steps, records, delta, full_batch(sigma, steps, records, delta)
            )
    for rate, sigma, steps, records in [*((*unit, 1) for unit in UNITS), *RECORDS]:
        for delta, interval in zip(DELTAS, sampled(rate, sigma, steps, records), strict=True):
            yield _point(rate, sigma, steps, records, delta, interval)


def _point(
    rate: float, sigma: float, steps: int, records: int, delta: float, interval: Interval
) -> dict[str, Any]:
    return dict(
        q=rate, sigma=sigma, steps=steps, records=records, delta=delta, **interval._asdict()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    grid = []
    chosen = parser.parse_args()
    for point in points():
        grid.append(point)
        print(json.dumps(point), flush=True)
    lines = ",\n".join(json.dumps(point) for point in grid)
    chosen.out.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
