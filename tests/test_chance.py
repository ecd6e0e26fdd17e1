"""The chances that statistical tests are built on are what they say, where they are large enough to
be seen. Seeded: the same draws each time."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from fedtune.audit.bounds import gaussian_mu
from fedtune.audit.gaussian import CONFIDENCE
from tests import chance

RUNS = 4000


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chance, "FALSE_ALARM", 0.05)
    monkeypatch.setattr(chance, "MISSED", 0.1)


def near(found: np.ndarray, expected: float) -> bool:
    """Whether a share of RUNS is within four deviations of what is expected, or less."""
    return float(np.mean(found)) < expected + 4 * (expected * (1 - expected) / RUNS) ** 0.5


def test_examples_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert (chance.FALSE_ALARM, chance.MISSED) == (1e-5, 1e-5)
    failed, tried = doctest.testmod(chance)
    assert failed == 0 and tried > 8


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_spread_is_wrongly_refused_and_passed_as_seldom_as_said(factor: float) -> None:
    test = chance.spread_for(factor)
    draws = np.random.default_rng(0).normal(size=(RUNS, test.draws))
    found = np.sqrt(np.mean(draws**2, axis=1))
    refused = np.array([not test.holds(ratio) for ratio in found])
    passed = np.array([test.holds(ratio * factor) for ratio in found])
    assert near(refused, 0.05) and not near(refused, 0.03)
    assert near(passed, 0.1) and not near(passed, 0.05)


def test_a_count_is_wrongly_refused_and_passed_as_seldom_as_said() -> None:
    test, draw = chance.count_for(0.3, 0.4), np.random.default_rng(1)
    right, wrong = (draw.binomial(test.trials, rate, RUNS) for rate in (0.3, 0.4))
    assert near(np.array([not test.holds(count) for count in right]), 0.05)
    assert near(np.array([test.holds(count) for count in wrong]), 0.1)


def test_a_mean_and_many_figures() -> None:
    draws = np.random.default_rng(2).normal(size=(RUNS, chance.draws_of_mean(0.5)))
    each = draws.mean(axis=1) * draws.shape[1] ** 0.5
    shifted = each + 0.5 * draws.shape[1] ** 0.5
    assert near(np.abs(each) > chance.deviations(), 0.05)
    assert near(np.abs(shifted) < chance.deviations(), 0.1)
    ten = np.random.default_rng(3).normal(size=(RUNS, 10))
    assert near(np.abs(ten).max(axis=1) > chance.deviations(10), 0.05)
    tried = np.random.default_rng(4).random((RUNS, chance.tries(0.3))) < 0.3
    assert near(~tried.any(axis=1), 0.05)


@pytest.mark.parametrize("level", [1.8, 1.95])
def test_an_audit_shows_as_much_as_often_as_said(level: float) -> None:
    """Against the counts of an attack that are drawn."""
    trials, errors = 2000, chance.errors_of(2.0)
    draw = np.random.default_rng(5)
    counts = zip(*(draw.binomial(trials, rate, RUNS).tolist() for rate in errors), strict=True)
    found = np.array([gaussian_mu(*pair, trials, CONFIDENCE) > level for pair in counts])
    expected = chance.shows(level, errors, trials, CONFIDENCE)
    assert near(found, expected) and near(~found, 1 - expected)


def test_an_audit_takes_as_many_trials_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = chance.errors_of(2.4)
    trials = chance.audit_for(2.0, broken)
    ceiling = chance.CEILING
    assert chance.shows(2.0, broken, trials, ceiling) >= 0.9
    assert chance.shows(2.0, broken, trials * 9 // 10, ceiling) < 0.9
    assert chance.audit_for(2.0, reach=1.9) > chance.audit_for(2.0, reach=1.6)
    monkeypatch.setattr(chance, "FALSE_ALARM", 1e-9)
    with pytest.raises(AssertionError):
        chance.audit_for(2.0)
