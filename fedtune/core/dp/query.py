"""Answer a query: a noised sum of the model's scores on held-out records.

A unit's row is (score, 1), its score in [0, 1]: the geometric mean probability of a record's
targets, or the probability of its label (exp of minus the loss), averaged over the unit's records.
Two sums leave: Σ score and Σ 1. They go through the same step as training's, so that sampler,
clip, noise, grid, log and accountant are the same.

Guarantee: a row has norm at most √2 = C, and each answer is one Gaussian mechanism on it with σ in
multiples of C and q = 1; its line is in the step log before the answer exists.
| no units                | noise alone                                      |
| a record's loss is NaN, or raises | its unit contributes nothing, not even to Σ 1 |
| a loss is infinite      | score 0                                          |
Reference: Dwork & Roth 2014, appendix A (the Gaussian mechanism).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedtune.core.config import PrivacyTable, Study
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.plan import DpPlan, StepPlan
from fedtune.core.dp.steplog import StepLog

if TYPE_CHECKING:
    import torch

NORM = math.sqrt(2)  # of the largest row, (1, 1)


def query_plan(study: Study) -> DpPlan:
    """Plan all queries of a private study with [private_evaluation]; a round of it is one query."""
    table, privacy = study.private_evaluation, study.privacy
    assert table is not None and isinstance(privacy, PrivacyTable)
    return DpPlan(
        study=study.queries_digest,
        unit=privacy.unit,
        sampling_rate=1.0,
        noise_multiplier=table.noise_multiplier,
        max_grad_norm=NORM,
        clipping="flat",
        gamma=0.01,
        rounds=len(study.queries),
        local_steps=1,
        delta=privacy.delta,
        divisor=1.0,
    )


def answer(plan: StepPlan, rows: torch.Tensor, log: StepLog, round_: int) -> torch.Tensor:
    """Compute the noised sums (Σ score, Σ 1), fp32 (2,). rows: (units, 2), zeroed afterwards."""

    def drawn_rows(units: list[int]) -> Iterator[Chunk]:
        yield Chunk(units, [rows[units]])

    try:
        return plan.step(len(rows), 2, drawn_rows, log, round_)
    finally:
        rows.zero_()
