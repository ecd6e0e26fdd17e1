"""Fit a released adapter or head to a site's own records, with a pull towards its released values.

The fit minimises the records' mean loss plus pull / 2 times the squared distance from the released
arrays, by full-batch L-BFGS, so that there is no rate to choose. The pull, the number of steps and
the share of the change that is kept are chosen by records that the fit does not see. The share
mixes the released and the fitted model: if heads are trained, each record's logits are the same
mixture of both heads' logits.

References: Li et al. 2020, "Federated optimization in heterogeneous networks", section 3 (the
proximal term); Li et al. 2021, "Ditto", section 3; Mansour et al. 2020, "Three approaches for
personalization", section 5 (model interpolation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy.stats import t as student  # type: ignore[import-untyped]

from fedtune.core.models.lora import LARGEST, Arrays
from fedtune.core.progress import report

PULLS = (0.01, 0.001, 0.0001)
STEPS = (2, 4, 8, 16, 32)
SHARES = (0.25, 0.5, 0.75, 1.0)
CONFIDENCE = 0.95  # of the test that the chosen model is better than the released one

# Yields, batch by batch, the numbers of the given records and their losses.
Losses = Callable[[Sequence[int]], Iterator[tuple[np.ndarray, torch.Tensor]]]


@dataclass(frozen=True)
class Way:
    """A way to fit: the pull, the number of steps, and the share of the change that is kept."""

    pull: float
    steps: int
    share: float


@dataclass(frozen=True)
class Grid:
    """The candidates of a search: pulls, numbers of steps, and shares. Every combination is tried
    as a Way."""

    pulls: tuple[float, ...] = PULLS
    steps: tuple[int, ...] = STEPS
    shares: tuple[float, ...] = SHARES

    @property
    def ways(self) -> list[Way]:
        return [Way(*each) for each in product(self.pulls, self.steps, self.shares)]


@dataclass(frozen=True)
class Choice:
    """The way to fit that was chosen by records which the fit did not see.

    - way: the way with the smallest loss, whether or not it is better than the released model
    - shared: the released model's mean loss, in nats
    - personal: the mean loss of models that are fitted in this way, in nats
    - least: a lower bound, in nats, on how much this way lowers the loss. It would hold with
      probability CONFIDENCE if no other way had been tried; since the way is the best of many, it
      holds a little less often
    - better: whether that bound is above zero"""

    way: Way
    shared: float
    personal: float
    least: float

    @property
    def better(self) -> bool:
        return self.least > 0


class Fit:
    """Fits the network's parameters to records. The methods take records by their numbers, called
    rows. When a Fit is made, the parameters must have the values of the released model.

    - parameters: name → the parameter of the network that is trained
    - scales: name → the factor by which a parameter's change is multiplied. The pull, which is the
      weight of the penalty on the squared change, applies to the change before it is multiplied
    - losses: a function that takes the numbers of records and yields, batch by batch, the numbers
      and the losses of the batch's records"""

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        scales: Mapping[str, float],
        losses: Losses,
    ) -> None:
        self._parameters, self._losses = parameters, losses
        self._released = {name: p.detach().clone() for name, p in parameters.items()}
        self._scales = scales

    def path(
        self, rows: Sequence[int], pull: float, steps: Sequence[int]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Fit to `rows`, and yield name → change after each number of steps that `steps` lists.

        rows: the numbers of the records. pull: the weight of half the squared distance from the
        released values, which is added to the mean loss. steps: numbers of L-BFGS steps, in rising
        order."""
        change = {n: torch.zeros_like(p, requires_grad=True) for n, p in self._parameters.items()}
        optimiser = torch.optim.LBFGS(
            list(change.values()), max_iter=1, max_eval=25, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            return self._gradients(rows, pull, change)

        for number in range(1, max(steps) + 1):
            optimiser.step(closure)  # type: ignore[no-untyped-call]
            if number in steps:
                yield {n: self._scales[n] * d.detach() for n, d in change.items()}

    def _gradients(
        self, rows: Sequence[int], pull: float, change: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the loss that a fit to `rows` minimises, fp64: their mean loss plus `pull` / 2
        times the squared length of `change`. Set `change`'s gradients to the gradients of this
        loss. change: name → a parameter's change from the released value, before it is scaled."""
        self.load({n: self._scales[n] * d.detach() for n, d in change.items()})
        for parameter in self._parameters.values():
            parameter.grad = None
        total = 0.0
        for _, losses in self._losses(rows):
            mean = losses.sum() / len(rows)
            mean.backward()  # type: ignore[no-untyped-call]
            total += float(mean.detach())
        for name, delta in change.items():
            gradient = self._parameters[name].grad
            own = torch.zeros_like(delta) if gradient is None else self._scales[name] * gradient
            delta.grad = own + pull * delta.detach()
            total += pull / 2 * float(delta.detach().square().sum())
        return torch.tensor(total, dtype=torch.float64)

    @torch.no_grad()
    def load(self, change: Mapping[str, torch.Tensor], share: float = 1.0) -> None:
        """Set the parameters to the released values plus a share of a change. change: name → the
        scaled change, as `path` yields it."""
        for name, parameter in self._parameters.items():
            parameter.copy_((self._released[name] + share * change[name]).clamp_(-LARGEST, LARGEST))

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._released[name])

    @torch.no_grad()
    def scores(self, rows: Sequence[int]) -> np.ndarray:
        """Return the losses of these rows, in their order, with the parameters' present values."""
        found = dict[int, float]()
        for index, losses in self._losses(rows):
            found |= dict(zip(index.tolist(), losses.double().cpu().tolist(), strict=True))
        return np.array([found[row] for row in rows])

    def arrays(self, rows: Sequence[int], way: Way) -> Arrays:
        """Fit to the records `rows` in the given way, and return name → fitted array, fp32. The
        parameters then hold the released values again. way: the pull, the number of steps, and the
        share of the change that is kept."""
        (change,) = self.path(rows, way.pull, (way.steps,))
        self.load(change, way.share)
        arrays = {n: p.detach().float().cpu().numpy().copy() for n, p in self._parameters.items()}
        self.restore()
        return arrays


def choose(fit: Fit, folds: Sequence[Sequence[int]], units: np.ndarray, grid: Grid) -> Choice:
    """Choose how to fit, by cross-validation: for each fold, fit to all rows outside the fold, and
    measure the losses of the fold's rows. Rows that are in no fold are part of every fit.

    - fit: the parameters and the records' losses
    - folds: the numbers of the rows in each fold; all rows of a patient are in one fold
    - units: the patient of each row, (n,)
    - grid: the pulls, steps and shares that are tried

    Returns: the best way to fit, and a bound on how much better it is than the released model.
    Afterwards the parameters hold the released values."""
    everyone, ways = range(len(units)), grid.ways
    tested = [row for fold in folds for row in fold]
    fit.restore()
    shared = fit.scores(tested)
    personal = np.empty((len(ways), len(tested)))
    done = 0
    for number, fold in enumerate(folds):
        held, at = set(fold), slice(done, done + len(fold))
        rows = [row for row in everyone if row not in held]
        for pull in grid.pulls:
            changes = zip(grid.steps, fit.path(rows, pull, grid.steps), strict=True)
            for steps, change in changes:
                for share in grid.shares:
                    fit.load(change, share)
                    personal[ways.index(Way(pull, steps, share)), at] = fit.scores(fold)
        done += len(fold)
        report("choosing on own records that the fit does not see", number + 1, len(folds))
    fit.restore()
    best = int(personal.mean(axis=1).argmin())
    least = bound_gain(shared - personal[best], units[tested])
    return Choice(ways[best], float(shared.mean()), float(personal[best].mean()), least)


def bound_gain(gains: np.ndarray, units: np.ndarray) -> float:
    """Return a lower bound, at confidence CONFIDENCE, on the mean gain per record; -∞ for a single
    patient. It is computed by Student's t over patients, since a patient's records may be
    correlated. gains: (n,), by how much the loss of each record falls. units: (n,), the patient of
    each record."""
    _, patient = np.unique(units, return_inverse=True)
    mean, count = gains.mean(), patient.max() + 1
    deviations = np.bincount(patient, gains - mean)
    if count < 2:
        return -math.inf
    error = math.sqrt((deviations**2).sum() * count / (count - 1)) / len(gains)
    return float(mean - student.ppf(CONFIDENCE, count - 1) * error)
