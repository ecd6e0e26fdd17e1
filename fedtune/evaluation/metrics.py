"""Compute confidence intervals of the metrics by which a model is measured on records."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from fedtune.core.registry.metrics import METRICS
from fedtune.report.scores import Scores

RESAMPLES = 1000


def intervals(before: Scores, after: Scores, metric: str) -> dict[str, tuple[float, float]]:
    """Return three 95 % intervals (low, high) of a metric that was measured for two models on the
    same records: "before" and "after" for the two models, and "change" for the difference after -
    before. The first two are Wilson's if the metric is a share of records, else from a bootstrap
    over the records; "change" is from a paired bootstrap. before, after: the two models' scores."""
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
    """Return the 95 % bootstrap interval of the mean of values (n,), over the n records.

    >>> mean_interval(np.array([2.0, 2.0, 2.0]))
    [2.0, 2.0]
    """
    means = [float(values[rows].mean()) for rows in _resamples(len(values))]
    return [float(bound) for bound in np.quantile(means, (0.025, 0.975))]


def _resamples(n: int) -> list[np.ndarray]:
    """Draw RESAMPLES bootstrap samples of n records, always from the same seed. Return for each
    sample an array of n record numbers, each below n."""
    random = np.random.default_rng(0)
    return [random.integers(0, n, n) for _ in range(RESAMPLES)]


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval (low, high) of a share of n records (Wilson 1927). share: the
    observed share, from 0 to 1; confidence: the probability with which such an interval holds the
    true share."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - half) / scale, (middle + half) / scale
