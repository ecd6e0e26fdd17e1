"""A dataset's total where studies are chosen after results were seen."""

from __future__ import annotations

import math

import pytest

from fedtune.dp.accountant import Steps, epsilon
from fedtune.dp.filter import best_order, filtered_epsilon, total_epsilon

DELTA = 1e-4
ONE, OTHER = Steps(2.0, 0.5, 20), Steps(4.0, 1.0, 5)


def test_one_kind_of_step_is_composed_exactly_however_it_is_split() -> None:
    whole = total_epsilon([ONE], 2.0, DELTA)
    split = total_epsilon([ONE._replace(steps=n) for n in (1, 7, 12)], 2.0, DELTA)
    assert whole == split
    assert whole.epsilon == epsilon([ONE], DELTA) and whole.how == "PLD"


def test_two_kinds_are_filtered_at_the_order_given_and_cost_no_less_than_pld() -> None:
    order = best_order([ONE], 8.0, DELTA)
    both = total_epsilon([ONE, OTHER], order, DELTA)
    assert both.epsilon == filtered_epsilon([ONE, OTHER], order, DELTA)
    assert both.epsilon > epsilon([ONE, OTHER], DELTA)
    assert f"order {order:g}" in both.how
    # The twin: taking the best of several orders each time would look cheaper.
    cheapest = min(filtered_epsilon([ONE, OTHER], o, DELTA) for o in (1.5, 2.0, 4.0, 8.0, order))
    assert total_epsilon([ONE, OTHER], 64.0, DELTA).epsilon > cheapest


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 2.1}, {"sampling_rate": 0.4}, {"records": 2}]
)
def test_any_other_figure_is_another_kind(change: dict[str, float]) -> None:
    events = [ONE, ONE._replace(**change)]  # type: ignore[arg-type]
    assert "filter" in total_epsilon(events, 4.0, DELTA).how


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert total_epsilon([], 2.0, DELTA).epsilon == 0.0
    assert total_epsilon([ONE, Steps(0.0, 1.0, 1)], 2.0, DELTA).epsilon == math.inf
