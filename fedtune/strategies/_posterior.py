"""Compute a linear head from one noised release of class statistics.

Each site sums the features f(x), k numbers, of its units' records, separately for each of the K
classes. For each unit it also adds the number `weight` to a further column. The sums form one array
(K, k + 1), whose last column therefore counts the class's units. The array is noised once. This
module computes only from that array and from public vectors, so it costs no ε.

The head is a linear discriminant of the classes' posterior means. A class's prior mean follows from
its public records and the base's vector of the class's name; without such records it is this
vector, scaled. Prior and release are weighted by the inverse of their variances from noise and
sampling. So a direction in which noise exceeds the signal is shrunk towards the prior, and a class
that public records lack is learnt only from the release. The constants below were chosen on two
data sets and tested on others: docs/quality.md.

Reference: Snell et al. 2017, "Prototypical networks for few-shot learning"; Efron & Morris 1973,
"Stein's estimation rule and its competitors" (a mean shrunk by what its prior explains)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedtune.core.errors import ConfigError

Array = npt.NDArray[np.float64]

# A unit's entry in the column of counts. Values from 0.2 to 1 give equal quality; at 0.5 the bound,
# and with it the sums' noise, is an eighth larger than without counts.
WEIGHT = 0.5
MOST = 256  # directions that the head uses at most
RELEASED = 128  # directions that sites release at most
ENOUGH = 0.95  # the share of the separation by all directions that the released ones must keep
WITHIN = 0.8  # assumed share of a direction's variance within classes, to guess that separation
BETWEEN = 0.3  # assumed share of a feature's variance between classes, where labels are few
RECORDS = 20  # an assumed or unlabelled estimate weighs as much as so many labelled records
RIDGE = 1.0  # added to the diagonal of the covariance within classes, × its mean variance
CORRELATED = 0.7  # factor on covariances between directions: few public records estimate them badly
# How far a class's share at the sites is assumed to lie from its public share: a standard deviation
# in units of 1/K, for a class that public records have, and for one that they lack.
SEEN, UNSEEN = 0.5, 1.0
FOLDS = 5  # parts of public records in the cross-validation of the public estimate
NAMES = 4.0  # weight of the prior that names agree with class means, against labelled records
SILENT = 1e9  # standard deviation of the noise that stands for "no release"
EVIDENT = 2.0  # a class counts as present if its noised count exceeds this many standard deviations


@dataclass(frozen=True)
class Basis:
    """The basis of class statistics: the public map from the base's vectors x (H,) to features f(x)
    = directions · (x - mean), which sites sum by class.

    - mean: (H,)
    - directions: (d, H), orthogonal rows of equal length, scaled so that public records' features
      in the first `released` directions have a median length of 1
    - released: k, the number of directions that the sites use
    - weight: the number that each unit adds to the column of counts"""

    mean: Array
    directions: Array
    released: int
    weight: float

    @property
    def norm(self) -> float:
        """The largest norm that the array (K, k + 1) of one unit can have, √(1 + weight²): the
        unit's features together have a length of at most 1, and its column of counts has a length
        of at most `weight`."""
        return math.hypot(1.0, self.weight)


@dataclass(frozen=True)
class Public:
    """The statistics of public records from which a head is computed. Features f are those of a
    basis with d directions; K is the number of classes.

    - sums: (K, d), the sum of the labelled records' features, by class
    - counts: (K,), the number of labelled records, by class
    - within: (d, d), scatter of labelled records about their class's mean
    - moment: (d, d), Σ f fᵀ over all public records, labelled or not
    - records: the number of all public records
    - names: (K, d), the features of the classes' names, from the base's vectors of them; None if
      there are none"""

    sums: Array
    counts: Array
    within: Array
    moment: Array
    records: int
    names: Array | None = None


@dataclass(frozen=True)
class Noised:
    """The release: the sum of all sites' class statistics, with its noise.

    - sums: (K, k + 1), for each class the sums of k features, and in the last column its count
    - deviation: standard deviation of the noise in each number
    - units: N, the sum of the sites' declared sizes"""

    sums: Array
    deviation: float
    units: int


@dataclass(frozen=True)
class Classes:
    """The classes as estimated from public data. K is the number of classes, d the number of
    directions.

    - means: (K, d), the mean of each class
    - variances: (K, d), the variances of these means
    - within: (d, d), the covariance within each class"""

    means: Array
    variances: Array
    within: Array


@dataclass(frozen=True)
class ClassFigures:
    """What a release says of each of the K classes, for the report.

    - count: (K,), the noised number of units, which may be below zero
    - deviation: the standard deviation of that noise, the same for all classes
    - public: (K,), whether the class has public records
    - evident: (K,), whether its noised count exceeds EVIDENT standard deviations"""

    count: Array
    deviation: float
    public: npt.NDArray[np.bool_]
    evident: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Head:
    """A linear head on the base's vectors.

    - weight: (K, H); a class's logit is the product of its row and the vector, plus the bias
    - bias: (K,)
    - figures: for each class its noised number of units, and whether public records or this number
      show that the class occurs"""

    weight: Array
    bias: Array
    figures: ClassFigures


def directions_for(classes: int, records: int, noise: float, units: int, named: bool = True) -> int:
    """Choose how many directions the sites release, before any vector is computed.

    - classes: K, the number of classes
    - records: the number of public records, labelled or not
    - noise: σ of the release in multiples of its bound, times √(number of sites that each add noise
      of their own)
    - units: N, the sum of declared sizes
    - named: whether the base has vectors of the classes' names

    The result is the smallest number that keeps the share ENOUGH of the largest expected separation
    of the classes, Σ b² / (v · (b + v/c + s²/c²)), summed over the directions. Here b is a
    direction's variance between classes, v that within a class, c the number of units of a class,
    and s the noise. A noisy direction does no harm by itself, since it is shrunk. But all
    directions share one bound, so each further direction leaves less of the bound to the others.
    The directions' variances are assumed to fall as 1, 1/2, 1/3 …, about as in sentence encoders;
    the result depends little on this assumption. Errors: ConfigError if neither records nor names
    span a direction."""
    most = min(max(records - 1, 0) + (classes - 1 if named else 0), RELEASED)
    if most < 1:
        raise ConfigError(
            "public records give no direction in which classes could differ",
            "at least two public records",
            "add public records, labelled or not",
        )
    mine = units / classes
    kept = np.arange(1, most + 1)
    separation = np.empty(most)
    for k in kept:
        variances = 1 / kept[:k] / (1 / kept[:k]).sum()
        between, within = (1 - WITHIN) * variances, WITHIN * variances
        unsure = between + within / mine + (noise * math.hypot(1.0, WEIGHT) / mine) ** 2
        separation[k - 1] = (between**2 / within / unsure).sum()
    return int(kept[separation >= ENOUGH * separation.max()][0])


def choose(vectors: Array, names: Array | None, directions: int, weight: float) -> Basis:
    """Build the basis of class statistics from public data: first the directions that span the
    vectors of the classes' names, then the principal directions of public records.

    - vectors: (n, H), the base's vectors of the public records
    - names: (K, H), the base's vectors of the classes' names, or None
    - directions: k, the number of directions that the sites release
    - weight: the number that each unit adds to the column of counts

    Errors: ConfigError if records and names span fewer than k directions."""
    span = vectors[:0] if names is None else names - names.mean(axis=0)
    mean = vectors.mean(axis=0) if len(vectors) or names is None else names.mean(axis=0)
    spread = vectors - mean
    named = _principal(span)
    rest = _principal(spread - spread @ named.T @ named)
    every = np.concatenate([named, rest])[:MOST]
    if len(every) < directions:
        raise ConfigError(
            f"{len(vectors)} public records and the classes' names span {len(every)} directions",
            f"at least objective.options.directions = {directions}",
            "add public records, labelled or not, or take fewer directions",
        )
    measured = spread if spread.any() else span  # one record alone has no spread
    lengths = np.linalg.norm(measured @ every[:directions].T, axis=1)
    scale = max(float(np.median(lengths)), 1e-12)
    return Basis(mean, every / scale, directions, weight)


def features(basis: Basis, vectors: Array) -> Array:
    """Compute the features that a site sums, (n, k), from the base's vectors of n records, (n, H).
    The features of a record that are together longer than 1 are scaled to length 1. basis: the
    basis of class statistics, which maps vectors to features."""
    return _clip_features(basis, vectors)[:, : basis.released]


def summarise_public(
    basis: Basis, vectors: Array, labels: npt.NDArray[np.int64], classes: int, names: Array | None
) -> Public:
    """Compute the statistics of public records from which a head is computed.

    - basis: gives the directions of the features
    - vectors: (n, H), the base's vectors of the records
    - labels: (n,), each record's class from 0 to K - 1; a number below 0: no label
    - classes: K, the number of classes
    - names: (K, H), the base's vectors of the classes' names; None: without names"""
    every = _clip_features(basis, vectors)
    known = labels >= 0
    mine, labels = every[known], labels[known]
    one_hot = np.eye(classes)[labels]
    counts = one_hot.sum(axis=0)
    sums = one_hot.T @ mine
    apart = mine - (sums / np.maximum(counts, 1)[:, None])[labels]
    return Public(
        sums,
        counts,
        within=apart.T @ apart,
        moment=every.T @ every,
        records=len(every),
        names=None if names is None else (names - names.mean(axis=0)) @ basis.directions.T,
    )


def head(noised: Noised, basis: Basis, public: Public) -> Head:
    """Compute the head: the linear discriminant of the classes' posterior means, as a linear
    function of the base's vectors. noised: the sites' noised class statistics. basis: the basis in
    which they were summed. public: the statistics of public records in this basis.

    Guarantee: this is post-processing of the release, and costs no ε. Noise of 0 is allowed."""
    counts = _counts(noised, basis, public)
    means, certainty = _means(noised, basis, public, counts)
    shares = (counts.expected + public.counts) / (counts.expected + public.counts).sum()
    covariance = _regularise(_covariance(public, means, shares))
    covariance += np.diag(shares @ (1 / certainty))  # the means' own variances
    weight = np.linalg.solve(covariance, means.T).T
    bias = np.log(shares) - (weight * means).sum(axis=1) / 2
    whole = weight @ basis.directions
    figures = ClassFigures(
        counts.noised,
        counts.deviation,
        public=public.counts > 0,
        evident=counts.noised > EVIDENT * counts.deviation,
    )
    return Head(whole, bias - whole @ basis.mean, figures)


def classes_before(basis: Basis, public: Public) -> Classes:
    """Estimate the classes' means and covariance from public data alone, by the same rules as
    `head`, but before the sites have released anything. basis: the basis of class statistics.
    public: the statistics of public records in this basis."""
    nothing = Noised(np.zeros((len(public.counts), 1)), SILENT, 1)
    silent = replace(basis, released=0)
    means, certainty = _means(nothing, silent, public, _counts(nothing, silent, public))
    shares = (public.counts + 0.5) / (public.counts + 0.5).sum()  # Jeffreys
    return Classes(means, 1 / certainty, _covariance(public, means, shares))


def held_out_hits(
    basis: Basis, vectors: Array, labels: npt.NDArray[np.int64], known: Public, names: Array | None
) -> Array | None:
    """Cross-validate, on the labelled public records, the classifier that follows from public data
    without any release of the sites.

    The records are divided into FOLDS parts. Each part is predicted from the other parts, which
    also give the basis.

    - basis: the basis of all records, which gives the number of directions and the weight of counts
    - vectors: (n, H), the base's vectors of the records
    - labels: (n,), each record's class; a number below 0: no label
    - names: (K, H), the base's vectors of the classes' names; None: without names
    - known: the result of `summarise_public` for these records and names

    Returns (2,): the number of correct predictions, and the number of predictions; None if fewer
    than FOLDS labelled records could be predicted."""
    classes = len(known.counts)
    right = 0
    judged = 0
    order = np.random.default_rng(0).permutation(len(vectors))
    for part in range(FOLDS):
        out = order[part::FOLDS]
        rest = np.setdiff1d(order, out)
        out = out[labels[out] >= 0]
        spanned = max(len(rest) - 1, 0) + (0 if names is None else classes - 1)
        if not len(out) or spanned < 1:
            continue
        part_basis = choose(vectors[rest], names, min(basis.released, spanned), basis.weight)
        said = summarise_public(part_basis, vectors[rest], labels[rest], classes, names)
        nothing = Noised(np.zeros((classes, part_basis.released + 1)), SILENT, 1)
        fitted = head(nothing, part_basis, said)
        found = (vectors[out] @ fitted.weight.T + fitted.bias).argmax(axis=1)
        right, judged = right + int((found == labels[out]).sum()), judged + len(out)
    return np.array([right, judged], np.float64) if judged >= FOLDS else None


def _spread(public: Public) -> tuple[Array, Array]:
    """Estimate each feature's variance within classes, and between classes, from public records.
    Return two arrays (d,)."""
    total = _variances(public)
    guess = (1 - BETWEEN) * total
    within = (np.diag(public.within) + RECORDS * guess) / (_freedom(public) + RECORDS)
    between = max(1 - within.sum() / total.sum(), 0.05) * total
    return within, between


def _freedom(public: Public) -> float:
    """Return the degrees of freedom of the scatter within classes: the number of labelled records
    minus the number of classes that have labelled records."""
    return max(float(public.counts.sum()) - np.count_nonzero(public.counts), 0.0)


def _variances(public: Public) -> Array:
    """Return the second moment (d,) of each feature over public records, plus 1/1000 of the mean of
    these moments, so that no direction has variance 0. Without records return 1/d for each
    feature."""
    total = np.diag(public.moment) / max(public.records, 1)
    if not total.any():
        return np.full(len(total), 1 / len(total))
    return np.asarray(total + 1e-3 * total.mean())


@dataclass(frozen=True)
class _Counts:
    """The number of units of each of the K classes at the sites.

    - noised: (K,), the released counts
    - deviation: the standard deviation of their noise, the same for all classes
    - expected: (K,), the estimate from released counts and public shares together
    - variance: (K,), the variance of the estimate, before it is scaled to the declared number of
      units"""

    noised: Array
    deviation: float
    expected: Array
    variance: Array


def _counts(noised: Noised, basis: Basis, public: Public) -> _Counts:
    """Estimate the number of each class's units at the sites from two sources, weighted by the
    inverse of their variances: the noised counts, and the classes' shares among public records. For
    a class that public records lack, the public share's variance is large (UNSEEN)."""
    classes = len(public.counts)
    count, deviation = noised.sums[:, -1] / basis.weight, noised.deviation / basis.weight
    seen = public.counts + 0.5  # Jeffreys
    prior = noised.units * seen / seen.sum()
    free = np.where(public.counts > 0, SEEN, UNSEEN) * noised.units / classes
    spread = prior * noised.units / seen.sum() + free**2
    variance = spread * deviation**2 / (spread + deviation**2)
    expected = (count * spread + prior * deviation**2) / (spread + deviation**2)
    expected = np.maximum(expected, 0.5)
    return _Counts(count, deviation, expected * noised.units / expected.sum(), variance)


def _means(noised: Noised, basis: Basis, public: Public, counts: _Counts) -> tuple[Array, Array]:
    """Return the classes' posterior means (K, d) and the inverses of their variances (K, d).

    - noised: the release, whose first k columns are sums of features
    - basis: gives k, the number of released directions; with 0 only public data count
    - public: the statistics of public records in this basis
    - counts: the number of units of each class at the sites, as `_counts` estimates it"""
    within, between = _spread(public)
    seen = public.counts[:, None]
    certainty = 1 / between + seen / within
    evidence = _prior_means(public, within, between) / between + public.sums / within
    k, expected = basis.released, counts.expected[:, None]
    unsure = (noised.deviation / expected) ** 2 + within[:k] / expected
    unsure += counts.variance[:, None] / expected**2 * between[:k]  # units are not known exactly
    certainty[:, :k] += 1 / unsure
    evidence[:, :k] += noised.sums[:, :k] / expected / unsure
    return evidence / certainty, certainty


def _prior_means(public: Public, within: Array, between: Array) -> Array:
    """Return the prior class means (K, d), which are weighed against the sums of records. The prior
    means are the vectors of the classes' names, scaled to the spread of class means, times a factor
    from 0 to 1.5 that is larger the better these vectors agree with the means of public records.
    If there are no vectors of names, the prior means are 0. within, between: each feature's
    variance (d,) within classes and between them (`_spread`)."""
    if public.names is None:
        return np.zeros_like(public.sums)
    length = math.sqrt((public.names**2).sum() / len(public.names))
    names = public.names * (math.sqrt(between.sum()) / max(length, 1e-12))
    seen = public.counts[:, None]
    certainty = np.where(seen > 0, 1 / (within / np.maximum(seen, 1) + between), 0.0)
    total = np.maximum(certainty.sum(axis=0), 1e-12)
    means = public.sums / np.maximum(seen, 1)
    named = names - (names * certainty).sum(axis=0) / total
    means = means - (means * certainty).sum(axis=0) / total
    agreed = (certainty * named * means).sum() + NAMES
    return names * float(np.clip(agreed / ((certainty * named**2).sum() + NAMES), 0.0, 1.5))


def _covariance(public: Public, means: Array, shares: Array) -> Array:
    """Return the covariance within classes (d, d): the scatter of labelled records about their
    class's mean, averaged with an estimate that counts as RECORDS records. This estimate is the
    second moment of all public records minus the covariance of the classes' posterior means. means:
    (K, d); shares: (K,), each class's share of the units."""
    centred = means - shares @ means
    outer = (centred * shares[:, None]).T @ centred
    moment = public.moment / public.records if public.records else np.diag(_variances(public))
    values, vectors = np.linalg.eigh(moment - outer)
    unlabelled = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return np.asarray((public.within + RECORDS * unlabelled) / (_freedom(public) + RECORDS))


def _regularise(covariance: Array) -> Array:
    """Return a covariance (d, d) with its off-diagonal entries multiplied by CORRELATED and its
    diagonal raised by RIDGE times the mean of the variances."""
    shrunk = CORRELATED * covariance
    variances = np.diag(covariance)
    np.fill_diagonal(shrunk, variances + RIDGE * variances.mean())
    return np.asarray(shrunk)


def _clip_features(basis: Basis, vectors: Array) -> Array:
    """Compute all d features (n, d) of records from the base's vectors (n, H). If the first
    `released` features of a row have a length above 1, the whole row is scaled so that this length
    is 1."""
    every = (vectors - basis.mean) @ basis.directions.T
    lengths = np.linalg.norm(every[:, : basis.released], axis=1, keepdims=True)
    return np.asarray(every / np.maximum(1.0, lengths))


def _principal(rows: Array) -> Array:
    """Return the principal directions (m, H) of centred rows (n, H), by decreasing singular value,
    without those whose singular value is 0."""
    if not len(rows):
        return rows
    _, widths, directions = np.linalg.svd(rows, full_matrices=False)
    return np.asarray(directions[widths > 1e-6 * max(float(widths[0]), 1e-12)])
