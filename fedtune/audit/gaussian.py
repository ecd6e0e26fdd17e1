"""Audit one noised step with a worst-case unit, for an empirical lower bound on its ε."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedtune.audit.bounds import gaussian_epsilon, gaussian_mu
from fedtune.core.dp import accountant
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.mechanism import RowGradients
from fedtune.core.dp.plan import DpPlan
from fedtune.core.training.selftest import HUGE, MemoryLog

# Fixed before anything is measured.
CONFIDENCE = 0.95  # the confidence of the reported lower bound
CEILING = 0.999  # a lower bound above the claim at this confidence shows that the claim is false
# An audit must reach 80 % of a claim of at least 3.
FLOOR = 0.8
FLOOR_FROM = 3.0
FLOOR_TRIALS = 10_000
DIMENSION, OTHERS = 64, 3


@dataclass(frozen=True)
class OneStep:
    """The result of the audit of one step.

    - trials: how often a step ran with the audited unit, and how often without it
    - claimed: the ε that one step in which every unit takes part is said to have, at `delta`
    - audited, ceiling: lower bounds on this ε, at 95 % and at 99.9 % confidence
    - false_alarms: how many trials without the unit were taken for trials with it
    - misses: how many trials with the unit were taken for trials without it
    - broken: whether the ceiling is above the claim
    - weak: whether `audited` is below 80 % of `claimed`, although the claim is at least 3 and there
      were enough trials; if so, the step has more noise than claimed, or the test was not
      effective"""

    trials: int
    delta: float
    claimed: float
    audited: float
    ceiling: float
    false_alarms: int
    misses: int
    noise_multiplier: float
    records: int
    assumption: str = "Gaussian trade-off"
    sampling_rate: float = 1.0

    @property
    def broken(self) -> bool:
        return self.ceiling > self.claimed

    @property
    def weak(self) -> bool:
        reach = self.claimed >= FLOOR_FROM and self.trials >= FLOOR_TRIALS
        return reach and self.audited < FLOOR * self.claimed

    @property
    def passed(self) -> bool:
        return not self.broken and not self.weak


def one_step(plan: DpPlan, trials: int = 10_000, dimension: int = DIMENSION) -> OneStep:
    """Run `trials` steps of `plan` with a canary and as many without, and tell the two kinds of
    steps apart by one projection of the noised sum.

    The canary is a unit with k rows, the most that the plan allows a unit. Its rows are gradients
    that all point the same way and are longer than the clipping norm C. The canary is added to
    three generated units that the attacker knows. Every unit is in the step (q = 1), and the claim
    is taken at q = 1 too; the sampler has its own test. The threshold is half of the shift that the
    plan allows, μ/2. It follows from theory, before a trial is run.

    plan: the plan by which steps run, with its σ, C and k. dimension: the length of the generated
    gradients.

    Guarantee: the shipped code runs the steps. Their log lines go to memory, since no record is
    read. A correct step is called broken with probability below 10⁻⁵.
    Errors: ValueError on trials < 1.
    Reference: Nasr et al. 2023, "Tight auditing of differentially private machine learning"."""
    if trials < 1:
        raise ValueError("an audit needs at least one trial")
    plan = replace(plan, sampling_rate=1.0, divisor=1.0)
    draw = np.random.default_rng(0)  # draws the units that the attacker knows, and the direction
    direction = draw.normal(size=dimension)
    direction /= np.linalg.norm(direction)
    others = draw.normal(size=(OTHERS, dimension))
    canary = np.tile(HUGE * plan.max_grad_norm * direction, (plan.records, 1))
    rows_without = torch.from_numpy(others).float()
    rows_with = torch.from_numpy(np.concatenate([others, canary])).float()
    middle = _expected_sum(plan, others) @ direction + plan.records * plan.max_grad_norm / 2
    toward = torch.from_numpy(direction)
    absent = _projections(plan, rows_without, toward, trials)
    present = _projections(plan, rows_with, toward, trials)
    false_alarms = int((absent > middle).sum())
    misses = int((present <= middle).sum())

    def bound(confidence: float) -> float:
        mu = gaussian_mu(false_alarms, misses, trials, confidence)
        return gaussian_epsilon(mu, plan.delta)

    return OneStep(
        trials=trials,
        delta=plan.delta,
        claimed=accountant.epsilon(plan.events(1), plan.delta),
        audited=bound(CONFIDENCE),
        ceiling=bound(CEILING),
        false_alarms=false_alarms,
        misses=misses,
        noise_multiplier=plan.noise_multiplier,
        records=plan.records,
    )


def _expected_sum(plan: DpPlan, others: np.ndarray) -> np.ndarray:
    """Compute the sum of the clipped gradients of the units that the attacker knows, (dimension,).
    others: their gradients, one unit per row."""
    norms = np.linalg.norm(others, axis=1, keepdims=True)
    c = plan.max_grad_norm
    flat = plan.clipping == "flat"
    factor = np.minimum(1.0, c / norms) if flat else c / (norms + plan.gamma)
    return np.asarray((others * factor).sum(axis=0))


def _projections(plan: DpPlan, rows: torch.Tensor, toward: torch.Tensor, trials: int) -> np.ndarray:
    """Run steps on the same rows, and return the component of each noised sum in one direction,
    (trials,).

    - plan: the plan by which each step clips and adds noise
    - rows: the gradients of all rows, fp32 (rows, dimension); each row is in every step
    - toward: the direction, a unit vector, fp64 (dimension,)
    - trials: the number of steps"""

    def gradients(drawn: list[int]) -> Iterator[Chunk]:
        yield Chunk(drawn, [rows[drawn]])  # a copy, which the step wipes

    log, projections = MemoryLog(), np.empty(trials)
    for trial in range(trials):
        noised = _run_opened_step(plan, len(rows), rows.shape[1], gradients, log)
        projections[trial] = float(noised.double() @ toward)
    return projections


def _run_opened_step(
    plan: DpPlan, n_rows: int, dimension: int, gradients: RowGradients, log: MemoryLog
) -> torch.Tensor:
    """Run one step and return the noised sum that an attacker sees, (dimension,). For sites that
    share noise, this is the sum of the honest sites, all but one of which have no record.

    - plan: the plan of a site, with the divisor 1, so that the mean that a step returns is the sum
    - n_rows, dimension: the shape of the gradients at the one site that has records
    - gradients: yields the gradients of the sampled rows; the step overwrites them
    - log: gets a line for each noised sum"""
    if plan.sites == 1:
        return plan.step(n_rows, dimension, gradients, log, 1)
    total = plan.noised_sum(n_rows, dimension, gradients, log, 1)
    for _ in range(plan.sites - plan.colluding - 1):
        total += plan.noised_sum(0, dimension, gradients, log, 1)
    return total.double() * plan.grid_at(dimension)
