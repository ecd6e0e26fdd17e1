"""Compute how much of a private evaluation's answer is noise, from public numbers alone.

A site's two sums, Σ score and Σ 1 over its held-out units, each have Gaussian noise of standard
deviation σ√(2 · axes). The number of axes is 1 for all records, plus 1 for the classes if the plan
names them, plus 1 for each column of groups. The answer is the ratio of the two sums over all
sites."""

from __future__ import annotations

import math

from fedtune.report.held_out import TOO_NOISY

HELD_OUT = (30, 100, 300)  # the numbers of held-out units at each site in a forecast


def answer_sd(variance: float, count: float, ratio: float = 1.0) -> float | None:
    """Return the standard deviation of the noise in an answer, i.e. in the ratio of two noised sums
    over all sites: √(v · (1 + r²)) / n, to first order (delta method). Return None if the count n
    does not clearly exceed its own noise.

    - variance: v, the variance of the noise in each of the two sums
    - count: n, the number of held-out units at all sites
    - ratio: r, the answer, at most 1

    >>> answer_sd(8.0, 30.0)
    0.13333333333333333
    >>> answer_sd(8.0 * 16, 30.0) is None
    True
    """
    if count <= TOO_NOISY * math.sqrt(variance) or count <= 0:
        return None
    return math.sqrt(variance * (1 + ratio**2)) / count


def forecast(sigma: float, sites: int, axes: int = 1) -> dict[int, float | None]:
    """Forecast how much of a private evaluation's answer is noise, for several numbers of held-out
    units at each site: those in HELD_OUT, and the smallest number that gives an answer. Return a
    dict: number of units at each site -> two standard deviations of the noise, or None if the
    answer is lost in the noise. The noise is that in an answer of 1, where it is largest.

    - sigma: private_evaluation.noise_multiplier
    - sites: how many sites answer
    - axes: 1 for all records, plus 1 for the classes if they are named, plus 1 for each column of
      groups

    >>> forecast(2.0, 3)[30] < 0.16 and forecast(8.0, 1)[30] is None
    True
    """
    variance = 2 * axes * sigma**2 * sites
    fewest = math.floor(TOO_NOISY * math.sqrt(variance) / sites) + 1
    found = dict[int, float | None]()
    for units in sorted({*HELD_OUT, fewest}):
        sd = answer_sd(variance, units * sites)
        found[units] = None if sd is None else 2 * sd
    return found
