"""Answer a query: compute a noised sum of the model's scores on held-out records.

A record's score is in [0, 1]: the geometric mean of its targets' probabilities, or the probability
of its label (both are exp of minus the loss), or 1 if its label is the likeliest and else 0. A
unit's row is the pair (mean score of its records, 1). If the plan names classes or groups, the row
has a further pair for each class and group: the part of the first pair that the unit's records in
this class or group contribute. What leaves the site is the noised sum of all rows, (Σ score, Σ 1)
for each pair. It is computed by the same step as in training, so that sampler, clip, noise, grid,
log and accountant are the same.

Guarantee: a row is clipped to C = √(2 · axes), where an axis is the whole, the classes, or one
column of groups. A row that is built as above is never longer: on one axis the parts add up to at
most the whole pair, so that their squares add up to at most 2. Each answer is one Gaussian
mechanism on all of its numbers, with σ in multiples of C and q = 1; its line is in the step log
before the answer exists.
| case                    | what the answer holds                            |
|-------------------------|--------------------------------------------------|
| no units                | noise alone                                      |
| a record's loss is NaN, or raises | its unit contributes nothing, not even to Σ 1 |
| a record is in no class or group of an axis | the record adds nothing to this axis' pairs |
| a loss is infinite      | score 0                                          |
Reference: Dwork & Roth 2014, appendix A (the Gaussian mechanism)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from fedtune.core.config import PrivacyTable, Study
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.plan import DpPlan, StepPlan
from fedtune.core.dp.steplog import StepLog

if TYPE_CHECKING:
    import torch

TOGETHER = 64  # rows that are made at once


def query_plan(study: Study) -> DpPlan:
    """Return the DP plan for all queries of a private study with [private_evaluation]. Each round
    of this plan is one query."""
    table, privacy = study.private_evaluation, study.privacy
    assert table is not None and isinstance(privacy, PrivacyTable)
    return DpPlan(
        study=study.queries_digest,
        unit=privacy.unit,
        sampling_rate=1.0,
        noise_multiplier=table.noise_multiplier,
        max_grad_norm=study.query_norm,
        clipping="flat",
        gamma=0.01,
        rounds=len(study.queries),
        local_steps=1,
        delta=privacy.delta,
        divisor=1.0,
    )


class Rows(Protocol):
    """The rows of a query, one for each unit. A row is only computed when it is asked for.

    - dimension: how many numbers a row has: two for the whole, and two for each class and group
    - of_units: returns the rows of the units with these indices, fp64 (len(units), dimension)
    - wipe: overwrites what was computed"""

    @property
    def dimension(self) -> int: ...

    def __len__(self) -> int: ...

    def of_units(self, units: list[int]) -> torch.Tensor: ...

    def wipe(self) -> None: ...


def answer(plan: StepPlan, rows: Rows, log: StepLog, round_: int) -> torch.Tensor:
    """Compute the noised sums (Σ score, Σ 1) of each cell, fp32 (2 · cells,). A cell is the whole,
    or one of the plan's classes or groups.

    - plan: the plan that `query_plan` makes of the study, or a SitePlan around it
    - rows: the units' rows. `of_units` is called for `TOGETHER` units at a time and returns fp64
      (len(units), 2 · cells); `wipe` is called at the end
    - log: the site's step log, to which the answer's line is written first
    - round_: the round after which the query is asked, for that line

    Errors: those of plan.step; there is no answer then."""

    def drawn_rows(units: list[int]) -> Iterator[Chunk]:
        for first in range(0, len(units), TOGETHER):
            some = units[first : first + TOGETHER]
            yield Chunk(some, [rows.of_units(some)])

    try:
        return plan.step(len(rows), rows.dimension, drawn_rows, log, round_)
    finally:
        rows.wipe()
