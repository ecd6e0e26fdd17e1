"""Compute ε of the steps that ran, rounded up. It is computed from privacy loss distributions
(PLD), by the package dp-accounting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.special import logsumexp  # type: ignore[import-untyped]
from scipy.stats import binom, norm  # type: ignore[import-untyped]

from fedtune.core.errors import ConfigError

# Spacing of the grid of privacy losses. It is doubled until the distribution of one step (or of
# all, with q = 1) has at most _POINTS points; of a mixture fewer, since dp-accounting inverts its
# loss point by point.
_INTERVAL = 1e-4
_POINTS = 2**18
_MIXTURE_POINTS = 5_000
MOST = 10**8  # steps, or thousandths of σ, that a search covers
# For a search for n, which is σ in thousandths or a number of steps: the least ratio of an ε to the
# target that is told from 0; the most by which log n changes in one trial; and the number of trials
# after which the search halves what is left.
_LEAST, _FURTHEST, _TRIALS = 1e-12, math.log(4), 8
_TAIL = 10.0  # dp-accounting cuts a Gaussian at mass e⁻⁵⁰/2, 9.8 standard deviations


class Steps(NamedTuple):
    """A number of equal noised steps, as the accountant counts them.

    - noise_multiplier: σ, the noise of each step in multiples of C, the bound on one row
    - sampling_rate: q, the probability with which each row is drawn for a step
    - steps: how many steps there are
    - records: k, the most rows that one unit has; each is drawn with q and clipped to C by itself.
      1 if units are drawn"""

    noise_multiplier: float
    sampling_rate: float
    steps: int
    records: int = 1


def epsilon(events: Iterable[Steps], delta: float) -> float:
    """Compute ε at `delta` of all `events` together, for one unit more or less, by PLD.

    Guarantee: never below the true ε of the composed mechanisms (the PLD estimate is pessimistic,
    whatever the grid). The spacing of the PLD's grid is 10⁻⁴ where that is affordable, else a power
    of two times it.
    | events       | what is composed; σ, q and k are those of `Steps` |
    |--------------|---------------------------------------------------|
    | none         | nothing: 0.0 |
    | q = 1        | a Gaussian with σ/k; if all steps have q = 1, one Gaussian: exact, no grid |
    | k = 1, q < 1 | the Poisson-sampled Gaussian |
    | k > 1, q < 1 | the mixture of Gaussians: sensitivity Binomial(k, q) |
    Errors: ValueError on anything but a `Steps` with 0 < σ < ∞, 0 < q ≤ 1, whole steps ≥ 0 and
    whole k ≥ 1, and on delta outside (0, 1): an unknown mechanism has no ε here.
    Reference: Koskela et al. 2020; Doroshenko et al. 2022 (connect-the-dots); Choquette-Choo et al.
    2024, "Privacy amplification for matrix mechanisms", corollary 4.7 (the mixture dominates rows
    of norm ≤ C in any direction, and fewer than k of them); Dong et al. 2022, "Gaussian
    differential privacy", corollary 3.3 (Gaussians compose to one); Balle & Wang 2018, theorem 8
    (its ε)."""
    return _epsilon(merge_events(events), delta)


def at_least(event: Steps, delta: float) -> float:
    """Return a lower bound on ε of the steps `event` at `delta`, without computing a PLD. The bound
    follows from a test that compares the sum of all steps with a threshold, and so tells the data
    with one unit from the data without it. (The test's hit rate is bounded by Chebyshev's
    inequality, its false alarms by the normal tail.)"""
    sigma, rate, steps, k = event
    deviation = math.hypot(sigma, math.sqrt(k * rate * (1 - rate)))
    mean, spread = k * steps * rate, math.sqrt(steps) * deviation
    threshold = (mean - 4 * spread) / (sigma * math.sqrt(steps))
    hit = 1 - 1 / 16 - delta
    if threshold <= 0 or hit <= 0:
        return 0.0
    return max(0.0, math.log(hit) - float(norm.logsf(threshold)))


def calibrate(
    target: float, delta: float, sampling_rate: float, steps: int, records: int = 1
) -> float:
    """Return the smallest multiple of 0.001 that, as σ of all steps, gives ε ≤ target.

    - target: the ε that all steps together may cost, > 0
    - delta: the δ at which ε is computed
    - sampling_rate: q, the probability with which a row is drawn for a step
    - steps: how many equal steps are taken
    - records: k, the most rows of one unit in a step; 1 if units are drawn

    σ is in multiples of C, the bound on one row.
    Guarantee: ε of the σ that is returned, by the accountant that reports use, is at most `target`.
    Errors: ConfigError if no σ up to MOST thousandths suffices, or ε cannot be computed."""

    def cost(thousandths: int) -> float:
        return epsilon([Steps(thousandths / 1000, sampling_rate, steps, records)], delta)

    start = 1000 * max(records, records * sampling_rate * math.sqrt(steps) / _shift(target, delta))
    smallest = _first(cost, target, start, MOST, power=-1.0)
    if smallest is None:
        raise ConfigError(
            f"no noise_multiplier up to {MOST // 1000} reaches epsilon = {target}",
            todo="raise epsilon, or lower rounds or sampling_rate",
        )
    return smallest / 1000


def affordable_steps(
    target: float,
    delta: float,
    sampling_rate: float,
    sigma: float,
    records: int = 1,
    most: int = MOST,
) -> int:
    """Return the largest number of equal steps with ε ≤ target; 0 if not even one fits.

    - target: the ε that all steps together may cost, > 0
    - delta: the δ at which ε is computed
    - sampling_rate: q, the probability with which a row is drawn for a step
    - sigma: the noise multiplier of each step, in multiples of C, the bound on one row
    - records: k, the most rows of one unit in a step; 1 if units are drawn
    - most: the largest number of steps that is tried

    Errors: ConfigError if more than `most` fit, or ε cannot be computed."""

    def cost(steps: int) -> float:
        return epsilon([Steps(sigma, sampling_rate, steps, records)], delta)

    start = (_shift(target, delta) * sigma / (sampling_rate * records)) ** 2
    first_too_many = _first(cost, target, start, most + 1, power=0.5)
    if first_too_many is None:
        raise ConfigError(
            f"epsilon = {target} pays for more than {most} steps at noise_multiplier = {sigma} and "
            f"sampling_rate = {sampling_rate}",
            todo="lower epsilon or noise_multiplier, or raise sampling_rate",
        )
    return first_too_many - 1


def _shift(target: float, delta: float) -> float:
    """Estimate by how many standard deviations of the noise one unit may move a sum if ε is to be
    `target` at `delta`. The searches for σ and for a number of steps begin at this estimate, since
    ε is expensive to compute far below the right noise."""
    z = math.sqrt(-2 * math.log(delta))
    return 2 * target / (z + math.sqrt(z * z + 2 * target))


def _first(
    cost: Callable[[int], float], target: float, start: float, most: int, power: float
) -> int | None:
    """Find the smallest n from 1 to `most` at which the cost crosses `target`: cost(n) ≤ target
    if costs fall with n, cost(n) > target if they rise. None if there is none.

    Each cost takes up to a second to compute. So the next n is where a power law through the last
    two costs meets the target; bisection would compute two to three times as many costs.

    - cost: ε as a function of n, which falls or rises with n
    - target: the ε that is searched for
    - start: the n that is tried first, rounded and bounded by 1 and `most`
    - most: the largest n that is tried
    - power: about how ε depends on n near the start, ε ∝ n^power. Below 0: costs fall with n"""
    before, found = 0, most + 1  # the answer is above the first, and at most the second
    n, trials = int(min(max(start, 1), most)), 0
    last: tuple[float, float] | None = (
        None  # logarithms of n and of its cost in multiples of target
    )
    while found - before > 1:
        price = cost(n)
        if (price <= target) == (power < 0):
            found = n
        else:
            before = n
        here = math.log(n), math.log(min(max(price / target, _LEAST), 1 / _LEAST))
        slope = power if last is None else (here[1] - last[1]) / (here[0] - last[0])
        if slope * power <= 0:  # costs that are cut at _LEAST tell no slope
            slope = power
        move = min(max(-here[1] / slope, -_FURTHEST), _FURTHEST)
        guess = math.ceil(n * math.exp(move)) if n == before else math.floor(n * math.exp(move))
        last, trials = here, trials + 1
        n = guess if trials < _TRIALS else (before + found) // 2
        n = min(max(n, before + 1), found - 1)
    return found if found <= most else None


# -------------------------------------------------------------------------------------- events


def merge_events(events: Iterable[Steps]) -> tuple[Steps, ...]:
    """Return the events with those of equal (σ, q, k) merged, sorted, so that the same steps in any
    order give the same ε. Errors: ValueError for an event that the accountant cannot count."""
    counts: dict[tuple[float, float, int], int] = {}
    for event in events:
        if not _is_valid(event):
            raise ValueError(
                "an event is Steps(σ, q, steps, records) with 0 < σ < ∞, 0 < q ≤ 1, "
                "a whole count ≥ 0 and whole records ≥ 1; no other mechanism is accounted"
            )
        key = (float(event.noise_multiplier), float(event.sampling_rate), event.records)
        counts[key] = counts.get(key, 0) + event.steps
    return tuple(Steps(s, q, n, k) for (s, q, k), n in sorted(counts.items()) if n)


def _is_valid(event: object) -> bool:
    if not isinstance(event, Steps):
        return False
    sigma, rate, count, records = event
    if not (_is_number(sigma) and _is_number(rate)):
        return False
    if type(count) is not int or type(records) is not int:  # bool is an int, but no count
        return False
    return 0 < sigma < math.inf and 0 < rate <= 1 and count >= 0 and records >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, (float, int)) and not isinstance(value, bool)


def check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError("delta must be in (0, 1)")


# ----------------------------------------------------------------------------------------- PLD


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Steps, ...], delta: float) -> float:
    check_delta(delta)
    try:
        return _compute_epsilon(events, delta)
    except (ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise ConfigError(
            "ε of these steps cannot be computed",
            "a noise_multiplier and a sampling_rate of the usual size",
            "raise noise_multiplier, or lower max_records_per_unit or rounds",
        ) from error


def _compute_epsilon(events: tuple[Steps, ...], delta: float) -> float:
    if all(event.sampling_rate == 1 for event in events):
        return _gaussian(math.hypot(*(_mu(event) for event in events)), delta)
    return float(_compose_distributions(events).get_epsilon_for_delta(delta))


def _mu(event: Steps) -> float:
    """Return by how many standard deviations of the noise one unit moves the sum of all steps of
    `event`, whose sampling rate q is 1."""
    return event.records * math.sqrt(event.steps) / event.noise_multiplier


def _gaussian(mu: float, delta: float) -> float:
    """Return ε at `delta`, rounded up, of a Gaussian mechanism. mu: by how many standard deviations
    of the noise one unit moves the mean."""
    if mu == 0:
        return 0.0
    loss = GaussianPrivacyLoss(standard_deviation=1.0, sensitivity=mu)

    def above(epsilon: float) -> float:
        return float(loss.get_delta_for_epsilon(epsilon)) - delta

    if above(0.0) <= 0:
        return 0.0
    # An upper bound on ε by zero-concentrated DP (Bun & Steinke 2016, proposition 1.3).
    most = mu * (mu / 2 + math.sqrt(-2 * math.log(delta)))
    return float(brentq(above, 0.0, most, xtol=1e-12, rtol=1e-13)) * (1 + 1e-9) + 1e-9


@lru_cache(maxsize=8)
def _compose_distributions(events: tuple[Steps, ...]) -> pld.PrivacyLossDistribution:
    interval = max(_interval(event) for event in events)  # distributions compose on one grid only
    total = pld.identity(value_discretization_interval=interval)
    for event in events:
        sigma, rate, count, records = event
        if rate == 1:
            composed = pld.from_gaussian_mechanism(
                1 / _mu(event), value_discretization_interval=interval
            )
        else:
            composed = _one_step(sigma, rate, records, interval).self_compose(count)
        total = total.compose(composed)
    return total


@lru_cache(maxsize=64)
def _one_step(
    sigma: float, rate: float, records: int, interval: float
) -> pld.PrivacyLossDistribution:
    """Return the privacy loss distribution of one step: that of a Poisson-sampled Gaussian or, for
    k > 1, of a mixture of Gaussians.

    - sigma: the noise multiplier, in multiples of C
    - rate: q, below 1
    - records: k, the most rows of one unit in the step
    - interval: the spacing of the distribution's grid of privacy losses"""
    if records == 1:
        return pld.from_gaussian_mechanism(
            sigma, sampling_prob=rate, value_discretization_interval=interval
        )
    rows = range(records + 1)
    return pld.from_mixture_gaussian_mechanism(
        sigma, rows, binom.pmf(rows, records, rate), value_discretization_interval=interval
    )


def _interval(event: Steps) -> float:
    """Return the spacing of the grid on which privacy losses of the steps `event` are computed:
    10⁻⁴, doubled until the grid has at most _POINTS points (for a mixture, _MIXTURE_POINTS)."""
    sigma, rate, _, records = event
    if rate == 1:
        mu = _mu(event)
        span, points = mu * (mu + 2 * _TAIL), _POINTS
    elif records == 1:
        span, points = (1 / sigma + 2 * _TAIL) / sigma, _POINTS
    else:
        span, points = _mixture_span(sigma, rate, records), _MIXTURE_POINTS
    return _INTERVAL * 2.0 ** max(0, math.ceil(math.log2(span / (points * _INTERVAL))))


def _mixture_span(sigma: float, rate: float, records: int) -> float:
    """Estimate the range of the privacy losses of one step, i.e. the largest loss less the least.
    The least is k · log(1 − q). The largest that is not cut off with the tail is log Σ p_j exp((j·x
    − j²/2)/σ²) at the largest output x, where p_j is the probability that j rows of the unit are
    drawn.

    - sigma: σ, in multiples of C
    - rate: q
    - records: k, the most rows of the unit"""
    rows = np.arange(records + 1)
    most = int(np.argmax(binom.sf(rows, records, rate) < 1e-22))
    x = most + _TAIL * sigma
    losses = binom.logpmf(rows, records, rate) + (rows * x - rows**2 / 2) / sigma**2
    return float(logsumexp(losses)) - records * math.log1p(-rate)
