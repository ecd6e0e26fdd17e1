"""Trap 2: neither the noise, nor the divisor, nor the rate may follow how many units there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedtune.dp.clip import Chunk
from fedtune.dp.plan import DpPlan
from fedtune.dp.steplog import StepLog
from tests.dp.conftest import make_plan

D = 100_000


@pytest.mark.parametrize("units", [40, 99, 100, 400])
def test_noise_and_rate_are_the_plans_whatever_the_true_size(tmp_path: Path, units: int) -> None:
    """The declared size is 100. Bounds are 6 standard errors: a false alarm in 10⁸."""
    plan = make_plan(noise_multiplier=1.0, sampling_rate=0.25, divisor=25.0)
    log = StepLog(tmp_path / "log")

    def gradients(rows: list[int]) -> Iterator[Chunk]:
        yield Chunk(rows, [torch.zeros(len(rows), D)])

    spread = float(plan.step(units, D, gradients, log, 1).double().std()) * 25.0
    assert spread == pytest.approx(1.0, abs=6 / (2 * D) ** 0.5)
    drawn = [len(_sampled(plan, units, log)) for _ in range(40)]
    mean = sum(drawn) / len(drawn)
    assert abs(mean - 0.25 * units) < 6 * (0.25 * 0.75 * units / 40) ** 0.5


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

    assert float(plan.step(10, 1, ones, log, 1)) == pytest.approx(1.0, abs=1e-3)
    assert float(plan.step(20, 1, ones, log, 1)) == pytest.approx(2.0, abs=1e-3)
