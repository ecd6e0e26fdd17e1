"""Clip each row's gradient (a row is a unit or, if records are drawn, a record) and add it to an
integer sum: in multiples of a grid, sums are exact.

torch is imported only where tensors are computed: the commands that show what a plan costs need
only the numbers, and answer in a second without it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Mode = Literal["flat", "normalised"]

# Room for the rounding of the fp64 norm itself, so that ≤ C holds strictly: a pairwise fp64 sum
# over d ≤ 10⁹ squares errs by less than 10⁻¹⁴ relative.
_SLACK = 1.0 - 1e-12
# A row with a smaller norm counts as zero. This is below any grid, and its inverse cannot overflow.
LEAST_NORM = 1e-150
# Columns converted to fp64 at once, by kind of device and not by the number of rows: a row's norm
# adds up over its blocks, and in other blocks it would round differently.
_COLUMNS = {"cpu": 2**12}  # as many as stay in the processor's cache with 64 rows
_MORE = 2**16  # GPUs want more at once


@dataclass(frozen=True, repr=False)
class Chunk:
    """The gradients of some of the rows that were drawn for a step.

    - rows: the index of each of these rows, in the chunk's order
    - parts: for each trained tensor, in the update's order, the gradients of these rows, fp32 or
      fp64 (len(rows), the tensor's size)"""

    rows: Sequence[int]
    parts: Sequence[torch.Tensor]

    def flat(self) -> torch.Tensor:
        """Return the gradients as one new tensor (rows, d), the parts side by side."""
        import torch

        return torch.cat([part.flatten(1) for part in self.parts], dim=1)

    def wipe(self) -> None:
        """Overwrite the un-noised gradients with zeros."""
        for part in self.parts:
            part.zero_()


def grid_for(noise_std: float) -> float:
    """Return the grid, in gradient units, for a sum with noise of standard deviation `noise_std`:
    the largest power of two that is at most 2⁻²⁰ · noise_std. Sums count multiples of it."""
    return 2.0 ** math.floor(math.log2(noise_std * 2.0**-20))


def sensitivity(max_grad_norm: float, dimension: int, grid: float) -> float:
    """Return a bound on how far one row more or less moves the integer sum, as an L2 norm in
    gradient units. It is C (`max_grad_norm`), plus the most that rounding `dimension` coordinates
    to the grid adds.

    Reference: Dwork & Roth 2014, definition 3.8."""
    return max_grad_norm + math.sqrt(dimension) * grid / 2


def scales(
    parts: Sequence[torch.Tensor],
    max_grad_norm: float,
    mode: Mode = "flat",
    gamma: float = 0.01,
) -> torch.Tensor:
    """Return the factor by which each row must be multiplied to be clipped, fp64 (rows,). A row
    times its factor has an L2 norm, over all `parts`, of at most `max_grad_norm`.

    - parts: for each trained tensor the rows' gradients, fp32 or fp64 (rows, the tensor's size);
      they are not changed
    - max_grad_norm: C, the bound on a row's norm
    - mode: how the factor follows from the norm, "flat" or "normalised", see below
    - gamma: γ of "normalised"; "flat" does not read it

    flat: min(1, C/‖g‖) (Abadi et al. 2016, algorithm 1);
    normalised: C/(‖g‖+γ) (Bu et al. 2023, AUTO-S).
    Guarantee: every scaled row has norm ≤ C measured in fp64, whatever the input. A norm that is
    summed in fp32 over millions of numbers would be 4·10⁻⁵ off, and so would the bound.
    | row                     | its factor                         |
    |-------------------------|------------------------------------|
    | not finite              | 0: such a row adds nothing         |
    | norm overflows fp64     | 0                                  |
    | norm below 10⁻¹⁵⁰       | 0: its factor could overflow       |
    """
    import torch

    squares = torch.zeros(len(parts[0]), dtype=torch.float64, device=parts[0].device)
    for block, _, _ in _blocks(parts):
        squares += _norms(block).square_()
        block.zero_()
    norms = squares.sqrt_()
    usable = torch.isfinite(norms) & (norms >= LEAST_NORM)
    if mode == "flat":
        scale = torch.clamp(max_grad_norm / norms.clamp_min(1e-300), max=1.0)
    else:
        scale = max_grad_norm / (norms + gamma)
    return torch.where(usable, scale * _SLACK, torch.zeros_like(scale))


def _norms(block: torch.Tensor) -> torch.Tensor:
    """Compute the L2 norm of each row of `block`, (rows,). On a GPU the rows are computed one by
    one: in a common computation the order of additions would depend on the number of rows, and so
    would the last bits of each norm."""
    import torch

    if block.device.type != "cpu":
        return torch.stack([torch.linalg.vector_norm(row) for row in block])
    norms: torch.Tensor = torch.linalg.vector_norm(block, dim=1)
    return norms


def clip(
    gradients: torch.Tensor, max_grad_norm: float, mode: Mode = "flat", gamma: float = 0.01
) -> torch.Tensor:
    """Return an fp64 copy of `gradients` in which each row is clipped. A row that is not finite
    becomes zero.

    - gradients: one row for each unit or record, (rows, d); they are not changed
    - max_grad_norm: C, the bound on a row's norm
    - mode, gamma: how a row is clipped, as for `scales`"""
    import torch

    scale = scales([gradients], max_grad_norm, mode, gamma)
    exact = gradients.to(torch.float64, copy=True)
    exact[scale == 0] = 0.0  # 0 · NaN is NaN
    return exact.mul_(scale[:, None])


def add_clipped(
    total: torch.Tensor,
    chunk: Chunk,
    grid: float,
    max_grad_norm: float,
    mode: Mode = "flat",
    gamma: float = 0.01,
) -> None:
    """Clip each row of `chunk`, round it to multiples of `grid` and add it to `total`, int64 (d,).

    - total: the sum so far, in multiples of `grid`; it is changed in place
    - chunk: the gradients of some rows; they are zeroed, also if this fails
    - grid: the number of which the sum counts multiples, in gradient units
    - max_grad_norm: C, the bound on a row's norm before it is rounded
    - mode, gamma: how a row is clipped, as for `scales`

    Guarantee: integers add exactly, so the sum does not depend on the rows' order or on chunks, and
    has no floating-point error by which neighbouring data sets could be told apart (Mironov 2012).
    Nothing un-noised but the sum is left in memory: the chunk and every buffer are overwritten."""
    import torch

    try:
        scale = scales(chunk.parts, max_grad_norm, mode, gamma)[:, None]
        dropped = scale == 0  # 0 · NaN is NaN
        for block, first, last in _blocks(chunk.parts):
            block.masked_fill_(dropped, 0.0).mul_(scale / grid).round_()
            integers = block.to(torch.int64)
            total[first:last] += integers.sum(dim=0).to(total.device)
            block.zero_()
            integers.zero_()
    finally:
        chunk.wipe()


def _blocks(parts: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Yield fp64 copies of all rows, a few columns at a time, as (copy, first, end): the copy has
    the columns from number `first` up to, but without, number `end`. Columns are numbered through
    all parts, from 0 to d - 1. parts: as for `scales`."""
    import torch

    start = 0
    for part in parts:
        flat = part.flatten(1)
        step = _COLUMNS.get(flat.device.type, _MORE)
        for first in range(0, flat.shape[1], step):
            columns = flat[:, first : first + step].to(torch.float64, copy=True)
            yield columns, start + first, start + first + columns.shape[1]
        start += flat.shape[1]
