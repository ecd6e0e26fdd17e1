"""ε of what ran: privacy loss distributions (PLD) from dp-accounting, rounded towards caution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import version
from typing import NamedTuple

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

ACCOUNTANT = f"PLD (dp-accounting {version('dp-accounting')})"


class Steps(NamedTuple):
    """`steps` noised steps with one noise multiplier σ (in multiples of C) and sampling rate q.

    records: k, the most rows of one unit in a step, each drawn with q and clipped to C on its own;
    1 where units are drawn."""

    noise_multiplier: float
    sampling_rate: float
    steps: int
    records: int = 1


def epsilon(events: Iterable[Steps], delta: float) -> float:
    """ε at `delta` of all `events` composed, add-or-remove-one relation, by PLD.

    Guarantee: never below the true ε of the composed mechanisms (the PLD estimate is pessimistic).
    | no events | 0.0 |
    | q = 1     | a plain Gaussian composition; exact up to discretisation |
    Errors: ValueError on σ ≤ 0, q outside (0, 1], count < 0, delta outside (0, 1).
    Reference: Koskela et al. 2020; Doroshenko et al. 2022 (connect-the-dots).
    """
    return _epsilon(_merged(events), delta)


def rdp_epsilon(events: Iterable[Steps], delta: float) -> float:
    """The same by Rényi DP (Mironov 2017): a looser bound, computed only as a cross-check."""
    accountant = RdpAccountant()
    accountant.compose(_event(_merged(events)))
    return float(accountant.get_epsilon(delta))


def calibrate(target: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest σ on a 10⁻³ grid, rounded up, with ε(σ, q, steps) ≤ target.

    Guarantee: computed with the accountant that reports, and checked after rounding."""

    def enough(thousandths: int) -> bool:
        return epsilon([Steps(thousandths / 1000, sampling_rate, steps)], delta) <= target

    return _first(enough, start=1000) / 1000


def affordable_steps(target: float, delta: float, sampling_rate: float, sigma: float) -> int:
    """The most steps with ε ≤ target; 0 when not even one fits."""

    def too_many(steps: int) -> bool:
        return epsilon([Steps(sigma, sampling_rate, steps)], delta) > target

    return _first(too_many, start=1) - 1


def _first(predicate: Callable[[int], bool], start: int) -> int:
    """The smallest n ≥ 1 with predicate(n), for a predicate that turns true once and stays so."""
    low, high = 0, start
    while not predicate(high):
        low, high = high, high * 2
        if high > 10**8:
            raise ValueError("no value below 10⁸ reaches the target")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if predicate(middle) else (middle, high)
    return high


def _merged(events: Iterable[Steps]) -> tuple[Steps, ...]:
    """Equal (σ, q) folded together and sorted, so that one log always gives one number."""
    counts: dict[tuple[float, float], int] = {}
    for sigma, rate, count in events:
        if not (sigma > 0 and math.isfinite(sigma) and 0 < rate <= 1 and count >= 0):
            raise ValueError("an event needs σ > 0, 0 < q ≤ 1 and a count ≥ 0")
        counts[sigma, rate] = counts.get((sigma, rate), 0) + count
    return tuple(Steps(s, q, n) for (s, q), n in sorted(counts.items()) if n)


def _event(events: tuple[Steps, ...]) -> dp_accounting.DpEvent:
    composed = []
    for sigma, rate, count in events:
        step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(sigma)
        if rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(rate, step)
        composed.append(dp_accounting.SelfComposedDpEvent(step, count))
    return dp_accounting.ComposedDpEvent(composed)


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Steps, ...], delta: float) -> float:
    if not 0 < delta < 1:
        raise ValueError("delta must be in (0, 1)")
    if not events:
        return 0.0
    accountant = PLDAccountant()
    accountant.compose(_event(events))
    return float(accountant.get_epsilon(delta))
