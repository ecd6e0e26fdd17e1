"""The steps of a study without privacy (`privacy = "off"`). They are NOT PRIVATE: there is neither
noise nor accounting.

Such a study serves to measure what privacy costs. Every output of the study says that it is not
private, and a site's default policy refuses the study."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedtune.core.config import ClippingTable, Study
from fedtune.core.dp import clip, mechanism, sampling, shared_noise
from fedtune.core.dp.calibration import sampling_rate
from fedtune.core.dp.mechanism import Bound, RowGradients
from fedtune.core.dp.steplog import StepLog


@dataclass(frozen=True)
class NonPrivatePlan:
    """The plan of a site in a study without privacy. A step gives the sum of the drawn rows'
    gradients, divided by the expected number of rows. If the study has a [clipping] table, the
    gradients are clipped as in a private study.

    - sampling_rate: q, the probability with which each row is drawn for a step
    - divisor: the number by which a sum is divided, q · declared size
    - clipping: the study's [clipping] table; None: nothing is clipped"""

    sampling_rate: float
    divisor: float
    clipping: ClippingTable | None

    def step(
        self, n_rows: int, dimension: int, gradients: RowGradients, log: StepLog, round_: int
    ) -> torch.Tensor:
        """Draw rows, and return the sum of their gradients, divided by `divisor`, without noise,
        fp32 (dimension,). No guarantee.

        - n_rows: the number of rows, each drawn with probability sampling_rate
        - dimension: the number of coordinates of a row's gradient
        - gradients: called with the drawn rows; yields the gradient of each exactly once
        - log, round_: not used, since a step without noise is not logged"""
        sampled = sampling.poisson(n_rows, self.sampling_rate)
        total = torch.zeros(dimension, dtype=torch.float64)
        for chunk in gradients(sampled) if sampled else ():
            rows, c = chunk.flat(), self.clipping
            if c is not None:
                rows = clip.clip(rows, c.max_grad_norm, c.mode, c.gamma)
            total += rows.sum(dim=0, dtype=torch.float64).cpu()
        return (total / self.divisor).float()

    def noised_sum(
        self, n_rows: int, dimension: int, gradients: RowGradients, log: StepLog, round_: int
    ) -> torch.Tensor:
        """Draw rows, and return the sum of their clipped gradients without noise, in multiples of
        `grid_at(dimension)`, int64 (dimension,). No guarantee. Arguments as for `step`; the
        gradients are overwritten."""
        assert self.clipping is not None  # Study: secure aggregation needs a bound
        table = self.clipping
        bound = Bound(table.max_grad_norm, table.mode, table.gamma, self.grid_at(dimension))
        sampled = sampling.poisson(n_rows, self.sampling_rate)
        return mechanism.clipped_sum(gradients, sampled, dimension, bound)

    def grid_at(self, dimension: int) -> float:
        """Return the grid, in gradient units, of a sum with `dimension` numbers. It is chosen as
        for noise of standard deviation C, although none is added."""
        assert self.clipping is not None
        norm = self.clipping.max_grad_norm
        return shared_noise.grid(norm, norm, dimension)


def non_private_plan(study: Study, declared_size: int) -> NonPrivatePlan:
    """Build the plan of a site with `declared_size` units (public) in a study without privacy."""
    rate = sampling_rate(study, declared_size)
    return NonPrivatePlan(rate, rate * declared_size, study.clipping)
