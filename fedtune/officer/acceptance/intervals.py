"""Compute intervals of measures over patients, and of differences between two groups of patients.

Patients are the sampling units, so resamples draw patients with all their records.

For a share of records the interval is Clopper and Pearson's (1934), which is exact if each patient
has one record. If some have several, the number of patients is replaced by the effective number
(Σm)² / Σm², m being a patient's number of records (Kish 1965); this assumes that a patient's
records are fully correlated. Two groups' shares are compared by Newcombe's (1998) combination of
both intervals.

For any other measure, the difference of two groups is compared with the differences that random
exchanges of patients between the groups give (Noreen 1989, chapter 2; Phipson & Smyth 2010). So if
the groups do not truly differ, a difference is found with at most the stated probability, whatever
the measure's distribution. The interval extends from the difference to both sides by the size that
random differences exceed only with that probability."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import beta  # type: ignore[import-untyped]

from fedtune.officer.acceptance.measures import Array, Measure
from fedtune.report.scores import Scores

RESAMPLES, SEED = 2000, 0
BLOCK = 2**20  # about how many resampled weights are in memory at a time
EXCEED = 10  # on average, at least so many random exchanges give a difference outside an interval
SMALL = 1024  # number of patients up to which all resampled weights are in memory


class Interval(NamedTuple):
    low: float
    high: float


class Measured(NamedTuple):
    """A measure on some patients' records.

    - figure, interval: the measure's value, and the interval of its true value
    - patients, records: how many count in it
    - weight: the number of patients from which the interval follows; for a share of records the
      effective number, which is smaller if patients have different numbers of records"""

    figure: float
    interval: Interval
    patients: int
    records: int
    weight: float


class Sample:
    """Scores of some records, by patient.

    - scores: a model's scores on all n records
    - units: the patient of each record, (n,)
    - rows: which records are selected, bool (n,); None selects all"""

    def __init__(self, scores: Scores, units: np.ndarray, rows: np.ndarray | None = None) -> None:
        self._scores, self._units = scores, units
        self._rows = np.ones(len(units), bool) if rows is None else rows
        self._present, self._unit = np.unique(units[self._rows], return_inverse=True)

    @property
    def patients(self) -> int:
        return len(self._present)

    @property
    def records(self) -> int:
        return int(self._rows.sum())

    def sums(self, measure: Measure) -> Array:
        """Add up a measure's parts, which are d numbers for each record, over each patient's
        records. Return the sums, (patients, d)."""
        parts = measure.parts(self._scores)[self._rows]
        sums = np.zeros((self.patients, parts.shape[1]))
        np.add.at(sums, self._unit, parts)
        return sums

    def resample(self, measure: Measure) -> Array:
        """Return the measure's value on each of RESAMPLES resamples. A resample holds as many
        patients as the sample, drawn with replacement."""
        return resamples(self.sums(measure), measure)

    def of_measure(self, measure: Measure, level: float = 0.95) -> Measured:
        """Compute a measure's value on the sample, with the interval of its true value. level: the
        interval's confidence, such as 0.95."""
        sums = self.sums(measure)
        figure = float(measure.figure(sums.sum(axis=0)))
        if measure.share:
            counted = sums[:, 1]
            weight = float(counted.sum() ** 2 / max((counted**2).sum(), 1e-300))
            interval = clopper_pearson(figure, weight, level)
            patients, records = int((counted > 0).sum()), round(counted.sum())
            return Measured(figure, interval, patients, records, weight)
        drawn = resamples(sums, measure)
        # A sample's ece lies on average above the true one, and a resample's above the sample's.
        if measure.name == "ece":
            drawn = drawn - (np.nanmean(drawn) - figure)
        half = (1 - level) / 2
        low, high = (float(bound) for bound in np.nanquantile(drawn, (half, 1 - half)))
        unseen = self.bound_unseen(measure, level)
        low, high = min(low, figure) - unseen, max(high, figure) + unseen
        if measure.errs:
            low, high = max(low, 0.0), min(high, 1.0)
        return Measured(figure, Interval(low, high), self.patients, self.records, self.patients)

    def gain(self, measure: Measure, start: Scores, level: float = 0.95) -> Difference:
        """Compute by how much this model is better than another one on the same records, with an
        interval.

        - measure: the measure; the gain is positive where this model is better
        - start: the other model's scores on all n records
        - level: the interval's confidence

        The returned interval is the smallest that contains these two:
        1. the interval between two quantiles of the gain on resamples of patients
        2. the gain plus or minus a size: if the two models' scores of a patient are exchanged at
           random, gains exceed this size only with probability 1 - level

        The second interval makes sure that a model that is no better is taken for better with a
        probability of at most (1 - level) / 2, even if the two models differ on few patients. If
        they differ on no patient, and the measure is a share or `Measure.errs` is true, the size is
        a bound on how often the models may differ on other patients."""
        other = Sample(start, self._units, self._rows)
        sign = 1 if measure.higher_is_better else -1
        ours, theirs = self.sums(measure), other.sums(measure)
        found = sign * float(measure.figure(ours.sum(axis=0)) - measure.figure(theirs.sum(axis=0)))
        drawn = sign * (self.resample(measure) - other.resample(measure))
        if math.isnan(found) or np.isnan(drawn).all():
            return Difference(math.nan, Interval(math.nan, math.nan))
        half = _swap_models(ours, theirs, measure, level)
        if (measure.errs or measure.share) and np.array_equal(ours, theirs):
            half = clopper_pearson(0.0, self.patients, level).high
        tail = (1 - level) / 2
        low, high = (float(bound) for bound in np.nanquantile(drawn, (tail, 1 - tail)))
        return Difference(found, Interval(min(low, found - half), max(high, found + half)))

    def bound_unseen(self, measure: Measure, level: float) -> float:
        """Return by how much an interval of the measure must be widened, because the records of
        this sample show only right answers or only wrong ones.

        | the model is                    | result                                            |
        | right on all of these records   | an upper bound on the share of other records on   |
        |                                 | which the model is wrong                          |
        | wrong on all of these records   | an upper bound on the share of other records on   |
        |                                 | which the model is right                          |
        | right on some, wrong on others  | 0                                                 |
        The result is also 0 if `measure.errs` is false. level: the bound's confidence."""
        right = (self._scores.chosen == self._scores.gold)[self._rows]
        if not measure.errs or 0 < right.mean() < 1:
            return 0.0
        low, high = clopper_pearson(float(right.mean()), self.patients, level)
        return 1 - low if right.all() else high


def resamples(sums: Array, measure: Measure) -> Array:
    """Return a measure's value on each of RESAMPLES resamples of patients, from a fixed seed. sums:
    the sums of the measure's parts over each patient's records, (patients, d)."""
    if len(sums) <= SMALL:
        return measure.figure(_small_draws(len(sums)) @ sums)
    return np.concatenate([measure.figure(times @ sums) for times in _draws(len(sums))])


def _draws(n: int) -> Iterator[Array]:
    """Draw resamples of n patients, and yield how often each patient is drawn in each of them, as
    arrays with n columns and one row for each resample. The arrays have RESAMPLES rows together."""
    random, block = np.random.default_rng(SEED), max(1, BLOCK // n)
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        patients = random.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(patients.ravel(), minlength=size * n).reshape(size, n).astype(float)


@lru_cache(maxsize=8)  # the same draws serve several measures of a column's groups
def _small_draws(n: int) -> Array:
    return np.concatenate([*_draws(n)])


def clopper_pearson(share: float, n: float, level: float) -> Interval:
    """Return the interval of a share among n patients of equal weight. It is exact if n is the
    number of patients, and not an effective number. level: the confidence, such as 0.95. Without a
    patient the interval is (0, 1).

    >>> low, high = clopper_pearson(1.0, 10, 0.95)
    >>> round(low, 3), high
    (0.692, 1.0)
    """
    if not n or math.isnan(share):
        return Interval(0.0, 1.0)
    half, x = (1 - level) / 2, share * n
    low = 0.0 if x <= 0 else float(beta.ppf(half, x, n - x + 1))
    high = 1.0 if x >= n else float(beta.ppf(1 - half, x + 1, n - x))
    return Interval(low, high)


class Difference(NamedTuple):
    """A group's figure in one measure minus that of all others, with the interval of this
    difference."""

    figure: float
    interval: Interval


def differences(
    measures: Sequence[Measure], group: Sample, others: Sample, level: float
) -> list[Difference]:
    """Return for each measure the difference between a group of patients and all other patients,
    with the interval of this difference.

    - measures: the measures, in the order of the result
    - group: the records of the group's patients
    - others: the records of all other patients, scored by the same model
    - level: the confidence of each interval, such as 0.95"""
    halves = iter(_permute([m for m in measures if not m.share], group, others, level))
    found = []
    for measure in measures:
        one, other = (measure.figure(s.sums(measure).sum(axis=0)) for s in (group, others))
        difference = float(one - other)
        if measure.share:
            found.append(_of_shares(measure, group, others, level))
            continue
        half = (
            next(halves) + group.bound_unseen(measure, level) + others.bound_unseen(measure, level)
        )
        found.append(Difference(difference, Interval(difference - half, difference + half)))
    return found


def _of_shares(measure: Measure, group: Sample, others: Sample, level: float) -> Difference:
    """Compute the difference of a share between two groups of patients, with the interval that
    combines the intervals of both shares (Newcombe 1998).

    - measure: the measure, which is a share of records
    - group, others: the records of the group's patients, and of all other patients
    - level: the confidence of the interval"""
    one, other = group.of_measure(measure, level), others.of_measure(measure, level)
    found = one.figure - other.figure
    below = math.hypot(one.figure - one.interval.low, other.interval.high - other.figure)
    above = math.hypot(one.interval.high - one.figure, other.figure - other.interval.low)
    return Difference(found, Interval(max(found - below, -1.0), min(found + above, 1.0)))


def _permute(
    measures: Sequence[Measure], group: Sample, others: Sample, level: float
) -> list[float]:
    """Return for each measure how large a difference between two groups arises by chance, by a
    permutation test: many times, as many patients as `group` has are drawn at random from all
    patients and compared with the rest. At most a share of 1 - level of these comparisons gives a
    larger difference.

    - measures: the measures, none of which is a share of records; [] gives []
    - group, others: the records of the group's patients, and of all other patients
    - level: a probability, such as 0.95"""
    if not measures:
        return []
    sums = [np.concatenate([group.sums(m), others.sums(m)]) for m in measures]
    stacked, total = np.concatenate(sums, axis=1), np.concatenate([s.sum(axis=0) for s in sums])
    edges = np.cumsum([s.shape[1] for s in sums])[:-1]
    draws, drawn = max(RESAMPLES, math.ceil(EXCEED / (1 - level))), list[Array]()
    for chosen in _choices(len(stacked), group.patients, draws):
        one = chosen @ stacked
        pairs = zip(np.split(one, edges, 1), np.split(total - one, edges, 1), strict=True)
        told = zip(measures, pairs, strict=True)
        drawn.append(np.stack([np.abs(m.figure(a) - m.figure(b)) for m, (a, b) in told]))
    ordered = np.sort(np.concatenate(drawn, axis=1), axis=1)
    return [float(row[math.ceil((draws + 1) * level) - 1]) for row in ordered]


def _swap_models(ours: Array, theirs: Array, measure: Measure, level: float) -> float:
    """Return how large a difference between two models arises by chance. For this, the models'
    scores of each patient are exchanged with probability 1/2, many times. The returned size is
    exceeded in these draws only with probability 1 - level.

    - ours, theirs: the sums of the measure's parts over each patient's records, (patients, d)
    - measure: the measure that the models are compared by
    - level: a probability, such as 0.95"""
    random, n, sizes = np.random.default_rng(SEED), len(ours), list[Array]()
    for start in range(0, RESAMPLES, block := max(1, BLOCK // n)):
        coins = random.integers(0, 2, (min(block, RESAMPLES - start), n)).astype(float)
        moved = coins @ (theirs - ours)
        pair = (
            measure.figure(ours.sum(axis=0) + moved),
            measure.figure(theirs.sum(axis=0) - moved),
        )
        sizes.append(np.abs(pair[0] - pair[1]))
    return float(np.sort(np.concatenate(sizes))[math.ceil((RESAMPLES + 1) * level) - 1])


def _choices(n: int, size: int, draws: int) -> Iterable[Array]:
    """Choose at random, `draws` times, which `size` of n patients form a group. Return arrays of
    ones (chosen) and zeros with n columns and a row for each choice; the arrays have `draws` rows
    together. The seed is fixed."""
    few = n * draws <= 4 * BLOCK
    return [_cached_choice(n, size, draws)] if few else _choice(n, size, draws)


def _choice(n: int, size: int, draws: int) -> Iterator[Array]:
    random, block = np.random.default_rng(SEED), max(1, BLOCK // n)
    for start in range(0, draws, block):
        keys = random.random((min(block, draws - start), n), dtype=np.float32)
        chosen = np.zeros(keys.shape)
        np.put_along_axis(chosen, keys.argpartition(size, axis=1)[:, :size], 1, axis=1)
        yield chosen


@lru_cache(maxsize=4)  # groups of the same size need the same choices
def _cached_choice(n: int, size: int, draws: int) -> Array:
    return np.concatenate([*_choice(n, size, draws)])
