"""Bound ε of adaptively chosen studies with privacy filters.

Steps that take every unit (q = 1) are Gaussian mechanisms. A filter that adds up the squares of
their shifts k/σ costs no more than if all steps had been planned at once, however each step is
chosen from earlier results (Smith & Thakurta 2022). Sampled steps have no such filter. If a sampled
step is among others, all steps are bounded by their Rényi divergence, or by what they would cost if
none sampled, whichever is less.

ρ_i(α) is the Rényi divergence of event i at the order α. A filter adds up ρ_i(α) over all events i,
each of which may have been chosen because of earlier outputs. The sum is a bound only if α is a
constant of the proof, which rests on a supermartingale: E[exp((α − 1) · (loss so far − ρ so far))]
≤ 1. This is a separate statement for each α. For an α that was written down first, it holds at
whichever stopping point the outputs lead to. An accountant for fixed events may take the best of
many orders at the end. A filter may not: the best order would itself depend on private outputs, and
none of the statements covers the minimum of the bounds.

So one order is fixed when a dataset is first charged, and kept for the dataset's life. It follows
from the site's ceiling and δ alone. If it followed from the first plan, a coordinator could choose
a plan of almost no ε whose order makes every later study expensive, and one membership of a
hospital could tell from its own ε what another had planned.

Orders are > 1. ρ_i is in nats and is added up over all events; their sum is converted to ε once.
Reference: Feldman & Zrnic 2021, "Individual privacy accounting via a Rényi filter" (here without
the individual part); Mironov 2017."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from dp_accounting.rdp import compute_epsilon
from scipy.special import logsumexp  # type: ignore[import-untyped]
from scipy.stats import binom  # type: ignore[import-untyped]

from fedtune.core.dp import accountant
from fedtune.core.dp.accountant import Steps, merge_events

# Small orders, which suit a large ε, are close together; large orders are further apart.
ORDERS = (
    *(1 + n / 20 for n in range(2, 60)),
    *(4 + n / 4 for n in range(32)),
    *range(12, 32),
    *(2 ** (n / 2) for n in range(10, 17)),
)
RENYI = 0.9  # share of δ for the Rényi filter, where the first step samples
_CHUNK = 2**14  # points of an integral at once
_MOST_TERMS = 2**22  # most terms of an integral (0.1 s); a larger one is only bounded


@lru_cache(maxsize=64)
def best_order(epsilon: float, delta: float) -> float:
    """Choose the order of `ORDERS` at which the most Gaussian noise fits within `epsilon`, i.e. at
    which the Rényi divergence that the budget allows is largest per unit of order. Call this once
    per dataset, before any result is released, and store the order.

    If `epsilon` is so small that no order leaves a budget, return the order at which the least
    divergence is missing per unit of order. The Rényi filter then admits nothing, but
    `total_epsilon` may still admit charges by another filter. Errors: ValueError when epsilon or
    delta is out of range."""
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError("epsilon must be positive and finite")
    return float(max(ORDERS, key=lambda order: budget(epsilon, order, delta) / order))


def rdp(events: Iterable[Steps], order: float) -> float:
    """Return the sum of the Rényi divergences of all events, Σ ρ_i(order) in nats, for one unit
    more or less.

    In the table, k is the most rows of one unit in a step.

    | events | their divergence |
    |--------|------------------|
    | q = 1 | order · steps · (k/σ)² / 2 |
    | q < 1 | between N(0, σ²) and Σ_j Binomial(k, q)(j) · N(j, σ²): the larger of both directions |
    | q < 1, σ so far below k that the integral takes too long | as for q = 1, an upper bound |
    Guarantee: never below the true divergence. With q < 1 each integral is rounded up by
    10⁻¹²/(order − 1), far above its error. These two distributions dominate the mechanism, so their
    divergence is at least the mechanism's.
    Errors: ValueError on an impossible event or an order ≤ 1.
    Reference: Mironov, Talwar & Zhang 2019 (k = 1); Choquette-Choo et al. 2024, corollary 4.7 (the
    dominating pair); Zhu, Dong & Wang 2022 (domination carries over to Rényi)."""
    order, total = _check_order(order), 0.0
    for sigma, rate, steps, records in merge_events(events):
        if rate == 1:
            total += order * steps * (records / sigma) ** 2 / 2
        else:
            total += steps * _compute_sampled_rdp(sigma, rate, records, order)
    return total


@lru_cache(maxsize=65536)
def _compute_sampled_rdp(sigma: float, rate: float, records: int, order: float) -> float:
    """Return the Rényi divergence at `order`, in nats, of one step with q < 1. If the integral
    would take too long, because σ is far below k, return the divergence of a step that takes all k
    rows. This is an upper bound, since the Rényi divergence is quasi-convex (van Erven & Harremoës
    2014, theorem 13).

    - sigma: the noise multiplier, in multiples of C
    - rate: q, the probability with which a row is drawn
    - records: k, the most rows of one unit in the step
    - order: the Rényi order, > 1"""
    if _terms(sigma, records, order) > _MOST_TERMS:
        return order * (records / sigma) ** 2 / 2
    remove = _log_moment(sigma, rate, records, order)
    add = _log_moment(sigma, rate, records, 1 - order)
    return (max(remove, add, 0.0) + 1e-12) / (order - 1)


def _log_moment(sigma: float, rate: float, records: int, power: float) -> float:
    """Return log E[(mixture(x)/normal(x))^power] for x ~ N(0, σ²), integrated by the trapezoidal
    rule.

    - sigma: σ, in multiples of C
    - rate, records: q and k. The mixture is Σ_j p_j N(j, σ²), where p_j is the probability that
      Binomial(k, q) is j; the normal is N(0, σ²)
    - power: the order if the unit is removed, 1 - order if it is added

    The ratio Σ_j p_j exp((jx − j²/2)/σ²) has only zeros with |imaginary part| = πσ² (its polynomial
    in exp(x/σ²) has negative roots alone), and the integrand falls like a Gaussian of width σ, so a
    spacing of min(σ, σ²)/4 errs by less than 10⁻³⁰ (Trefethen & Weideman 2014, theorem 5.1)."""
    spacing = min(sigma, sigma**2) / 4
    low, high = sorted((0.0, power * records))  # between these lies every peak
    first, last = math.floor(low / spacing), math.ceil(high / spacing)
    beyond = math.ceil(12 * sigma / spacing)
    rows = np.arange(records + 1)
    log_weight = binom.logpmf(rows, records, rate) - rows**2 / (2 * sigma**2)
    parts = []
    for start in range(first - beyond, last + beyond + 1, _CHUNK):
        x = spacing * np.arange(start, min(start + _CHUNK, last + beyond + 1))
        ratio = logsumexp(log_weight + x[:, None] * (rows / sigma**2), axis=1)
        parts.append(logsumexp(power * ratio - (x / sigma) ** 2 / 2))
    scale = math.log(spacing / (sigma * math.sqrt(2 * math.pi)))
    return float(logsumexp(parts)) + scale


def _terms(sigma: float, records: int, order: float) -> float:
    """Estimate how many terms `_log_moment` adds up for its integral: the number of points, times
    the number of possible counts of a unit's drawn rows (0 to k)."""
    return (order * records + 24 * sigma) / (min(sigma, sigma**2) / 4) * (records + 1)


def epsilon_of(rdp: float, order: float, delta: float) -> float:
    """Convert the Rényi divergence `rdp` (nats) at `order` to ε at `delta`; 0 if rdp is 0.

    Reference: Canonne, Kamath & Steinke 2020, proposition 12."""
    if not (rdp >= 0 and 0 < delta < 1):
        raise ValueError("a divergence must be ≥ 0 and delta in (0, 1)")
    return float(compute_epsilon([_check_order(order)], [rdp], delta)[0])


def budget(epsilon: float, order: float, delta: float) -> float:
    """Compute the largest Rényi divergence (nats) at `order` that converts to at most `epsilon` at
    `delta`; 0 or a negative number if there is none."""
    if not 0 < delta < 1:
        raise ValueError("delta must be in (0, 1)")
    return epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)


def filtered_epsilon(events: Iterable[Steps], order: float, delta: float) -> float:
    """Compute ε at `delta` of `events`, each of which may depend on the results of earlier ones.
    Without events it is 0.0. order: the Rényi order of the filter.

    Guarantee: if every event that would take this ε past a ceiling E is refused, all that is
    released is (E, delta)-DP, provided that `order` was fixed before the first result."""
    return epsilon_of(rdp(events, order), order, delta)


def _check_order(order: float) -> float:
    if not (order > 1 and math.isfinite(order)):
        raise ValueError("a Rényi order must be above 1 and finite")
    return float(order)


class Total(NamedTuple):
    """The ε of several charges together.

    - epsilon: the ε
    - how: the method by which it was computed, in words for people, such as "PLD"
    """

    epsilon: float
    how: str


def total_epsilon(
    events: Sequence[Steps],
    orders: float | Iterable[float],
    delta: float,
    samples_first: bool = True,
    kinds_known: bool = True,
) -> Total:
    """Compute ε at 2 · `delta` of all `events`, which may have been chosen adaptively.

    orders: the Rényi order of the filter, which was fixed with the dataset's first charge. Several,
    if it is not known which of them was fixed first (`ledger.entries.orders_of`): the filter's ε is
    then computed at each of them, and the largest is used.

    samples_first: whether the first step sampled (q < 1), or may have.

    kinds_known: whether each of `events` says what its steps were. False if some only bound them,
    as charges for steps that a ledger lost (`ledger.entries.are_kinds_known`): (a) is then left out

    Three filters:
    (a) while all charges are of one kind of step (σ, q, k), ε is composed exactly by PLD (stopping
        a fixed composition early is post-processing);
    (b) all charges go through the filter for Gaussian differential privacy, as if every step took
        every unit. A sampled step mixes outcomes with at most k rows of a unit, and a test errs
        against a mixture at least as often as against its easiest part: so the step is (k/σ)-GDP,
        as without sampling. Where no step samples, this is exact;
    (c) all charges go through the Rényi filter, at the order that was fixed.
    The smallest ε counts. Why this is a bound: the ε of each filter only grows with further
    charges. So if a transcript ends below E by one filter, it was below E by the same filter at
    every charge. For each filter, all transcripts of this kind together have P ≤ e^E Q + the
    filter's δ. No result influenced the first step. If the first step does not sample, (a) is a
    case of (b), and (b) and (c) have `delta` each. Else (a) has `delta`, (c) RENYI · `delta`, and
    (b) the rest. Both give 2 · `delta` in all.

    | events                           | ε |
    |----------------------------------|---|
    | none                             | 0 |
    | a study without privacy (σ = 0)  | infinity |
    Guarantee: while this stays below a ceiling E at every charge, all that was released is
    (E, 2 · delta)-DP, whatever the choice of studies depended on.
    Reference: Feldman & Zrnic 2021, "Individual privacy accounting via a Rényi filter", section 4;
    Smith & Thakurta 2022, "Fully adaptive composition for Gaussian differential privacy"; Rogers et
    al. 2016 for filters."""
    if any(event.noise_multiplier == 0 for event in events):
        return Total(math.inf, "a study without privacy")
    if kinds_known and len({event._replace(steps=0) for event in events}) <= 1:
        return Total(accountant.epsilon(events, delta), "PLD")
    if all(event.sampling_rate == 1 for event in events):
        return Total(accountant.epsilon(events, delta), "Gaussian filter, exact")
    renyi, gauss = (RENYI * delta, (1 - RENYI) * delta) if samples_first else (delta, delta)
    several = [orders] if isinstance(orders, int | float) else orders
    most, order = max((filtered_epsilon(events, order, renyi), order) for order in several)
    whole = accountant.epsilon([event._replace(sampling_rate=1.0) for event in events], gauss)
    if whole <= most:
        return Total(whole, "Gaussian filter, as if no step sampled")
    return Total(most, f"Rényi filter, order {order:g}")
