"""Forecast the accuracy that one release of class statistics adds to that of public records alone.

The public records give a distribution of each class's mean, and the spread of a class's records.
The forecast draws classes from this distribution, and then records of the sites. It simulates the
release on these records with the plan's noise, and compares the resulting head with the public
start on further records, drawn in the same way. Many such draws give an interval for the gain in
accuracy. With few public records the means are uncertain, and so the interval is wide. No record of
a site is read, so this costs no ε.

The model assumes that classes are Gaussian with a common spread, and that sites have the public
shares of classes. If the sites' records are of another kind than the public ones, the gain
differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.core.progress import report
from fedtune.strategies import _posterior as posterior
from fedtune.strategies._posterior import SILENT, Basis, Noised, Public

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

HEADING = "expected gain over what public records alone give"
DRAWS, FEWER = 60, 30  # number of draws for the plan itself, and for each variant of it
JUDGES = 2000  # drawn records on which the two heads are compared
POOL = 6000  # drawn deviations from a class's mean, from which all records are made
COVERED = (0.05, 0.95)  # the quantiles of the draws at which an interval begins and ends
ROUGH = 0.1  # share of units in classes that public records lack, above which a forecast is rough
LEAST = 0.005  # the smallest difference of accuracy that counts as a gain
MOST_UNITS = 10_000  # the largest number of units of a site for which a gain is looked for
# New records spread further than public ones do about their own mean and in a basis made from them.
# So the variance of drawn records is multiplied by a factor. The factor f at which they are as hard
# to classify as held-out public ones is too large, since some public records resemble no class. The
# factor used is f to the power WIDENED, which was chosen on two data sets.
WIDENED = 0.6
WIDEST = 100.0
SEARCHED = 9  # halvings in the search for that factor, each with TRIED draws of the classes
TRIED = 8


@dataclass(frozen=True)
class Sites:
    """The sites of a study, as declared, and their noise.

    - sizes: the declared number of units of each
    - sigma: standard deviation of one dose of noise when the sums of all rounds are averaged, as a
      multiple of the largest norm that one unit adds to the sum
    - doses: the number of doses of noise in the sum: one for each site or, if n sites of which t
      may collude share one dose, n / (n - t)"""

    sizes: tuple[int, ...]
    sigma: float
    doses: float

    @property
    def units(self) -> int:
        return sum(self.sizes)

    def each_of(self, units: int) -> Sites:
        return replace(self, sizes=(units,) * len(self.sizes))


@dataclass(frozen=True)
class Interval:
    """A gain in accuracy over many simulations: its mean, and the bounds `low` and `high` between
    which nine of ten simulations lie."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_format_signed(self.low)} to {_format_signed(self.high)}"


@dataclass(frozen=True)
class ExpectedGain:
    """The accuracy that a study is expected to add to the accuracy that public records alone give.

    - gain: the gain in true accuracy, as if it were measured on unlimited test records; this gain
      and those below are a mean with a 90 % interval
    - start: the predicted accuracy of the public start
    - sites, units: the number of sites, and the sum of their declared sizes
    - records, found: the number of [evaluation] records, and the gain as measured on so few; None
      if there are none
    - worth_from: the smallest number of units, equal at each site, at which the interval's lower
      end is above zero; None if it is larger than MOST_UNITS
    - shared: the gain if all sites share one dose of noise; None if they do already
    - one_more: the gain with one more site
    - rough: classes that public records lack and whose share of units was declared; the forecast
      for them depends on their names alone
    - unknown: classes without a forecast: public records lack them, and no share was declared"""

    gain: Interval
    start: float
    sites: int
    units: int
    records: int = 0
    found: Interval | None = None
    worth_from: int | None = None
    shared: Interval | None = None
    one_more: Interval | None = None
    rough: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def is_none(self) -> bool:
        """Whether no gain is expected: even the interval's upper end is below LEAST, and no class
        lacks a forecast."""
        return self.gain.high < LEAST and not self.unknown

    @property
    def is_sure(self) -> bool:
        return self.gain.low > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast as JSON values."""
        return asdict(self) | {"rough": list(self.rough), "unknown": list(self.unknown)}

    @property
    def warning(self) -> str:
        """Return a one-line warning if the study may gain nothing; "" if the whole interval is
        above zero, or a class without a forecast might add a gain."""
        if self.is_none:
            return "NOT WORTH ITS ε: public records alone give as much"
        if self.is_sure or self.unknown:
            return ""
        return "it may be that nothing is gained: public records alone may give as much"

    def lines(self) -> list[str]:
        """Describe the forecast in words, one line each."""
        least = self.worth_from
        worth = "not worth its ε at any size up to" if least is None else "worth it from about"
        told = [
            f"{HEADING}: {self.gain} accuracy (90 %); {worth} {least or MOST_UNITS:,} units a site"
        ]
        others = [
            f"{what} would give {interval}"
            for what, interval in (
                ("noise that all sites share", self.shared),
                ("one more such site", self.one_more),
            )
            if interval
        ]
        told += ["; ".join(others)] if others else []
        if self.found:
            few = ", too few to tell it from none" if self.is_sure and self.found.low <= 0 else ""
            told.append(f"the {self.records} [evaluation] records would show {self.found}{few}")
        if self.rough:
            told.append(
                f"ROUGH: public records have none of {', '.join(self.rough)}, and of forecasts "
                "that hang on the names of classes two in five were wrong, most of them too high"
            )
        if self.unknown:
            told.append(
                f"cannot say what is gained on {', '.join(self.unknown)}: the public records have "
                "none; --share 'NAME=0.1' declares which share of the sites' units a class has"
            )
        return [*told, self.warning] if self.warning else told


def expected_gain(
    world: World, sites: Sites, labels: Sequence[str], records: int = 0
) -> ExpectedGain:
    """Simulate one release of class statistics many times, and return the accuracy that it is
    expected to add. This includes the number of units from which on it adds any, and the gain with
    shared noise and with one more site.

    - world: the classes that are consistent with the public records
    - sites: the study's sites, with their declared sizes and noise
    - labels: the names of the classes, in the order of their numbers
    - records: the number of [evaluation] records; 0: `found` of the result is None"""
    own = world.draw(sites, DRAWS)
    more = replace(
        sites,
        sizes=(*sites.sizes, round(float(np.median(sites.sizes)))),
        doses=sites.doses * (len(sites.sizes) + 1) / len(sites.sizes),
    )
    is_shared = sites.doses < len(sites.sizes)
    together = replace(sites, doses=1.0)
    return ExpectedGain(
        gain=interval(own.gains),
        start=float(own.starts.mean()),
        sites=len(sites.sizes),
        units=sites.units,
        records=records,
        found=interval(own.on_few(records)) if records else None,
        worth_from=worth_from(world, sites),
        shared=None if is_shared else interval(world.draw(together, FEWER).gains),
        one_more=interval(world.draw(more, FEWER).gains),
        rough=tuple(labels[number] for number in world.rough),
        unknown=tuple(labels[number] for number in world.unknown),
    )


def worth_from(world: World, sites: Sites) -> int | None:
    """Return the smallest number of units, equal at each site, at which the lower end of the gain's
    interval is above zero. It is found to within a tenth. Return None if it is larger than
    MOST_UNITS.

    world: the classes that are consistent with the public records; sites: the study's sites, whose
    number and noise are kept."""

    def is_worth(units: int) -> bool:
        report(f"foretelling the gain with {units:,} units a site")
        return interval(world.draw(sites.each_of(units), FEWER).gains).low > 0

    low, high = 0, 5
    while not is_worth(high):
        low, high = high, 2 * high
        if high > MOST_UNITS:
            return None
    while high - low > max(1, high // 10):
        middle = (low + high) // 2
        low, high = (low, middle) if is_worth(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Draws:
    """The results of n simulated releases. Each compares the head that is built from the release
    with the public start, on JUDGES drawn records.

    - gains: (n,), the accuracy of the release's head minus the public start's
    - starts: (n,), the public start's accuracy
    - changes: (n, JUDGES), for each of these records 1 if only the release's head is right, -1 if
      only the public start is, else 0"""

    gains: Array
    starts: Array
    changes: npt.NDArray[np.int8]

    def on_few(self, records: int) -> Array:
        """Return the gain (n,) of each simulation as a test on only `records` records would show
        it."""
        random = np.random.default_rng(1)
        chosen = random.integers(0, self.changes.shape[1], (len(self.changes), records))
        return np.asarray(np.take_along_axis(self.changes, chosen, axis=1).mean(axis=1))


class World:
    """A distribution of classes, in the space of features, that is consistent with the public
    records. Releases are simulated on records drawn from it.

    - basis: the public map from the base's vectors to d features
    - public: the sums, counts and scatter of the public records' features by class
    - held_out: the public start's cross-validated accuracy on public records
    - shares: class's number -> share of the sites' units, of classes that public records lack;
      other classes have their public shares"""

    def __init__(
        self, basis: Basis, public: Public, held_out: float, shares: Mapping[int, float]
    ) -> None:
        width = len(basis.directions)
        self.basis = replace(basis, mean=np.zeros(width), directions=np.eye(width))
        self.public, self.shares = public, shares
        self.classes = posterior.classes_before(self.basis, public)
        classes = len(public.counts)
        nothing = Noised(np.zeros((classes, basis.released + 1)), SILENT, 1)
        self.start = posterior.head(nothing, self.basis, public)
        values, vectors = np.linalg.eigh(self.classes.within)
        random = np.random.default_rng(0)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        self.pool = random.standard_normal((POOL, width)) @ root.T
        self.pool *= math.sqrt(self._compute_widening(held_out))

    @property
    def rough(self) -> list[int]:
        """The numbers of the classes that public records lack and whose share was declared, if
        these shares add up to ROUGH or more; else []."""
        lacking = [number for number in self.shares if not self.public.counts[number]]
        return lacking if sum(self.shares[number] for number in lacking) >= ROUGH else []

    @property
    def unknown(self) -> list[int]:
        """The numbers of the classes that have neither public records nor a declared share."""
        found = np.flatnonzero(self.public.counts == 0).tolist()
        return [number for number in found if number not in self.shares]

    def draw(self, sites: Sites, draws: int) -> Draws:
        """Simulate the release `draws` times, each time with other classes, records and noise, and
        compare the head that is built from each release with the public start."""
        found, starts = [], []
        noise = sites.sigma * math.sqrt(sites.doses) * self.basis.norm
        for number in range(draws):
            random = np.random.default_rng([2, number])
            means, shares = self._drawn_classes(random)
            sums = self._sums(random, means, shares, sites.units)
            sums += noise * random.standard_normal(sums.shape)
            release = Noised(sums, noise, sites.units)
            fitted = posterior.head(release, self.basis, self.public)
            judges, labels = self._judges(random, means, shares)
            right = _is_right(fitted, judges, labels)
            before = _is_right(self.start, judges, labels)
            found.append(right.astype(np.int8) - before)
            starts.append(before.mean())
        changes = np.stack(found)
        return Draws(changes.mean(axis=1), np.array(starts), changes)

    def _drawn_classes(self, random: np.random.Generator) -> tuple[Array, Array]:
        """Draw one possible set of classes: return their means (K, d), and their shares (K,) of the
        units, which add up to 1. random: the generator of this draw."""
        known = self.classes
        means = known.means + np.sqrt(known.variances) * random.standard_normal(known.means.shape)
        shares, seen = np.zeros(len(means)), self.public.counts > 0
        seen[[*self.shares]] = False
        shares[seen] = random.dirichlet(self.public.counts[seen] + 0.5)
        shares *= 1 - sum(self.shares.values())
        for number, share in self.shares.items():
            shares[number] = share
        return means, shares / shares.sum()

    def _sums(self, random: np.random.Generator, means: Array, shares: Array, units: int) -> Array:
        """Draw units of one record each, and return what the sites together would release, before
        noise: for each class the sums of the k features that the sites use, and its weighted number
        of units, (K, k + 1).

        - random: the generator of this draw
        - means, shares: (K, d) and (K,), the classes of this draw, as from `_drawn_classes`
        - units: the number of units over all sites"""
        counts = random.multinomial(units, shares)
        labels = np.repeat(np.arange(len(means)), counts)
        k = self.basis.released
        rows = self.pool[random.integers(JUDGES, POOL, units), :k] + means[labels, :k]
        rows /= np.maximum(1.0, np.linalg.norm(rows, axis=1, keepdims=True))
        ends = np.concatenate([np.zeros((1, k)), np.cumsum(rows, axis=0)])[np.cumsum(counts)]
        sums = np.diff(ends, axis=0, prepend=0.0)
        return np.concatenate([sums, self.basis.weight * counts[:, None]], axis=1)

    def _judges(
        self, random: np.random.Generator, means: Array, shares: Array
    ) -> tuple[Array, Labels]:
        """Draw the records on which both heads are compared. Return their features (JUDGES, d), and
        the numbers of their classes (JUDGES,).

        random: the generator of this draw; means, shares: (K, d) and (K,), the classes of this
        draw."""
        labels = random.choice(len(means), JUDGES, p=shares)
        rows = means[labels] + self.pool[:JUDGES]
        lengths = np.linalg.norm(rows[:, : self.basis.released], axis=1, keepdims=True)
        return rows / np.maximum(1.0, lengths), labels

    def _compute_widening(self, held_out: float) -> float:
        """Return the factor by which the variances of a class's records are multiplied, since new
        records spread further than public ones. It is the WIDENED-th power of the factor at which
        the public start is right on drawn records as often as on held-out public ones. held_out:
        its accuracy on those."""
        low = -math.log(WIDEST) / 4
        high = math.log(WIDEST)
        narrow = self.pool
        for _ in range(SEARCHED):
            middle = (low + high) / 2
            self.pool = narrow * math.exp(middle / 2)
            right = [self._start_in(np.random.default_rng([1, n])) for n in range(TRIED)]
            low, high = (middle, high) if np.mean(right) > held_out else (low, middle)
        self.pool = narrow
        return math.exp(WIDENED * middle)

    def _start_in(self, random: np.random.Generator) -> float:
        """Return the public start's accuracy on records of one draw, only of classes of which there
        are public records."""
        means, shares = self._drawn_classes(random)
        shares = np.where(self.public.counts > 0, shares, 0.0)
        judges, labels = self._judges(random, means, shares / shares.sum())
        return float(_is_right(self.start, judges, labels).mean())


def _is_right(head: posterior.Head, rows: Array, labels: Labels) -> npt.NDArray[np.bool_]:
    return np.asarray((rows @ head.weight.T + head.bias).argmax(axis=1) == labels)


def interval(gains: Array) -> Interval:
    """Return the mean of the gains (n,) of n simulations, and the interval between their quantiles
    COVERED."""
    low, high = np.quantile(gains, COVERED)
    return Interval(float(gains.mean()), float(low), float(high))


def _format_signed(figure: float) -> str:
    return f"{figure:+.3f}".replace("-", "−")
