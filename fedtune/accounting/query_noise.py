"""Compute how much of a private evaluation's answer is noise, from public numbers alone.

A site's two sums, Σ score and Σ 1 over its held-out units, each have Gaussian noise of standard
deviation σ√(2 · axes), where all records are one axis, the classes are one, and so is each
column of groups; the answer is the ratio of the two sums, pooled over the sites."""

from __future__ import annotations

import math

from fedtune.report.held_out import TOO_NOISY

HELD_OUT = (30, 100, 300)  # units at each site that a forecast is given for


def answer_sd(variance: float, count: float, ratio: float = 1.0) -> float | None:
    """Return the noise's standard deviation in a pooled answer, to first order (delta method):
    √(v · (1 + r²)) / n; None if the count is lost in its own noise.

    variance: of the noise in each pooled sum; count: n, pooled; ratio: r, the answer, 1 at most.

    >>> answer_sd(8.0, 30.0)
    0.13333333333333333
    >>> answer_sd(8.0 * 16, 30.0) is None
    True
    """
    if count <= TOO_NOISY * math.sqrt(variance) or count <= 0:
        return None
    return math.sqrt(variance * (1 + ratio**2)) / count


def forecast(sigma: float, sites: int, axes: int = 1) -> dict[int, float | None]:
    """Return at most twice `answer_sd`, by the number of held-out units at each of `sites`
    sites, for HELD_OUT and for the fewest units that give an answer at all. sigma:
    private_evaluation.noise_multiplier; axes: number of axes, the one of all records included.

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
