"""Membership inference: measure how well scores tell members from others, and compare it with what
ε allows.

A score is higher for units that more probably were trained on. The figures are the ROC curve, the
area under it, and the share of members that are found at a threshold which 1 % of the others
exceed. They come with intervals over units.

The threshold for 1 % is estimated as the k-th highest score of n known non-members. The true
probability that a further non-member exceeds it has the distribution Beta(k, n + 1 - k); with 10
known non-members its mean is about 9 %. The share of members found is therefore compared with the
bound that ε allows at the upper end of that probability."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.stats import beta  # type: ignore[import-untyped]

Scores = npt.NDArray[np.float64]
FALSE_ALARMS = 0.01  # the rate of false alarms at which the share of members found is stated
RESAMPLES = 1000
CONFIDENCE = 0.95
SIDE = 0.0125  # error probability of each of the two one-sided bounds that are compared


@dataclass(frozen=True)
class Membership:
    """The result of membership inference.

    - auc, tpr: (estimate, low, high) with a 95 % interval over units; tpr is the share of members
      found at 1 % false alarms
    - auc_bound, tpr_bound: the largest values that (ε, δ) allows
    - curve: the points (false alarms, members found) of the ROC curve
    - alarms: the upper confidence limit (98.75 %) on the true rate of false alarms, since the
      threshold is estimated from few others
    - surely_found: the lower confidence limit (Clopper-Pearson, 98.75 %) on the share of members
      found
    - surely_allowed: the largest share of members found that (ε, δ) allows at `alarms`

    Both limits count units, since several guesses about one unit are not independent."""

    members: int
    others: int
    auc: tuple[float, float, float]
    tpr: tuple[float, float, float]
    auc_bound: float
    tpr_bound: float
    alarms: float
    surely_found: float
    surely_allowed: float
    curve: list[tuple[float, float]] = field(repr=False, default_factory=list)

    @property
    def contradicts(self) -> bool:
        """Whether the attack found more than ε allows: whether the lower end of the AUC's interval
        is above `auc_bound`, or `surely_found` above `surely_allowed`."""
        return self.auc[1] > self.auc_bound or self.surely_found > self.surely_allowed


def membership(
    inside: Scores, outside: Scores, epsilon: float | None, delta: float, seed: int = 0
) -> Membership:
    """Measure how well scores tell members (inside) from others (outside): arrays (units, guesses).

    - inside: the scores of units that were trained on; a row holds all scores of one unit
    - outside: the scores of units that were not trained on, in the same form
    - epsilon: the ε that bounds the figures; None without privacy, so that every bound is 1
    - delta: the δ of that ε
    - seed: the seed of the bootstrap, so that the intervals can be computed again

    Return the AUC and the share of members found, with intervals, and the bounds that (epsilon,
    delta) sets. The intervals come from a bootstrap over units, since the guesses about one unit
    are not independent. A tie counts half in the AUC.

    >>> import numpy as np
    >>> told = membership(np.full((20, 1), 2.0), np.full((20, 1), 1.0), 1.0, 1e-5)
    >>> told.auc[0], told.contradicts
    (1.0, True)
    """
    draw = np.random.default_rng(seed)
    resampled = []
    for _ in range(RESAMPLES):
        rows_in = inside[draw.integers(len(inside), size=len(inside))]
        rows_out = outside[draw.integers(len(outside), size=len(outside))]
        resampled.append((auc(rows_in, rows_out), compute_true_positive_rate(rows_in, rows_out)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.array(resampled), [tail, 1 - tail], axis=0)
    bound = None if epsilon is None else (epsilon, delta)
    alarms = most_alarms(len(outside))
    return Membership(
        members=inside.size,
        others=outside.size,
        auc=(auc(inside, outside), float(low[0]), float(high[0])),
        tpr=(compute_true_positive_rate(inside, outside), float(low[1]), float(high[1])),
        auc_bound=auc_bound(*bound) if bound else 1.0,
        tpr_bound=tpr_bound(FALSE_ALARMS, *bound) if bound else 1.0,
        alarms=alarms,
        surely_found=least_found(compute_true_positive_rate(inside, outside), len(inside)),
        surely_allowed=tpr_bound(alarms, *bound) if bound else 1.0,
        curve=roc(inside, outside),
    )


def auc(inside: Scores, outside: Scores) -> float:
    """Compute the area under the ROC curve: the share of pairs of a member and a non-member in
    which the member has the higher score; a tie counts half. inside, outside: the scores of members
    and of non-members, arrays of any shape."""
    others = np.sort(outside.ravel())
    below = np.searchsorted(others, inside.ravel(), side="left")
    upto = np.searchsorted(others, inside.ravel(), side="right")
    return float((below + upto).mean() / 2 / others.size)


def compute_true_positive_rate(
    inside: Scores, outside: Scores, alarms: float = FALSE_ALARMS
) -> float:
    """Compute the share of members whose score is above a threshold. The threshold is the lowest
    score of a non-member that at most a share `alarms` of the non-members exceeds. inside, outside:
    the scores of members and of non-members, arrays of any shape."""
    others = np.sort(outside.ravel())
    threshold = others[-1 - math.floor(alarms * others.size)]
    return float((inside.ravel() > threshold).mean())


def most_alarms(others: int) -> float:
    """Compute how high the true rate of false alarms may be at a threshold that 1 % of `others`
    known non-members exceed: its upper confidence limit (98.75 %).

    >>> round(most_alarms(10), 2), round(most_alarms(10_000), 3)
    (0.35, 0.012)
    """
    passed = math.floor(FALSE_ALARMS * others) + 1
    return float(beta.ppf(1 - SIDE, passed, others + 1 - passed))


def least_found(share: float, members: int) -> float:
    """Compute the lower confidence limit (98.75 %, Clopper and Pearson 1934) on the share of
    members that an attack finds, if it found the share `share` of `members` units."""
    hits = math.floor(share * members + 1e-9)
    return float(beta.ppf(SIDE, hits, members - hits + 1)) if hits else 0.0


def roc(inside: Scores, outside: Scores) -> list[tuple[float, float]]:
    """Compute the points (false alarms, members found) of the ROC curve, from (0, 0) to (1, 1).
    inside, outside: the scores of members and of non-members, arrays of any shape."""
    thresholds = np.unique(np.concatenate([inside.ravel(), outside.ravel()]))[::-1]
    others, members = np.sort(outside.ravel()), np.sort(inside.ravel())
    alarms = 1 - np.searchsorted(others, thresholds, side="left") / others.size
    hits = 1 - np.searchsorted(members, thresholds, side="left") / members.size
    points = [(0.0, 0.0), *zip(alarms.tolist(), hits.tolist(), strict=True)]
    return [*points[:: max(1, len(points) // 500)], (1.0, 1.0)]


def tpr_bound(alarms: float, epsilon: float, delta: float) -> float:
    """Compute the largest share of members that an attacker can find under (ε, δ) at the rate
    `alarms` of false alarms.

    Reference: Kairouz, Oh & Viswanath 2015, theorem 2.1."""
    grown = math.inf if epsilon > 500 else math.exp(epsilon) * alarms + delta
    return min(1.0, grown, 1 - math.exp(-epsilon) * (1 - delta - alarms))


def auc_bound(epsilon: float, delta: float) -> float:
    """Compute the largest area under a ROC curve that (ε, δ) allows: the area under the curve that
    `tpr_bound` gives."""
    grid = np.concatenate([[0.0], np.logspace(-8, 0, 4001)])
    return float(np.trapezoid([tpr_bound(a, epsilon, delta) for a in grid], grid))
