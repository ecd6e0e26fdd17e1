"""Clip each unit's gradient and round it to the integer grid on which sums are exact."""

from __future__ import annotations

import math
from typing import Literal

import torch

# Room for the rounding of the fp64 norm itself, so that ≤ C holds strictly: a pairwise fp64 sum
# over d ≤ 10⁹ squares errs by less than 10⁻¹⁴ relative.
_SLACK = 1.0 - 1e-12


def grid_for(noise_std: float) -> float:
    """The largest power of two ≤ 2⁻²⁰ · noise_std: the unit of the integer sum."""
    return 2.0 ** math.floor(math.log2(noise_std * 2.0**-20))


Relation = Literal["add or remove one unit", "replace one unit"]


def sensitivity(
    max_grad_norm: float,
    dimension: int,
    grid: float,
    *,
    rows: int = 1,
    relation: Relation = "add or remove one unit",
) -> float:
    """L2 sensitivity of the integer sum, in gradient units, to one unit with at most `rows` rows.

    | add or remove one unit | rows · (C + what rounding `dimension` coordinates to the grid adds) |
    | replace one unit       | twice that |
    Reference: Dwork & Roth 2014, definition 3.8; Kifer & Machanavajjhala 2011 for the relations."""
    one_row = max_grad_norm + math.sqrt(dimension) * grid / 2
    return rows * one_row * (2 if relation == "replace one unit" else 1)


def clip(
    gradients: torch.Tensor,
    max_grad_norm: float,
    mode: Literal["flat", "normalised"] = "flat",
    gamma: float = 0.01,
) -> torch.Tensor:
    """Scale each row of `gradients` (units, d) to L2 norm at most `max_grad_norm`, in fp64.

    flat: g·min(1, C/‖g‖) (Abadi et al. 2016, algorithm 1);
    normalised: g·C/(‖g‖+γ) (Bu et al. 2023, AUTO-S).
    Guarantee: every returned row has norm ≤ C measured in fp64, whatever the input.
    | non-finite row          | zeros: such a unit contributes nothing |
    | row of zeros            | zeros |
    | norm overflows fp64     | zeros |
    """
    exact = gradients.to(torch.float64, copy=True)
    norms = torch.linalg.vector_norm(exact, dim=1)
    usable = torch.isfinite(norms)
    if mode == "flat":
        scale = torch.clamp(max_grad_norm / norms.clamp_min(1e-300), max=1.0)
    else:
        scale = max_grad_norm / (norms + gamma)
    scale = torch.where(usable, scale * _SLACK, torch.zeros_like(scale))
    exact[~usable] = 0.0
    return exact.mul_(scale[:, None])


def to_grid(clipped: torch.Tensor, grid: float) -> torch.Tensor:
    """Sum of the rows of `clipped` (units, d), each rounded to multiples of `grid`; int64 (d,).

    Guarantee: integers add exactly, so the sum does not depend on order or chunking, and no
    floating-point difference between neighbours survives (Mironov 2012). Nothing un-noised but the
    sum is left in memory: the intermediate buffers are zeroed."""
    scaled = torch.div(clipped, grid).round_()
    whole = scaled.to(torch.int64)
    total = whole.sum(dim=0)
    scaled.zero_()
    whole.zero_()
    return total
