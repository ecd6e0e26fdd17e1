"""Metrics of a model on records, with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedtune.registry.metrics import METRICS

if TYPE_CHECKING:
    from fedtune.evaluation.pairs import PairScores

RESAMPLES = 1000
SWAPS = 10_000


@dataclass
class Scores:
    """Per record: loss (n,) nats, mean over its targets (of a pair or a judged completion, the
    objective's loss); tokens (n,) targets; exact (n,) greedy decoding gives the completion; chosen
    (n,) and gold (n,) class indices, -1 without classes; margin (n,) by which the better completion
    of a pair is preferred; pairs: what else is known of pairs, None of other records; confidence
    (n,): the probability of the chosen class, None without classes."""

    loss: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    chosen: np.ndarray
    gold: np.ndarray
    margin: np.ndarray
    pairs: PairScores | None = None
    confidence: np.ndarray | None = None

    def with_rows_of(self, other: Scores, rows: np.ndarray) -> Scores:
        """Return these scores with those of `other` at `rows` (n,), bool; without pairs and
        confidence."""
        return Scores(
            loss=np.where(rows, other.loss, self.loss),
            tokens=np.where(rows, other.tokens, self.tokens),
            exact=np.where(rows, other.exact, self.exact),
            chosen=np.where(rows, other.chosen, self.chosen),
            gold=np.where(rows, other.gold, self.gold),
            margin=np.where(rows, other.margin, self.margin),
        )

    def value(self, metric: str, rows: np.ndarray | slice = slice(None)) -> float:
        """One figure over all records, or over `rows` (a bootstrap sample)."""
        loss, tokens = self.loss[rows], self.tokens[rows]
        if metric == "loss":
            return float(loss.mean())
        if metric == "perplexity":  # over tokens, not over records
            return float(np.exp(min((loss * tokens).sum() / tokens.sum(), 700.0)))
        if metric == "exact_match":
            return float(self.exact[rows].mean())
        if metric == "preference":  # a tie is half of one
            margin = self.margin[rows]
            return float((margin > 0).mean() + (margin == 0).mean() / 2)
        chosen, gold = self.chosen[rows], self.gold[rows]
        return float((chosen == gold).mean()) if metric == "accuracy" else _f1(chosen, gold)


@dataclass(frozen=True)
class Compared:
    """The metric of two adapters on the same records, and how likely as good a second one would be
    by chance if both were alike (p)."""

    before: float
    after: float
    p: float


def _f1(chosen: np.ndarray, gold: np.ndarray) -> float:
    """Macro F1 over the classes that occur in `gold` or `chosen`."""
    per_class = [
        2 * ((chosen == k) & (gold == k)).sum() / ((chosen == k).sum() + (gold == k).sum())
        for k in np.union1d(chosen, gold)
    ]
    return float(np.mean(per_class))


def intervals(before: Scores, after: Scores, metric: str) -> dict[str, tuple[float, float]]:
    """95 % intervals of both figures and of their difference on the same records."""
    n = len(before.loss)
    resamples = _resamples(n)
    pairs = np.array([[s.value(metric, rows) for s in (before, after)] for rows in resamples])
    low, high = np.quantile(pairs, (0.025, 0.975), axis=0)
    change = np.quantile(pairs[:, 1] - pairs[:, 0], (0.025, 0.975))
    bounds = {
        "before": (float(low[0]), float(high[0])),
        "after": (float(low[1]), float(high[1])),
        "change": (float(change[0]), float(change[1])),
    }
    if METRICS[metric].share:
        for name, scores in (("before", before), ("after", after)):
            bounds[name] = wilson(scores.value(metric), n)
    return bounds


def mean_interval(values: np.ndarray) -> list[float]:
    """Bound the mean of values (n,) by its 95 % bootstrap interval over the n records.

    >>> mean_interval(np.array([2.0, 2.0, 2.0]))
    [2.0, 2.0]
    """
    means = [float(values[rows].mean()) for rows in _resamples(len(values))]
    return [float(bound) for bound in np.quantile(means, (0.025, 0.975))]


def _resamples(n: int) -> list[np.ndarray]:
    """Draw bootstrap samples of n rows, from a fixed seed."""
    random = np.random.default_rng(0)
    return [random.integers(0, n, n) for _ in range(RESAMPLES)]


def chance_of(before: Scores, after: Scores, metric: str) -> float:
    """Compute p of `after` being no better than `before` on the same records: the share of SWAPS
    random exchanges of the two within records, and of what was found, in which the second is as
    much better as it was found to be; 1 where it was not better. Deterministic: a fixed seed.

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
    """Split by how much `after` is better into parts of records (n,), up to a factor, and for the
    perplexity a monotone function; None of a metric that is no sum over records."""
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


def least_gain(records: int, threshold: float, changed: float = 0.2) -> float:
    """Estimate which gain of a share (an accuracy) is found at p ≤ threshold four times in five.

    changed: the share of the records about which the two versions differ. By the normal
    approximation; the gain cannot be more than `changed`.

    >>> round(least_gain(300, 0.05 / 16), 3)
    0.096
    """
    deviations = NormalDist().inv_cdf(1 - threshold) + NormalDist().inv_cdf(0.8)
    return deviations * math.sqrt(changed / records) + 1 / records  # and a step between sums


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of n records (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - half) / scale, (middle + half) / scale
