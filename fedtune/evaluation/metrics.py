"""Metrics of a model on records, with confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from fedtune.registry.metrics import METRICS

if TYPE_CHECKING:
    from fedtune.evaluation.pairs import PairScores

RESAMPLES = 1000


@dataclass
class Scores:
    """Per record: loss (n,) nats, mean over its targets (of a pair or a judged completion, the
    objective's loss); tokens (n,) targets; exact (n,) greedy decoding gives the completion; chosen
    (n,) and gold (n,) class indices, -1 without classes; margin (n,) by which the better completion
    of a pair is preferred; pairs: what else is known of pairs, None of other records."""

    loss: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    chosen: np.ndarray
    gold: np.ndarray
    margin: np.ndarray
    pairs: PairScores | None = None

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
    """The metric of two adapters on the same records, and the share of resamples of those records
    in which the second is better."""

    before: float
    after: float
    sure: float


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


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of n records (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - half) / scale, (middle + half) / scale
