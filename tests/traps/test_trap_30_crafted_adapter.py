"""Trap 30: the bound holds for whatever adapter the coordinator sends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.dp.steplog import StepLog
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.local_round import local_round
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import make_plan, records, study


@pytest.fixture(scope="module")
def network(tiny_base: Path) -> Network:
    lora = LoraTable(rank=4, alpha=8.0, modules=("q_proj", "down_proj"), train="AB")
    return Network(find_base(str(tiny_base)), torch.float32, lora, labels=0)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e3, 1e8, 1e30])
def test_one_unit_moves_the_sum_by_at_most_c(
    network: Network, tmp_path: Path, scale: float
) -> None:
    """Beyond what a site would load, too."""
    draw = np.random.default_rng(6)
    with torch.no_grad():
        for parameter in network.parameters().values():
            crafted = (scale * draw.normal(size=tuple(parameter.shape))).astype(np.float32)
            parameter.copy_(torch.from_numpy(crafted))
    for seed in range(3):
        engine = UnitGradientEngine(CachedDataset(network, records([2], seed)), CausalLM())
        for c in (1e-6, 1.0):
            plan = make_plan(noise_multiplier=1e-4, max_grad_norm=c, divisor=1.0)
            moved = plan.step(1, engine.dimension, engine, StepLog(tmp_path / "log"), 1)
            noise = 1e-4 * c * engine.dimension**0.5
            assert float(moved.double().norm()) <= c + 2 * noise


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_one_unit_moves_the_update_by_at_most_c(
    tiny_base: Path, tmp_path: Path, scale: float
) -> None:
    """The same over a whole round, which starts at zero and whose learning rate is 1."""
    made = study(
        base={"model": str(tiny_base), "dtype": "float32"},
        training={"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
    )
    network, draw = build(made), np.random.default_rng(7)
    start = {
        n: (scale * draw.normal(size=a.shape)).astype(np.float32)
        for n, a in network.trainable().items()
    }
    plan = make_plan(noise_multiplier=1e-4, max_grad_norm=1e-3, divisor=1.0)
    data, log = CachedDataset(network, records([2])), StepLog(tmp_path / "log")
    delta = local_round(made, data, plan, log, 1, start)
    moved = sum(float(np.square(d, dtype=np.float64).sum()) for d in delta.values()) ** 0.5
    assert moved <= 1.1e-3  # noise and the adapter's own fp32 add less than a tenth
