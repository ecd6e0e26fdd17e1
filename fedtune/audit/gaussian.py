"""Audit one noised step with worst-case units, for an empirical lower bound on its ε."""

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
TRIALS = 40_000  # at σ = 1 a step with 0.9 σ is then caught
DIMENSION = 64  # the length of a gradient
CANARIES = 32  # the most canaries (test units) of a step
OTHERS = (0.5, 1.0, 8.0)  # the lengths of other units' gradients, in C


@dataclass(frozen=True)
class OneStep:
    """The result of the audit of one step.

    - trials: the number of canaries (test units) that were in their step; as many were not
    - claimed: the ε, at `delta`, that is claimed for one step in which every unit takes part
    - audited, ceiling: lower bounds on this ε, at 95 % and at 99.9 % confidence
    - false_alarms: how many canaries that were not in their step were taken to be in it
    - misses: how many canaries that were in their step were taken not to be in it
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


def one_step(plan: DpPlan, trials: int = TRIALS) -> OneStep:
    """Run steps of `plan` with canaries (test units): `trials` of them are in their step, and as
    many are not. Guess for each canary whether it was there, by one projection of the step's noised
    sum. Return a OneStep, with the lower bounds on ε that follow from the wrong guesses.

    A canary is a unit with k rows, the most that the plan allows a unit. Its rows are gradients
    that all point the same way and are longer than the clipping norm C. A step belongs to up to
    CANARIES canaries. It holds three ordinary units, and those of its canaries that a random draw
    marks. All directions are orthogonal: no unit moves the projection of another, and the noise of
    two projections is independent, so that each canary is a trial of its own. All units that a step
    holds take part (q = 1), and the claim is taken at q = 1 too; the sampler has its own test. The
    threshold is half of the shift that the plan allows, μ/2. It follows from theory, before a trial
    is run.

    - plan: the plan by which steps run, with its σ, C and k
    - trials: the number of canaries that are in their step, and of those that are not

    Guarantee: the shipped code runs the steps. Their log lines go to memory, since no record is
    read. A correct step is called broken with probability below 10⁻⁵.
    Errors: ValueError on trials < 1.
    Reference: Nasr et al. 2023, "Tight auditing of differentially private machine learning";
    Steinke et al. 2023, "Privacy auditing with one (1) training run", for canaries side by side."""
    if trials < 1:
        raise ValueError("an audit needs at least one trial")
    plan = replace(plan, sampling_rate=1.0, divisor=1.0)
    draw = np.random.default_rng(0)  # draws the directions and the coins
    directions = np.linalg.qr(draw.normal(size=(DIMENSION, DIMENSION))).Q
    known = len(OTHERS)
    others = directions[:known] * np.array(OTHERS)[:, None] * plan.max_grad_norm
    canaries = directions[known : known + CANARIES]
    is_there = draw.permutation(np.repeat([True, False], trials))
    shift = plan.records * plan.max_grad_norm
    is_taken_there = _projections(plan, others, canaries, is_there) > shift / 2
    false_alarms = int((is_taken_there & ~is_there).sum())
    misses = int((~is_taken_there & is_there).sum())

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


def _projections(
    plan: DpPlan, others: np.ndarray, directions: np.ndarray, is_there: np.ndarray
) -> np.ndarray:
    """Run steps until each canary had its trial. Return, for each canary, the component of its
    step's noised sum in the canary's direction, (canaries,).

    - plan: the plan by which each step clips and adds noise
    - others: the gradients of the units that are in every step (units, dimension)
    - directions: the directions of a step's canaries, orthogonal unit vectors (canaries of a step,
      dimension)
    - is_there: for each canary, whether it is in its step (canaries,); the first step has as many
      of them as there are directions, and so on"""
    most, dimension = directions.shape
    canaries = torch.from_numpy(HUGE * plan.max_grad_norm * directions).float()
    known, toward = torch.from_numpy(others).float(), torch.from_numpy(directions)
    log, projections = MemoryLog(), np.empty(len(is_there))
    for first in range(0, len(is_there), most):
        coins = torch.from_numpy(is_there[first : first + most])
        there = canaries[: len(coins)][coins].repeat_interleave(plan.records, dim=0)
        rows = torch.cat([known, there])

        def gradients(drawn: list[int], rows: torch.Tensor = rows) -> Iterator[Chunk]:
            yield Chunk(drawn, [rows[drawn]])  # a copy, which the step wipes

        noised = _run_opened_step(plan, len(rows), dimension, gradients, log)
        projections[first : first + most] = (toward[: len(coins)] @ noised.double()).numpy()
    return projections


def _run_opened_step(
    plan: DpPlan, n_rows: int, dimension: int, gradients: RowGradients, log: MemoryLog
) -> torch.Tensor:
    """Run one step and return the noised sum that an attacker sees, (dimension,). If sites share
    noise, this is the sum of the honest sites; only one of them has records.

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
