"""Clip the gradients of rows, sum them, and add noise to the sum. Every result that is made of
units' gradients passes through the two functions of this module.

    gradients of rows ── clipped_sum ──> sum that no row moves by more than C ── noised_sum ──>

Training, queries, class statistics and secure aggregation differ in what a row's gradient is, and
in how the noise is shared: in secure aggregation only the sum over all sites is opened. All of them
clip, round, sum, log and add noise by these two functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.core.dp import clip, noise
from fedtune.core.dp.clip import Chunk

if TYPE_CHECKING:
    import torch

# The gradients of the sampled rows, some at a time, in any order. A row is a unit or, where records
# are sampled, one record.
RowGradients = Callable[[list[int]], Iterator[Chunk]]


@dataclass(frozen=True)
class Bound:
    """The bound on what one row may add to a sum.

    - norm: C, in the L2 norm
    - mode, gamma: how rows are clipped (`clip.scales`)
    - grid: the number of which the sum counts multiples, in gradient units"""

    norm: float
    mode: clip.Mode
    gamma: float
    grid: float


def clipped_sum(
    gradients: RowGradients, sampled: list[int], dimension: int, bound: Bound
) -> torch.Tensor:
    """Clip the gradients of rows and return their sum in multiples of the grid, int64 (dimension,),
    without noise.

    - gradients: called once with the rows `sampled`; yields the gradient of each row exactly once,
      computed from that row's own records alone. These tensors are overwritten
    - sampled: the indices of the drawn rows, each once; if there are none, the sum is zero
    - dimension: the number of coordinates of a row's gradient
    - bound: how rows are clipped, and the grid to which they are rounded

    Guarantee: a row adds a vector of norm at most C before it is rounded to the grid, whatever its
    gradient (`clip.sensitivity` bounds what rounding adds); one that is not finite adds nothing.
    Integers add exactly: the sum without a row is the sum less what that row added, to the last
    bit, in any order and any chunks.
    Errors: RuntimeError where a row is missing or doubled; nothing is returned then.
    Reference: Abadi et al. 2016, algorithm 1; Mironov 2012 for the grid."""
    import torch

    total = torch.zeros(dimension, dtype=torch.int64)
    returned = list[int]()
    for chunk in gradients(sampled) if sampled else ():
        returned += chunk.rows
        clip.add_clipped(total, chunk, bound.grid, bound.norm, bound.mode, bound.gamma)
    if sorted(returned) != sorted(sampled):
        raise RuntimeError("the gradient engine did not return each sampled row once")
    return total


def noised_sum(
    total: torch.Tensor,
    bound: Bound,
    noise_multiplier: float,
    log_step: Callable[[], None],
) -> torch.Tensor:
    """Write a step to the step log, then add the step's noise to a clipped sum in place, and return
    this sum: int64 (d,), in multiples of the grid.

    - total: the result of `clipped_sum` with the same bound, over all processes of the site
    - bound: the bound with which `total` was summed; the scale of the noise follows from it
    - noise_multiplier: σ, in multiples of the most that one row moves the sum
    - log_step: the function that writes the step's line to the log

    Guarantee: the call is one Gaussian mechanism on the sum, with fresh noise from the system's
    generator. The step's line is in the log before there is a result.
    Errors: those of `log_step` and of `noise.gaussian_on_grid`; the sum is not returned then.
    Reference: Dwork & Roth 2014, appendix A."""
    sensitivity = clip.sensitivity(bound.norm, len(total), bound.grid)
    log_step()
    total += noise.gaussian_on_grid(len(total), noise_multiplier * sensitivity, bound.grid)
    return total
