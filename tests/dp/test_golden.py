"""ε against values from a computation that shares no code with it (benchmarks/golden.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import binom, norm

from fedtune.core.dp.accountant import Steps, epsilon


class Point(NamedTuple):
    event: Steps
    delta: float
    low: float  # the true ε is between low and high
    high: float


POINTS = [
    Point(Steps(p["sigma"], p["q"], p["steps"], p["records"]), p["delta"], p["low"], p["high"])
    for p in json.loads(Path(__file__).with_name("golden.json").read_text())
]
MIXTURES = [p for p in POINTS if p.event.records > 1 and p.event.sampling_rate < 1]
SAMPLED = list(dict.fromkeys(p.event for p in POINTS if p.event.sampling_rate < 1))
SOME = [
    p for p in POINTS if p.event not in SAMPLED[1::2]
]  # each costs a distribution: half a second

Accountant = Callable[[Steps, float], float]


def ours(event: Steps, delta: float) -> float:
    return epsilon([event], delta)


def wrong(accountant: Accountant, points: list[Point]) -> list[Point]:
    """Points at which ε is below the interval, or off by more than 1 %."""
    return [
        point
        for point in points
        if not point.low * (1 - 1e-9)
        <= accountant(point.event, point.delta)
        <= 1.01 * (point.low + point.high) / 2
    ]


def test_the_grid_is_what_it_should_be() -> None:
    assert len(POINTS) == len({(p.event, p.delta) for p in POINTS}) == 200
    assert len(MIXTURES) >= 40
    assert {p.event.records for p in MIXTURES} >= {2, 4, 8, 16}
    assert sum(p.event.sampling_rate == 1 for p in POINTS) >= 40
    assert all(p.low > 0 and p.high - p.low < 0.005 * p.high for p in POINTS)


@pytest.mark.parametrize(
    "points", [SOME, pytest.param(POINTS, marks=pytest.mark.long)], ids=["some", "all"]
)
def test_within_one_percent_and_never_below(points: list[Point]) -> None:
    assert {p.event.records for p in points} >= {1, 2, 4, 8, 16} and len(points) >= 120
    assert wrong(ours, points) == []


def gdp(event: Steps, delta: float) -> float:
    """The central limit theorem's ε (Bu et al. 2020, corollary 5.4): optimistic."""
    sigma, rate, steps, _ = event
    mu = rate * math.sqrt(steps * math.expm1(1 / sigma**2))

    def gap(eps: float) -> float:
        second = math.exp(eps + norm.logcdf(-mu / 2 - eps / mu))
        return float(norm.cdf(mu / 2 - eps / mu) - second - delta)

    return 0.0 if gap(0) <= 0 else float(brentq(gap, 0, mu * mu + 20 * mu))


def test_the_clt_formula_would_be_caught() -> None:
    sampled = [p for p in POINTS if p.event.records == 1 and p.event.sampling_rate < 1]
    caught = wrong(gdp, sampled)
    assert len(caught) > 0.8 * len(sampled)
    assert sum(gdp(p.event, p.delta) < p.low for p in caught) > len(sampled) / 2


@pytest.mark.parametrize(
    "bug",
    [
        lambda e: e._replace(noise_multiplier=e.noise_multiplier * 1.02),  # σ rounded up somewhere
        lambda e: e._replace(noise_multiplier=e.noise_multiplier * 0.97),
        lambda e: e._replace(sampling_rate=e.sampling_rate * 0.97),
        lambda e: e._replace(records=max(1, e.records - 1)),  # k − 1 rows
    ],
)
def test_a_wrong_event_would_be_caught(bug: Callable[[Steps], Steps]) -> None:
    """At each of the points tried: a few that the bug changes, to stay quick."""
    changed = [p for p in POINTS if bug(p.event) != p.event]
    some = changed[:: len(changed) // 3]
    assert wrong(lambda event, delta: ours(bug(event), delta), some) == some


def hockey_stick(event: Steps, eps: float) -> float:
    """max over both directions of ∫ (p − e^ε q)₊ for one mixture step, by adaptive quadrature."""
    sigma, rate, _, k = event
    weights = binom.pmf(range(k + 1), k, rate)
    rows = np.arange(k + 1)

    def mixture(x: float) -> float:
        return float(weights @ norm.pdf(x, rows, sigma))

    def remove(x: float) -> float:
        return max(0.0, mixture(x) - math.exp(eps) * float(norm.pdf(x, 0, sigma)))

    def add(x: float) -> float:
        return max(0.0, float(norm.pdf(x, 0, sigma)) - math.exp(eps) * mixture(x))

    # Unit-wide panels: no kink or peak hides from the quadrature.
    edges = np.arange(-10 * sigma, k + 10 * sigma + 1, sigma)
    found = max(
        sum(quad(f, a, b, epsabs=1e-13, limit=60)[0] for a, b in pairwise(edges))
        for f in (remove, add)
    )
    return float(found)


ONE_STEP = [
    Steps(1.0, 0.3, 1, 2),
    Steps(2.0, 0.1, 1, 4),
    Steps(3.0, 0.5, 1, 8),
    Steps(1.5, 0.02, 1, 16),
    Steps(6.0, 0.9, 1, 16),
]


@pytest.mark.parametrize("event", ONE_STEP)
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_one_mixture_step_equals_a_hockey_stick_integral(event: Steps, delta: float) -> None:
    """δ at our ε is at most δ (never below), and at 0.99 of our ε it is above (within 1 %)."""
    found = ours(event, delta)
    assert hockey_stick(event, found) <= delta * (1 + 1e-6)
    assert hockey_stick(event, 0.99 * found) > delta


@pytest.mark.parametrize("event", ONE_STEP)
def test_the_integral_catches_independent_rows_taken_for_one(event: Steps) -> None:
    """A unit's k rows accounted as one row with the same q: far too little."""
    assert hockey_stick(event, ours(event._replace(records=1), 1e-5)) > 2e-5
