"""Trap 2: neither the noise, nor the divisor, nor the rate may follow how many units there are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedtune.core.dp.clip import Chunk, sensitivity
from fedtune.core.dp.plan import DpPlan
from fedtune.core.dp.steplog import StepLog
from tests import chance
from tests.dp.conftest import make_plan

SIZES, DECLARED, RATE = (40, 99, 100, 400), 100, 0.25
# What noise and rate would be that followed the true size, where it is 40 or 400.
SPREAD = chance.spread_for(40 / DECLARED, 400 / DECLARED, figures=2)
DRAWN = chance.count_for(RATE, RATE * DECLARED / 40, RATE * DECLARED / 400, figures=2)


@pytest.mark.parametrize("units", SIZES)
def test_noise_and_rate_are_the_plans_whatever_the_true_size(tmp_path: Path, units: int) -> None:
    divisor = RATE * DECLARED
    plan = make_plan(noise_multiplier=1.0, sampling_rate=RATE, divisor=divisor)
    log = StepLog(tmp_path / "log")

    def gradients(rows: list[int]) -> Iterator[Chunk]:
        yield Chunk(rows, [torch.zeros(len(rows), SPREAD.draws)])

    noise = plan.step(units, SPREAD.draws, gradients, log, 1).double()
    std = sensitivity(plan.max_grad_norm, SPREAD.draws, plan.grid) / divisor
    assert SPREAD.holds(float(noise.square().mean().sqrt()) / std)
    steps = math.ceil(DRAWN.trials / units)
    drawn = sum(len(_sampled(plan, units, log)) for _ in range(steps))
    assert chance.count_of(steps * units, RATE, figures=2).holds(drawn)


def _sampled(plan: DpPlan, units: int, log: StepLog) -> list[int]:
    """Who was drawn in one step."""
    seen: list[int] = []

    def gradients(rows: list[int]) -> Iterator[Chunk]:
        seen.extend(rows)
        yield Chunk(rows, [torch.zeros(len(rows), 1)])

    plan.step(units, 1, gradients, log, 1)
    return seen


def test_the_mean_is_over_the_plans_divisor(tmp_path: Path) -> None:
    """Twice the units with the same gradient give twice the mean: the divisor does not follow."""
    plan = make_plan(noise_multiplier=1e-4, divisor=10.0)
    log = StepLog(tmp_path / "log")

    def ones(rows: list[int]) -> Iterator[Chunk]:
        yield Chunk(rows, [torch.ones(len(rows), 1)])

    room = chance.deviations(2) * 1e-4 / 10
    assert float(plan.step(10, 1, ones, log, 1)) == pytest.approx(1.0, abs=room)
    assert float(plan.step(20, 1, ones, log, 1)) == pytest.approx(2.0, abs=room)
