"""The fourth oracle at full size: what a step adds to nothing has the accounted variance."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedtune.core.dp import noise
from fedtune.core.dp.clip import Chunk, sensitivity
from fedtune.core.dp.plan import DpPlan
from fedtune.core.dp.steplog import StepLog
from tests import chance
from tests.dp.conftest import make_plan

WITHIN = chance.spread_within(0.003, 0.99, 1.01)
D = WITHIN.draws


def spread(plan: DpPlan, tmp_path: Path, chunks: int = 1, units: int = 14) -> float:
    """σ̂/σ of a step whose gradients are zero; σ of `plan()`, on the step's own sensitivity."""

    def nothing(rows: list[int]) -> Iterator[Chunk]:
        # One row of zeros seen as many: no memory for rows · D.
        groups = [part.tolist() for part in torch.tensor(rows).chunk(chunks)]
        assert len(groups) == min(chunks, len(rows))
        yield from (Chunk(group, [torch.zeros(len(group), D)]) for group in groups)

    out = plan.step(units, D, nothing, StepLog(tmp_path / "log"), 1).double()
    std = SIGMA * sensitivity(plan.max_grad_norm, D, plan.grid)
    return float(out.square().mean().sqrt()) * plan.divisor / std


SIGMA = 1.7


def plan(sigma: float = SIGMA) -> DpPlan:
    return make_plan(noise_multiplier=sigma, max_grad_norm=0.5, divisor=7.0)


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_zero_signal_variance(tmp_path: Path, chunks: int) -> None:
    assert WITHIN.holds(spread(plan(), tmp_path, chunks, units=7))


def test_an_empty_batch_is_a_noise_only_step(tmp_path: Path) -> None:
    assert WITHIN.holds(spread(plan(), tmp_path, units=0))


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_one_percent_of_sigma_is_rejected(tmp_path: Path, factor: float) -> None:
    """Twin: the plan says σ, the step adds σ·0.99 or σ·1.01."""
    assert not WITHIN.holds(spread(plan(SIGMA * factor), tmp_path, units=0))


def test_noise_for_each_chunk_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: two calls of the noise where one is due."""
    real = noise.gaussian_on_grid
    monkeypatch.setattr(noise, "gaussian_on_grid", lambda d, s, g: real(d, s, g) + real(d, s, g))
    assert not WITHIN.holds(spread(plan(), tmp_path, units=0))


def fixed_noise(value: int) -> object:
    """A test double for the noise. It lives here, and refuses to run outside of tests."""

    def drawn(dimension: int, std: float, grid: float) -> torch.Tensor:
        if "PYTEST_CURRENT_TEST" not in os.environ:
            raise RuntimeError(
                "fixed noise is for tests; a step without a test runs with real noise"
            )
        return torch.full((dimension,), value, dtype=torch.int64)

    return drawn


def test_the_double_refuses_to_run_outside_of_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "gaussian_on_grid", fixed_noise(0))
    fixed = plan().step(0, 8, lambda _: iter(()), StepLog(tmp_path / "log"), 1)
    assert not fixed.any()
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with pytest.raises(RuntimeError, match="for tests"):
        plan().step(0, 8, lambda _: iter(()), StepLog(tmp_path / "log"), 1)


def test_the_double_is_in_no_shipped_package() -> None:
    root = Path(noise.__file__).parents[2]
    for package in ("fedtune", "server", "client"):
        for path in (root / package).rglob("*.py"):
            assert "PYTEST" not in path.read_text(encoding="utf-8"), path.name
