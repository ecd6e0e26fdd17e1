"""Linear discriminant: the coordinator builds a classifier from the sites' noised class
statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedtune.core.errors import ConfigError
from fedtune.core.registry.arrays import CLASS_BASIS, CLASS_SUMS
from fedtune.core.strategy import Arrays, State, Strategy
from fedtune.strategies._mean import RunningMean
from fedtune.strategies._posterior import SILENT, Basis, ClassFigures, Head, Noised, Public, head
from fedtune.strategies._posterior import WEIGHT as COUNT_WEIGHT

if TYPE_CHECKING:
    from fedtune.core.config import Study

WEIGHT, BIAS = "head.weight", "head.bias"
LARGEST = 1e3  # the largest entry that sites admit in an adapter (core/models/lora.py)
SLACK = 1.01  # factor by which clipping.max_grad_norm may exceed the exact bound on a unit's array
LEAST_VARIANCE = 1e-12  # taken for a round without noise, so that its inverse is finite
# Names of the arrays in the state:
# - basis/…: the directions (d, H) and the mean (H,) of the basis
# - public/…: statistics of public records in the basis: sums (K, d), counts (K,), scatter within
#   classes (d, d), second moment (d, d), the number of records and, if there are any, the vectors
#   of the classes' names (K, d)
# - noised/…: over all rounds so far, the sum of the rounds' class sums (K, k + 1), each divided by
#   the variance of its noise; the sum of the inverse variances; and the sum of the inverse
#   variances times the rounds' units
DIRECTIONS, MEAN = "basis/directions", "basis/mean"
SUMS = "public/sums"
COUNTS = "public/counts"
WITHIN = "public/within"
MOMENT = "public/moment"
RECORDS = "public/records"
NAMES = "public/names"
NOISED = "noised/sums"
PRECISION = "noised/precision"
UNITS = "noised/units"
# Result of a cross-validation on labelled public records, (2,): the number of correct predictions,
# and of predictions. It cannot be computed from the other arrays.
HELD_OUT = "public/held-out"
KNOWN = {DIRECTIONS, MEAN, SUMS, COUNTS, WITHIN, MOMENT, RECORDS}


def state_of(basis: Basis, public: Public) -> State:
    """Return the strategy's state before the first round, name -> array in fp64, which holds the
    basis and the statistics of public records."""
    state = {
        DIRECTIONS: basis.directions,
        MEAN: basis.mean,
        SUMS: public.sums,
        COUNTS: public.counts,
        WITHIN: public.within,
        MOMENT: public.moment,
        RECORDS: np.array(public.records, np.float64),
    }
    return state if public.names is None else state | {NAMES: public.names}


def public_head(known: State) -> Arrays:
    """Build the head from public data alone, as if no site had released anything. Return its arrays
    by name, fp32. known: the strategy's state before the first round (`state_of`)."""
    classes = len(known[COUNTS])
    nothing = Noised(sums=np.zeros((classes, 1)), deviation=SILENT, units=1)
    return _arrays(head(nothing, basis_in(known, 0, COUNT_WEIGHT), public_in(known)))


def basis_in(state: State, released: int, weight: float) -> Basis:
    """Return the basis of class statistics that is stored in a strategy's state. released: the
    number of directions that sites use. weight: the number that each unit adds to the column of
    counts."""
    return Basis(state[MEAN], state[DIRECTIONS], released, weight)


def public_in(state: State) -> Public:
    """Return the statistics of public records that are stored in a strategy's state
    (`state_of`)."""
    return Public(
        sums=state[SUMS],
        counts=state[COUNTS],
        within=state[WITHIN],
        moment=state[MOMENT],
        records=round(float(state[RECORDS])),
        names=state.get(NAMES),
    )


def _arrays(found: Head) -> Arrays:
    """Return the weight and the bias of a head under the names that they have in an adapter, name
    -> array in fp32. Entries beyond ±LARGEST are set to ±LARGEST."""
    arrays = {WEIGHT: found.weight, BIAS: found.bias}
    return {n: np.clip(a, -LARGEST, LARGEST).astype(np.float32) for n, a in arrays.items()}


@dataclass
class Discriminant(Strategy):
    """The strategy of class statistics: build a classifier, a linear discriminant, instead of
    averaging updates. The classifier is made of posterior class means, class shares from noised
    counts, and one covariance for all classes from public records.

    The sums of several rounds are averaged, each weighted by the inverse of its noise's variance.
    Reference: Hastie et al. 2009, "The elements of statistical learning", section 4.3."""

    averages: ClassVar[bool] = False
    of_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._mean = RunningMean()
        self._state: State = {}
        self._released, self._count_weight = 0, 0.0
        self._units = self._deviation = 0.0

    def check(self, study: Study) -> None:
        """Check that the plan fits class statistics: each unit counts once and with equal weight,
        and a site sends sums by class, not the result of training steps.

        Errors: ConfigError if the plan does not fit."""
        t = study.training
        expected = {
            'strategy.weights = "declared"': study.strategy.weights == "declared",
            "training.sampling_rate = 1.0": t.sampling_rate == 1,
            "training.local_steps = 1": t.local_steps == 1,
            "training.learning_rate = 1.0": t.learning_rate == 1,
            'training.learning_rate_schedule = "constant"': t.learning_rate_schedule == "constant",
            'training.optimizer = "sgd"': t.optimizer == "sgd",
            "training.weight_decay = 0": t.weight_decay == 0,
            "training.proximal_mu = 0": t.proximal_mu == 0,
            "no [lora] table": study.lora is None,
            "a [public] table, of which the basis is built": study.public is not None,
        }
        if study.clipping:  # a plan without privacy may have none
            weight = float(study.objective.options.get("count_weight", COUNT_WEIGHT))
            exact = math.hypot(1.0, weight)  # a unit's features have length 1 at most
            bound = f"{math.ceil(exact * 1e4) / 1e4:.4f}"
            fits = exact <= study.clipping.max_grad_norm <= SLACK * exact
            expected[f"clipping.max_grad_norm = {bound}"] = fits
            expected['clipping.mode = "flat"'] = study.clipping.mode == "flat"
        for what, is_so in expected.items():
            if not is_so:
                raise ConfigError(
                    'strategy.name = "discriminant" needs a study of class statistics', what
                )

    def prepare(self, study: Study, frozen: Arrays) -> None:
        self._released = len(frozen[CLASS_BASIS])
        self._count_weight = float(study.objective.options.get("count_weight", COUNT_WEIGHT))

    def update_like(self, adapter: Arrays) -> Arrays:
        return {CLASS_SUMS: np.zeros((len(adapter[WEIGHT]), self._released + 1), np.float32)}

    def describe_round(self, units: float, deviation: float) -> None:
        self._units, self._deviation = units, deviation

    def add(self, update: Arrays, weight: float) -> None:
        self._mean.add(update, weight)

    def apply(self, adapter: Arrays) -> Arrays:
        mean, state = self._mean.take(), self._state
        if mean is None:
            return adapter
        variance = max((self._deviation * self._units) ** 2, LEAST_VARIANCE)
        sums = mean[CLASS_SUMS] * self._units
        new = {NOISED: sums, PRECISION: np.array(1.0), UNITS: np.array(self._units)}
        for name, value in new.items():
            state[name] = state.get(name, np.zeros_like(value)) + value / variance
        return _arrays(self.make_head())

    def make_head(self) -> Head:
        """Build the head from the sites' sums of all rounds so far and the public data. The head's
        `figures` hold for each class the noised number of units, the standard deviation of that
        noise, whether there are public records of the class, and whether its noised number is too
        large to be noise alone."""
        state, precision = self._state, float(self._state[PRECISION])
        noised = Noised(
            sums=state[NOISED] / precision,
            deviation=precision**-0.5,
            units=round(float(state[UNITS]) / precision),
        )
        basis = basis_in(state, self._released, self._count_weight)
        return head(noised, basis, public_in(state))

    def class_figures(self) -> ClassFigures | None:
        return self.make_head().figures if NOISED in self._state else None

    def state(self) -> State:
        return dict(self._state)

    def load_state(self, state: State) -> None:
        """Continue from a saved state: the public data and, if there were rounds, the averaged
        sums. Errors: ConfigError if it is another strategy's state."""
        if not KNOWN <= state.keys() <= KNOWN | {NAMES, HELD_OUT, NOISED, PRECISION, UNITS}:
            raise ConfigError(
                "the checkpoint holds another strategy's state", "the run's own strategy"
            )
        self._state = dict(state)
