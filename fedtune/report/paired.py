"""Compute paired tests of two versions on the same records, and the smallest differences that the
tests can show.

Guarantee: if the null hypothesis of a test holds, P(p ≤ a) ≤ a for every a and any number of
records. The null hypothesis of `chance_of` is that the two versions are exchangeable. That of
`chance_above` is that a share changes by at most a given value, whatever the number of records on
which the versions differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fedtune.core.registry.metrics import METRICS
from fedtune.report.scores import Scores

SWAPS = 10_000
LEAST_GROUP = 20  # records that a group needs for a test
# The part of a test's level that is set aside for this case: the true share of records on which the
# versions differ lies above the upper end of its interval.
BEYOND = 0.1
RATES = 16  # number of values of the share of differing records at which the tail is computed
CHANGED = 0.2  # the share of records on which two versions are assumed to differ before a study


def chance_of(before: Scores, after: Scores, metric: str) -> float:
    """Compute the p-value of the hypothesis that `after` is no better than `before`, by a
    permutation test on the same records.

    SWAPS times, each record's two scores are exchanged at random. p is the share of the results,
    the observed one included, in which `after` is better by at least as much as was observed; p is
    1 if `after` was not better. The seed is fixed, so the same scores give the same p.

    Guarantee: if the two are exchangeable, P(p ≤ a) ≤ a for every a, whatever the metric.
    Source: Noreen 1989, chapter 2 (approximate randomisation); Phipson & Smyth 2010, "Permutation
    p-values should never be zero"."""
    sign = 1 if METRICS[metric].higher_is_better else -1
    found = sign * (after.value(metric) - before.value(metric))
    if not found > 0:
        return 1.0
    least = 1 - 1e-9  # results that differ by rounding alone count as equal
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
    """Return for each record its part in the metric's improvement from `before` to `after`: (n,),
    above 0 if `after` is better on the record. If `before` and `after` exchange their scores of a
    record, that record's part changes its sign. The sum of the parts grows with the improvement, so
    that it orders all such exchanges as the improvement does. Return None for a metric that has no
    such parts (F1)."""
    one, other = before, after
    if metric == "loss":
        parts = one.loss - other.loss
    elif metric == "perplexity":  # both versions have the same tokens, so only the losses differ
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
    """Yield SWAPS random masks (n,) of booleans from a fixed seed: true for the records whose two
    scores are exchanged."""
    random = np.random.default_rng(1)
    for _ in range(SWAPS):
        yield random.random(n) < 0.5


def _signed_sums(parts: np.ndarray) -> Iterator[np.ndarray]:
    """Choose signs of `parts` at random, SWAPS times and from a fixed seed, and yield the sums of
    the parts with these signs, in arrays of many sums each. A changed sign stands for a record
    whose two scores are exchanged."""
    random, parts = np.random.default_rng(1), parts[parts != 0]
    block = max(1, 2**22 // max(1, len(parts)))
    for start in range(0, SWAPS, block):
        shape = (min(block, SWAPS - start), len(parts))
        yield (2.0 * random.integers(0, 2, shape, dtype=np.int8) - 1.0) @ parts


def changes(before: Scores, after: Scores, metric: str) -> npt.NDArray[np.float64]:
    """Return how much better `after` is than `before` on each record: (n,), from -1 to 1. The
    metric must be a share of records, such as accuracy."""
    parts = _parts(metric, before, after)
    assert parts is not None  # a share of records is a sum over records
    return parts


def chance_above(parts: np.ndarray, least: float, level: float) -> float:
    """Compute the p-value, for a decision at `level`, of the hypothesis that a share changes by at
    most `least`. p ≤ level if and only if the lower end of the change's one-sided interval at
    confidence 1 - level is above `least`.

    - parts: each record's change (n,), from `changes`
    - least: a change of the share, from -1 to 1; below 0 for the most by which it may get worse
    - level: the largest p at which the hypothesis is rejected

    The true share of records that change is not known. So p is the largest tail probability over
    all values of this share, up to the upper end of an interval of the share that errs with
    probability BEYOND · level; this probability is added to p (Berger & Boos 1994). To be on the
    safe side, a record that gets better by half (a tie that becomes a win) does not count as
    better, and a record that gets worse by half counts as a whole record."""
    better, worse = int((parts >= 1).sum()), int((parts < 0).sum())
    return _tail(len(parts), better + worse, better - worse, least, level)


def _tail(n: int, changed: int, net: int, least: float, level: float) -> float:
    """Bound the probability that at least `net` more records get better than get worse, if the
    expected difference is at most least · n.

    - n: the number of records
    - changed: the number of the n records that were observed to change
    - net: how many more of them were observed to get better than to get worse
    - least: the expected difference, as a share of the n records
    - level: the level of the decision. BEYOND · level of it is added to the bound, for the case
      that more records change than the interval of their share allows."""
    if not n or net <= least * n or least >= 1:
        return 1.0
    # Imported here, since commands that only list a run's versions import this module.
    from scipy.special import bdtrc  # type: ignore[import-untyped]
    from scipy.stats import beta, binom  # type: ignore[import-untyped]

    beyond = BEYOND * level
    most = 1.0 if changed >= n else float(beta.ppf(1 - beyond, changed + 1, n - changed))
    rates = np.linspace(min(abs(least) + 1e-9, most), most, RATES)[:, None]
    number = np.arange(n + 1)
    number = number[binom.sf(number, n, most) + binom.pmf(number, n, most) > 1e-15]
    up = np.clip((rates + least) / (2 * rates), 0.0, 1.0)
    below = np.ceil((number + net) / 2) - 1  # so many changes for the better are still too few
    tail = np.where(below >= number, 0.0, bdtrc(np.minimum(below, number), number, up))
    return min(1.0, float((binom.pmf(number, n, rates) * tail).sum(axis=1).max()) + beyond)


def least_gain(
    records: int,
    threshold: float,
    margin: float = 0.0,
    groups: Sequence[tuple[int, float]] = (),
    changed: float = CHANGED,
) -> float:
    """Estimate the smallest gain of a share, such as an accuracy, that a study finds with a power
    of 0.8; above 1 if no gain is enough.

    - records: number of public records
    - threshold: the largest p-value at which a test succeeds
    - margin: how much better the new version must be
    - groups: for each group, its number of records and the margin by which it may get worse; the
      gain is taken to be the same in each
    - changed: the share of records on which the versions are assumed to differ, unless the gain is
      larger

    The probability 0.2 of missing the gain is divided equally among the tests: that of all records,
    and that of each group.

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
    """Estimate the smallest gain that `chance_of` shows, except with probability `misses`, by the
    normal approximation. Return it as a share of the records; it may be above 1.

    - records: the number of records
    - threshold: the largest p-value at which the test succeeds
    - misses: the probability that the test misses the gain
    - changed: the share of records on which the versions differ, unless the gain is larger"""
    deviations = NormalDist().inv_cdf(1 - threshold) + NormalDist().inv_cdf(1 - misses)
    gain = 0.0
    for _ in range(50):  # the share that changes is at least the gain, which is not known yet
        gain = deviations * math.sqrt(max(changed, gain) / records) + 1 / records
    return gain


def _least_gain_above(n: int, level: float, least: float, misses: float, changed: float) -> float:
    """Return the smallest gain that `chance_above` shows to be above `least`, except with
    probability `misses`; 0 if no gain is needed, above 1 if none is enough.

    - n: the number of records
    - level: the largest p-value at which the test succeeds
    - least: the change of the share that must be exceeded; below 0 if the share may get worse by so
      much
    - misses: the probability that the test misses the gain
    - changed: the share of records on which the versions differ, unless the gain is larger"""

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
