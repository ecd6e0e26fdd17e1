"""Trap 3: a step that was aborted half-way leaves nothing for the next one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.steplog import StepLog
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests import chance
from tests.dp.conftest import make_plan, records


def test_the_sum_starts_at_zero_after_an_aborted_step(tmp_path: Path) -> None:
    plan, log = make_plan(noise_multiplier=1e-4, divisor=1.0), StepLog(tmp_path / "log")

    def broken(rows: list[int]) -> Iterator[Chunk]:
        yield Chunk([0, 1], [torch.ones(2, 1)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.step(4, 1, broken, log, 1)
    after = plan.step(4, 1, lambda rows: iter([Chunk(rows, [torch.zeros(len(rows), 1)])]), log, 1)
    assert abs(float(after)) < chance.deviations() * 1e-4  # two rows of length 1 stayed behind: 2


def test_the_engine_starts_clean_after_an_aborted_step(tiny_base: Path) -> None:
    lora = LoraTable(rank=2, alpha=4.0, modules=("q_proj",), last_layers=2)
    network = Network(find_base(str(tiny_base)), torch.float32, lora, labels=0)

    class Fails:
        armed = True

        def may_run_beside(self, batch):  # type: ignore[no-untyped-def]
            return True

        def losses(self, network, batch):  # type: ignore[no-untyped-def]
            found = CausalLM().losses(network, batch)
            if self.armed:
                found.sum().backward()
                raise KeyboardInterrupt
            return found

    objective = Fails()
    engine = UnitGradientEngine(CachedDataset(network, records([1, 2, 1])), objective)
    with pytest.raises(KeyboardInterrupt):
        list(engine([0, 1, 2]))
    objective.armed = False
    again = engine.matrix([0, 1, 2])
    fresh = UnitGradientEngine(CachedDataset(network, records([1, 2, 1])), CausalLM())
    assert torch.equal(again, fresh.matrix([0, 1, 2]))
