"""The Rényi filter: never below PLD, the divergences checked by other means."""

from __future__ import annotations

import math
import random

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from scipy.integrate import quad
from scipy.stats import binom, norm

from fedtune.core.dp import filter
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.dp.filter import (
    ORDERS,
    best_order,
    budget,
    epsilon_of,
    filtered_epsilon,
    rdp,
)

DELTA = 1e-5


def random_events(seed: int) -> list[Steps]:
    draw = random.Random(seed)
    events = []
    for _ in range(draw.randint(1, 4)):
        k = draw.choice([1, 1, 3, 8])
        q = draw.choice([0.01, 0.1, 0.5, 1.0])
        sigma = k * draw.uniform(0.8, 6.0) if q > 0.1 else max(0.8, k * q * draw.uniform(3, 9))
        events.append(Steps(round(sigma, 3), q, draw.randint(1, 40), k))
    return events


def below_pld(events: list[Steps], claimed: float) -> bool:
    return claimed < epsilon(events, DELTA) - 1e-3  # PLD's own pessimism


@pytest.mark.parametrize("seed", range(12))
def test_the_filter_is_never_below_pld(seed: int) -> None:
    events = random_events(seed)
    for order in (best_order(8.0, DELTA), 1.5, 4.0, 32.0):
        assert not below_pld(events, filtered_epsilon(events, order, DELTA))


def test_a_filter_that_forgets_would_be_caught() -> None:
    """Twin: the events counted once instead of all their steps, or k taken for 1."""
    events = [Steps(1.2, 0.1, 60), Steps(8.0, 0.1, 40, 8)]
    order = best_order(8.0, DELTA)
    once = [event._replace(steps=1) for event in events]
    assert below_pld(events, filtered_epsilon(once, order, DELTA))
    several, one = [events[1]], [events[1]._replace(records=1)]
    assert below_pld(several, filtered_epsilon(one, 8.0, DELTA))


@pytest.mark.parametrize("order", [2.0, 3.0, 8.0, 32.0])
@pytest.mark.parametrize(("q", "sigma"), [(0.01, 0.6), (0.1, 1.0), (0.5, 4.0), (0.9, 1.0)])
def test_one_row_equals_the_library(q: float, sigma: float, order: float) -> None:
    """At whole orders, where the library's formula is a finite sum."""
    reference = RdpAccountant(orders=[order])
    reference.compose(
        dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), 7
    )
    exact = float(reference.rdp[0])
    assert exact * (1 - 1e-12) <= rdp([Steps(sigma, q, 7)], order) <= exact * (1 + 1e-8)


@pytest.mark.parametrize("order", [1.3, 2.7, 6.0])
@pytest.mark.parametrize(
    "event", [Steps(0.8, 0.1, 1), Steps(2.0, 0.3, 1, 3), Steps(4.0, 0.05, 1, 8)]
)
def test_any_order_equals_adaptive_quadrature_in_both_directions(
    event: Steps, order: float
) -> None:
    sigma, q, _, k = event
    weights, rows = binom.pmf(range(k + 1), k, q), np.arange(k + 1)

    def moment(power: float) -> float:
        def integrand(x: float) -> float:
            ratio = float(weights @ np.exp((rows * x - rows**2 / 2) / sigma**2))
            return float(ratio**power * norm.pdf(x, 0, sigma))

        ends = sorted((0.0, power * k))
        edges = np.arange(ends[0] - 12 * sigma, ends[1] + 12 * sigma, sigma)
        parts = (quad(integrand, a, a + sigma, epsabs=0, epsrel=1e-11)[0] for a in edges)
        return math.log(sum(parts))

    exact = max(moment(order), moment(1 - order)) / (order - 1)
    assert rdp([event], order) == pytest.approx(exact, rel=1e-8, abs=1e-11)


def dominating(event: Steps) -> Steps:
    """Binomial(k, q) rows are stochastically dominated by k rows with q' = 1 − (1 − q)^k."""
    sigma, q, steps, k = event
    return Steps(sigma / k, -math.expm1(k * math.log1p(-q)), steps)


MIXTURES = [Steps(2 * s, q, 10, 2) for q in (0.05, 0.5) for s in (0.8, 3.0)]
MIXTURES += [Steps(18.0, 0.02, 10, 9), Steps(18.0, 0.7, 10, 9)]


@pytest.mark.long
def test_the_mixture_stays_under_the_gaussian_that_dominates_it() -> None:
    for event in MIXTURES:
        upper = dominating(event)
        assert epsilon([event], DELTA) <= epsilon([upper], DELTA) + 1e-3
        for order in (1.5, 2.0, 4.0):
            assert rdp([event], order) <= rdp([upper], order) * (1 + 1e-9)


def test_domination_by_one_row_would_be_caught() -> None:
    """Twin: q' right, but one row's σ instead of σ/k. The bound falls below the mixture."""
    for event in MIXTURES:
        lower = dominating(event)._replace(noise_multiplier=event.noise_multiplier)
        assert epsilon([event], DELTA) > epsilon([lower], DELTA) + 1e-3
        assert rdp([event], 1.5) > rdp([lower], 1.5)


LONG = [Steps(40.0, 0.1, 1, 200), Steps(8.0, 0.01, 1, 60), Steps(0.5, 0.9, 1, 3)]


@pytest.mark.parametrize("order", [1.5, 8.0, 64.0])
def test_a_long_integral_is_bounded_from_above(
    order: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = [rdp([event], order) for event in LONG]
    monkeypatch.setattr(filter, "_MOST_TERMS", 0)
    filter._compute_sampled_rdp.cache_clear()
    bounded = [rdp([event], order) for event in LONG]
    filter._compute_sampled_rdp.cache_clear()
    for event, exact, bound in zip(LONG, computed, bounded, strict=True):
        assert exact <= bound == pytest.approx(rdp([event._replace(sampling_rate=1.0)], order))


def test_no_plan_keeps_the_filter_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows of a unit at a small σ: an integral of 10⁸ terms and more."""
    terms = []
    counted = filter._log_moment

    def count(sigma: float, rate: float, records: int, power: float) -> float:
        terms.append(filter._terms(sigma, records, abs(power)))
        return counted(sigma, rate, records, power)

    monkeypatch.setattr(filter, "_log_moment", count)
    for sigma in (1e-9, 0.01, 1.0, 20.0):
        rdp([Steps(sigma, 0.1, 20, 1000)], best_order(8.0, DELTA))
    assert max(terms, default=0) <= filter._MOST_TERMS and len(terms) <= 2


def test_divergences_add_and_order_does_not_matter() -> None:
    a, b = Steps(2.0, 0.3, 4, 3), Steps(3.0, 1.0, 2, 2)
    assert rdp([a, b], 3.0) == rdp([b, a], 3.0) == pytest.approx(rdp([a], 3.0) + rdp([b], 3.0))
    assert rdp([b], 3.0) == pytest.approx(3.0 * 2 * (2 / 3) ** 2 / 2)
    assert rdp([], 3.0) == 0 == filtered_epsilon([], 3.0, DELTA)


def test_the_conversion_is_sound_and_the_budget_is_its_inverse() -> None:
    for order in (1.2, 3.0, 20.0):
        for sigma in (0.7, 2.0):
            exact = epsilon([Steps(sigma, 1.0, 1)], DELTA)
            assert epsilon_of(order / (2 * sigma**2), order, DELTA) >= exact - 1e-3
        left = budget(90.0, order, DELTA)
        assert epsilon_of(left, order, DELTA) == pytest.approx(90.0)


def test_the_order_that_is_chosen_pays_for_the_most_noise() -> None:
    best = best_order(6.0, DELTA)
    assert best in filter.ORDERS

    def repetitions(order: float) -> float:
        return budget(6.0, order, DELTA) / rdp([Steps(6.0, 1.0, 7, 2)], order)

    assert repetitions(best) == max(map(repetitions, filter.ORDERS)) > 1


def test_one_order_for_all_costs_more_than_the_best_order_afterwards() -> None:
    """Why fixing matters: the minimum over orders is smaller, and no bound for adaptive choices."""
    events = [Steps(1.0, 0.05, 20), Steps(40.0, 1.0, 60)]
    fixed = filtered_epsilon(events, best_order(8.0, DELTA), DELTA)
    assert fixed > min(filtered_epsilon(events, order, DELTA) for order in filter.ORDERS)


@pytest.mark.parametrize("order", [1.0, 0.5, -2.0, math.nan, math.inf])
def test_impossible_orders_are_refused(order: float) -> None:
    with pytest.raises(ValueError, match="order"):
        rdp([Steps(1.0, 1.0, 1)], order)
    with pytest.raises(ValueError, match="order"):
        epsilon_of(1.0, order, DELTA)


def test_what_else_is_impossible_is_refused() -> None:
    with pytest.raises(ValueError, match="event"):
        rdp([Steps(0.0, 1.0, 1)], 2.0)
    for divergence, delta in ((-1.0, DELTA), (math.nan, DELTA), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="delta"):
            epsilon_of(divergence, 2.0, delta)
    for ceiling in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon"):
            best_order(ceiling, DELTA)


def test_a_ceiling_that_no_order_meets_has_an_order_by_which_nothing_fits() -> None:
    """A dataset's first charge stores an order, also where it is admitted by exact composition."""
    order = best_order(0.02, 1e-6)
    assert all(budget(0.02, other, 1e-6) <= 0 for other in ORDERS)
    assert filtered_epsilon([Steps(400.0, 1.0, 1)], order, 1e-6) > 0.02
