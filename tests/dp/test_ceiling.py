"""A dataset's total where studies are chosen after results were seen."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.dp.filter import RENYI, best_order, filtered_epsilon, total_epsilon

DELTA = 1e-4
ONE, OTHER = Steps(2.0, 0.5, 20), Steps(4.0, 1.0, 5)


def test_one_kind_of_step_is_composed_exactly_however_it_is_split() -> None:
    whole = total_epsilon([ONE], 2.0, DELTA)
    split = total_epsilon([ONE._replace(steps=n) for n in (1, 7, 12)], 2.0, DELTA)
    assert whole == split
    assert whole.epsilon == epsilon([ONE], DELTA) and whole.how == "PLD"


def test_two_kinds_are_filtered_at_the_order_given_and_cost_no_less_than_pld() -> None:
    order = best_order(8.0, DELTA)
    both = total_epsilon([ONE, OTHER], order, DELTA)
    assert both.epsilon == filtered_epsilon([ONE, OTHER], order, RENYI * DELTA)
    assert both.epsilon > epsilon([ONE, OTHER], DELTA)
    assert f"order {order:g}" in both.how
    # The twin: taking the best of several orders each time would look cheaper.
    cheapest = min(filtered_epsilon([ONE, OTHER], o, DELTA) for o in (1.5, 2.0, 4.0, 8.0, order))
    assert total_epsilon([ONE, OTHER], 64.0, DELTA).epsilon > cheapest


@pytest.mark.parametrize(("samples_first", "delta"), [(False, DELTA), (True, DELTA * (1 - RENYI))])
def test_a_sampled_step_costs_no_more_than_if_it_did_not_sample(
    samples_first: bool, delta: float
) -> None:
    """A second study hardly costs more because a step with much noise samples."""
    events = [Steps(0.8, 1.0, 1), Steps(20.0, 0.5, 1, 2)]
    total = total_epsilon(events, best_order(8.0, DELTA), DELTA, samples_first)
    assert total.epsilon == epsilon([e._replace(sampling_rate=1.0) for e in events], delta)
    assert epsilon(events, DELTA) < total.epsilon < filtered_epsilon(events, 3.0, DELTA)
    assert "as if no step sampled" in total.how


def test_several_kinds_that_take_every_unit_are_one_gaussian() -> None:
    events = [OTHER, Steps(3.0, 1.0, 2), Steps(9.0, 1.0, 40, records=4)]
    total = total_epsilon(events, 2.0, DELTA)
    assert total.epsilon == epsilon(events, DELTA) < filtered_epsilon(events, 2.0, DELTA)
    assert "Gaussian" in total.how
    assert "order" in total_epsilon([*events, ONE], 2.0, DELTA).how  # one that samples is enough


def spent_by(admits: Callable[[list[Steps]], bool], ceiling: float) -> float:
    """δ at ε = `ceiling` of who takes a first step, looks at its privacy loss, and then takes all
    that `admits` still allows: in one step, in four, or, where the loss is large already, nothing.

    Exact up to the sum over the first loss: given it, what is left is one Gaussian."""
    first, delta = Steps(1.6, 1.0, 1), 0.0
    assert admits([first])
    shifts = {0: 0.0}
    for steps in (1, 4):
        admitted = (s for s in np.arange(0.2, 20, 0.01) if admits([first, Steps(s, 1.0, steps)]))
        shifts[steps] = math.sqrt(steps) / next(admitted)
    mu, width = 1 / first.noise_multiplier, 1e-3
    for z in np.arange(-9, 9, width):
        seen = mu * z + mu**2 / 2
        shift = shifts[0 if seen > 0.6 * ceiling else 1 if seen > 0 else 4]
        delta += width * norm.pdf(z) * beyond(ceiling - seen, shift)
    return delta


def beyond(loss: float, mu: float) -> float:
    """The hockey-stick divergence at e^loss of a Gaussian that is moved by mu."""
    if mu == 0:
        return max(0.0, 1 - math.exp(loss))
    return float(norm.cdf(mu / 2 - loss / mu) - math.exp(loss) * norm.cdf(-mu / 2 - loss / mu))


def test_whoever_chooses_by_what_was_seen_stays_below_the_ceiling() -> None:
    ceiling = 4.0
    spent = spent_by(lambda events: total_epsilon(events, 2.0, DELTA).epsilon <= ceiling, ceiling)
    assert 0.1 * DELTA < spent <= DELTA * (1 + 1e-4)


def test_twin_a_rule_that_looks_at_each_study_alone_is_caught() -> None:
    ceiling = 4.0
    spent = spent_by(
        lambda events: all(epsilon([event], DELTA) <= ceiling for event in events), ceiling
    )
    assert spent > 2 * DELTA


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 2.1}, {"sampling_rate": 0.4}, {"records": 2}]
)
def test_any_other_figure_is_another_kind(change: dict[str, float]) -> None:
    events = [ONE, ONE._replace(**change)]  # type: ignore[arg-type]
    assert "filter" in total_epsilon(events, 4.0, DELTA).how


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert total_epsilon([], 2.0, DELTA).epsilon == 0.0
    assert total_epsilon([ONE, Steps(0.0, 1.0, 1)], 2.0, DELTA).epsilon == math.inf
