"""How many draws a statistical test takes, and where its bounds lie, from two chances.

| FALSE_ALARM | that a test of code that is right fails |
| MISSED | that a test of code with the bug that its twin has passes |

A test names the smallest fault that it has to tell from what is right, and asks here for the draws:
no number of trials and no number of standard deviations is typed beside an assertion. Where a test
draws several figures, the chance is divided by their number. Distributions are exact (χ², binomial)
but for `deviations`, which takes a mean of many independent terms for normal. A test whose figures
follow no known law draws from a seed: tests/simulated.py has such noise for whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.special import bdtr, bdtrik, betainccinv, ndtr, ndtri  # type: ignore[import-untyped]
from scipy.stats import binom, chi2, norm  # type: ignore[import-untyped]

from fedtune.audit.bounds import gaussian_epsilon
from fedtune.audit.gaussian import CEILING, CONFIDENCE

FALSE_ALARM, MISSED = 1e-5, 1e-5


def fewest(enough: Callable[[int], bool], least: int = 1) -> int:
    """Return the fewest trials that are `enough`, within one in a hundred.

    >>> fewest(lambda trials: trials >= 1000)
    1000
    """
    most = least
    while not enough(most):
        least, most = most, 2 * most
    while most - least > max(1, most // 100):
        middle = (least + most) // 2
        least, most = (least, middle) if enough(middle) else (middle, most)
    return most


# ---------------------------------------------------------------------------------- means


def deviations(figures: int = 1) -> float:
    """Return how many standard deviations off the largest of so many right figures may be.

    >>> round(deviations(), 2), round(deviations(1000), 2)
    (4.42, 5.73)
    """
    return float(norm.isf(FALSE_ALARM / 2 / figures))


def draws_of_mean(shift: float, figures: int = 1) -> int:
    """Return the draws whose mean tells a shift, in standard deviations of one draw.

    >>> draws_of_mean(0.1)
    7538
    """
    return math.ceil(((deviations(figures) + norm.isf(MISSED)) / abs(shift)) ** 2)


# --------------------------------------------------------------------------------- spreads


@dataclass(frozen=True)
class Spread:
    """A test of a standard deviation of normal draws. low, high: what it may be, over what it
    should be."""

    draws: int
    low: float
    high: float

    def holds(self, ratio: float) -> bool:
        return self.low <= ratio <= self.high

    def missed(self, factor: float) -> float:
        """Return the chance that draws whose deviation is `factor` times what it should be pass."""
        squares = [self.draws * (bound / factor) ** 2 for bound in (self.low, self.high)]
        low, high = chi2.cdf(squares, self.draws)
        return float(high - low)


def spread_of(draws: int, figures: int = 1) -> Spread:
    """Bound the standard deviation of so many draws, or of each of `figures` such samples."""
    tail = FALSE_ALARM / 2 / figures
    low, high = np.sqrt([chi2.ppf(tail, draws) / draws, chi2.isf(tail, draws) / draws])
    return Spread(draws, float(low), float(high))


def spread_for(*factors: float, figures: int = 1) -> Spread:
    """Return the test of the fewest draws that tells σ from σ times each of `factors`.

    >>> test = spread_for(0.99, 1.01)
    >>> test.draws, test.holds(1.005), test.holds(0.99), test.missed(1.01) <= MISSED
    (380928, True, False, True)
    """

    def enough(draws: int) -> bool:
        return all(spread_of(draws, figures).missed(factor) <= MISSED for factor in factors)

    return spread_of(fewest(enough), figures)


def spread_within(bound: float, *factors: float, figures: int = 1) -> Spread:
    """Return the test of the fewest draws whose deviation is right within `bound`, and that tells
    σ from σ times each of `factors`.

    >>> spread_within(0.003, 0.99, 1.01).draws
    1089536
    """

    def enough(draws: int) -> bool:
        exact, test = spread_of(draws, figures), Spread(draws, 1 - bound, 1 + bound)
        narrow = 1 - bound <= exact.low and exact.high <= 1 + bound
        return narrow and all(test.missed(factor) <= MISSED for factor in factors)

    return Spread(fewest(enough), 1 - bound, 1 + bound)


# ---------------------------------------------------------------------------------- counts


@dataclass(frozen=True)
class Count:
    """A test of how often something happened. low, high: how often it may."""

    trials: int
    low: int
    high: int

    def holds(self, count: int) -> bool:
        return self.low <= count <= self.high

    def missed(self, rate: float) -> float:
        """Return the chance that a count of another rate passes."""
        return float(
            binom.cdf(self.high, self.trials, rate) - binom.cdf(self.low - 1, self.trials, rate)
        )


def count_of(trials: int, rate: float, figures: int = 1) -> Count:
    """Bound a count of independent events of one rate, or each of `figures` such counts.

    >>> count_of(100, 0.5)
    Count(trials=100, low=28, high=72)
    """
    tail = FALSE_ALARM / 2 / figures
    return Count(trials, int(binom.ppf(tail, trials, rate)), int(binom.isf(tail, trials, rate)))


def count_for(rate: float, *others: float, figures: int = 1) -> Count:
    """Return the test of the fewest trials that tells a rate from each of `others`.

    >>> count_for(0.5, 0.6)
    Count(trials=1872, low=841, high=1031)
    """

    def enough(trials: int) -> bool:
        return all(count_of(trials, rate, figures).missed(other) <= MISSED for other in others)

    return count_of(fewest(enough), rate, figures)


def tries(chance: float, figures: int = 1) -> int:
    """Return how often to try until each of so many events of this chance has happened once.

    >>> tries(0.5)
    17
    """
    return math.ceil(math.log(FALSE_ALARM / figures) / math.log1p(-chance))


# ---------------------------------------------------------------------------------- audits


def mu_at(epsilon: float, delta: float) -> float:
    """Return the μ at which a Gaussian mechanism has this ε."""
    return float(brentq(lambda mu: gaussian_epsilon(mu, delta) - epsilon, 1e-3, 1e3))


def errors_of(mu: float) -> tuple[float, float]:
    """Return the two error rates of an attack on a Gaussian mechanism, its threshold half-way."""
    return float(norm.sf(mu / 2)), float(norm.sf(mu / 2))


def shows(level: float, errors: tuple[float, float], trials: int, confidence: float) -> float:
    """Return the chance that an attack's lower bound on μ exceeds `level`.

    errors: how often it takes an absent unit for present, and a present one for absent; each is
    counted over `trials`. Exact: a sum over the first count of what the second may then be.

    >>> shows(3.0, errors_of(3.0), 10_000, CEILING) < FALSE_ALARM
    True
    """
    alarm, miss = errors
    each = (1 - confidence) / 2  # that a rate's own bound is wrong
    counts = np.arange(bdtrik(1e-12, trials, alarm), trials - bdtrik(1e-12, trials, 1 - alarm) + 1)
    counts = np.unique(np.clip(np.floor(counts), 0, trials - 1))
    upper = betainccinv(counts + 1, trials - counts, each)
    allowed = ndtr(-level - ndtri(upper))
    most = np.ceil(bdtrik(each, trials, allowed)) - 1  # of the second count
    passed = np.where(most >= 0, bdtr(np.maximum(most, 0), trials, miss), 0.0)
    return float(binom.pmf(counts, trials, alarm) @ passed)


def audit_for(mu: float, *broken: tuple[float, float], reach: float = 0.0, figures: int = 1) -> int:
    """Return the fewest trials a side of an audit of a claim μ, one of so many figures of a test.

    A right step's bound at CEILING is above the claim at most FALSE_ALARM often, and its bound at
    CONFIDENCE below `reach`; that of each `broken` one, by its errors, is not above at most MISSED
    often. Errors: AssertionError where CEILING is too low for FALSE_ALARM."""

    def enough(trials: int) -> bool:
        weak = 1 - shows(reach, errors_of(mu), trials, CONFIDENCE) if reach else 0.0
        missed = (1 - shows(mu, errors, trials, CEILING) for errors in broken)
        return weak <= FALSE_ALARM / figures and all(chance <= MISSED for chance in missed)

    trials = fewest(enough, 100)
    assert shows(mu, errors_of(mu), trials, CEILING) <= FALSE_ALARM / figures
    return trials
