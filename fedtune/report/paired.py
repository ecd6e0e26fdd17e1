"""Compute paired tests of two versions on the same records, and which differences they can
resolve.

Guarantee: if the null hypothesis of a test holds, P(p ≤ a) ≤ a for every a, at any number of
records: `chance_of` where the two versions are exchangeable; `chance_above` of a share's change,
whatever the share of records about which the two differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import bdtrc  # type: ignore[import-untyped]
from scipy.stats import beta, binom  # type: ignore[import-untyped]

from fedtune.core.registry.metrics import METRICS
from fedtune.report.scores import Scores

SWAPS = 10_000
LEAST_GROUP = 20  # records: of fewer nothing follows
BEYOND = 0.1  # of a test's level: the chance that versions differ about more records than assumed
RATES = 16  # shares of records about which they differ, at which the tail is computed
CHANGED = 0.2  # the share of records about which two versions differ, where a plan must assume one


def chance_of(before: Scores, after: Scores, metric: str) -> float:
    """Compute p of `after` being no better than `before` on the same records by a permutation
    test. It is the share, among SWAPS random exchanges of the two within records and the
    observed result, in which the second is as much better as observed; 1 if it was not better.
    Deterministic: a fixed seed.

    Guarantee: where the two are exchangeable, P(p ≤ a) ≤ a for every a, whatever the metric.
    Source: Noreen 1989, chapter 2 (approximate randomisation); Phipson & Smyth 2010, "Permutation
    p-values should never be zero"."""
    sign = 1 if METRICS[metric].higher_is_better else -1
    found = sign * (after.value(metric) - before.value(metric))
    if not found > 0:
        return 1.0
    least = 1 - 1e-9  # equal but for rounding is as good
    if (parts := _parts(metric, before, after)) is not None:
        total = parts.sum()
        as_good = sum(int((sums >= least * total).sum()) for sums in _signed_sums(parts))
    else:
        as_good = 0
        for swapped in _swaps(len(before.loss)):
            one = before.with_rows_of(after, swapped)
            other = after.with_rows_of(before, swapped)
            as_good += sign * (other.value(metric) - one.value(metric)) >= least * found
    return (1 + as_good) / (1 + SWAPS)


def _parts(metric: str, before: Scores, after: Scores) -> npt.NDArray[np.float64] | None:
    """Split the improvement of `after` into parts of records (n,), up to a factor, and for the
    perplexity a monotone function; None for a metric that is not a sum over records."""
    one, other = before, after
    if metric == "loss":
        parts = one.loss - other.loss
    elif metric == "perplexity":  # the tokens are those of the records
        parts = (one.loss - other.loss) * one.tokens
    elif metric == "exact_match":
        parts = other.exact.astype(float) - one.exact
    elif metric == "preference":
        parts = (np.sign(other.margin) - np.sign(one.margin)) / 2
    elif metric == "accuracy":
        parts = (other.chosen == other.gold).astype(float) - (one.chosen == one.gold)
    else:
        return None
    return np.asarray(parts, dtype=np.float64)


def _swaps(n: int) -> Iterator[np.ndarray]:
    """Draw SWAPS times which of n records are exchanged, from a fixed seed."""
    random = np.random.default_rng(1)
    for _ in range(SWAPS):
        yield random.random(n) < 0.5


def _signed_sums(parts: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the sums of `parts` with random signs, SWAPS in all, from a fixed seed."""
    random, parts = np.random.default_rng(1), parts[parts != 0]
    block = max(1, 2**22 // max(1, len(parts)))
    for start in range(0, SWAPS, block):
        shape = (min(block, SWAPS - start), len(parts))
        yield (2.0 * random.integers(0, 2, shape, dtype=np.int8) - 1.0) @ parts


def changes(before: Scores, after: Scores, metric: str) -> npt.NDArray[np.float64]:
    """Return the improvement of `after` in each record, for a metric that is a share: -1 to 1."""
    parts = _parts(metric, before, after)
    assert parts is not None  # a share of records is a sum over them
    return parts


def chance_above(parts: np.ndarray, least: float, level: float) -> float:
    """Compute p of a share's change being at most `least`, from what changed in each record
    (`changes`), for a decision at `level`: p ≤ level exactly where the lower end of the change's
    one-sided interval at 1 - level lies above `least`.

    How many records change at all is not known: the tail is the largest over all shares up to
    the upper end of that share's own interval, at BEYOND of the level (Berger & Boos 1994). A
    tie that becomes a win is not counted; a tie that becomes a loss counts as a whole record.
    """
    better, worse = int((parts >= 1).sum()), int((parts < 0).sum())
    return _tail(len(parts), better + worse, better - worse, least, level)


def _tail(n: int, changed: int, net: int, least: float, level: float) -> float:
    """Bound the probability that `net` more of n records get better than worse, if their
    expected share is `least` and `changed` of them changed."""
    if not n or net <= least * n or least >= 1:
        return 1.0
    beyond = BEYOND * level
    most = 1.0 if changed >= n else float(beta.ppf(1 - beyond, changed + 1, n - changed))
    rates = np.linspace(min(abs(least) + 1e-9, most), most, RATES)[:, None]
    number = np.arange(n + 1)
    number = number[binom.sf(number, n, most) + binom.pmf(number, n, most) > 1e-15]
    up = np.clip((rates + least) / (2 * rates), 0.0, 1.0)
    below = np.ceil((number + net) / 2) - 1  # of `number` that change, more than so many get better
    tail = np.where(below >= number, 0.0, bdtrc(np.minimum(below, number), number, up))
    return min(1.0, float((binom.pmf(number, n, rates) * tail).sum(axis=1).max()) + beyond)


def least_gain(
    records: int,
    threshold: float,
    margin: float = 0.0,
    groups: Sequence[tuple[int, float]] = (),
    changed: float = CHANGED,
) -> float:
    """Estimate the smallest gain of a share (an accuracy) that is found at p ≤ threshold four
    times in five, with the same gain in each of `groups` (records, and by how much they may get
    worse); above 1 if there is none.

    changed: the share of the records about which the two versions differ, if the gain is not
    larger. The allowed failures, one in five, are divided among the tests.

    >>> round(least_gain(300, 0.05 / 16), 3)
    0.096
    """
    misses = 0.2 / (1 + len(groups))
    if margin:
        gain = _least_gain_above(records, threshold, margin, misses, changed)
    else:
        gain = _least_gain_exchanged(records, threshold, misses, changed)
    others = (_least_gain_above(n, threshold, -worse, misses, changed) for n, worse in groups)
    return max([gain, *others])


def _least_gain_exchanged(records: int, threshold: float, misses: float, changed: float) -> float:
    """Estimate the gain that `chance_of` finds, with this rate of misses: the normal
    approximation."""
    deviations = NormalDist().inv_cdf(1 - threshold) + NormalDist().inv_cdf(1 - misses)
    gain = 0.0
    for _ in range(50):  # more records change than the gain is large
        gain = deviations * math.sqrt(max(changed, gain) / records) + 1 / records
    return gain


def _least_gain_above(n: int, level: float, least: float, misses: float, changed: float) -> float:
    """Return the gain that `chance_above` shows to be more than `least`, with this rate of
    misses; 0 if no gain is needed, above 1 if no gain is enough."""

    def is_shown(gain: float) -> bool:
        rate = max(changed, gain)
        z = NormalDist().inv_cdf(1 - misses)
        net = math.floor(n * gain - z * math.sqrt(n * (rate - gain**2)))
        return _tail(n, min(n, math.ceil(n * rate)), net, least, level) <= level

    if is_shown(0.0):
        return 0.0
    low, high = 0.0, 1.0
    if not is_shown(high):
        return math.inf
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if is_shown(middle) else (middle, high)
    return high
