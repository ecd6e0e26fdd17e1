"""Traps 20, 23, 25: a round is a function of the noised sums alone, draws whole units, and writes
down nothing of who was drawn."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.config import Study
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.training.local_round import local_round
from tests.dp.conftest import make_plan, records, study


@dataclass
class Given:
    """A plan that reads every gradient and then returns a fixed vector in place of the sum."""

    asked: list[int] = field(default_factory=list)

    def step(
        self, n_rows: int, dimension: int, gradients: Any, log: StepLog, round_: int
    ) -> torch.Tensor:
        self.asked.append(n_rows)
        for _ in gradients(list(range(n_rows))):
            pass
        draw = torch.Generator().manual_seed(len(self.asked))
        return torch.randn(dimension, generator=draw)


def made(base: Path, **changes: object) -> Study:
    body: dict[str, object] = {
        "base": {"model": str(base), "dtype": "float32"},
        "lora": {"rank": 2, "alpha": 4.0, "modules": ["q_proj"], "last_layers": 2},
        "training": {"rounds": 1, "local_steps": 3, "sampling_rate": 1.0, "learning_rate": 0.1},
        "privacy": {"epsilon": 8.0, "delta": 1e-4, "unit": "patient"},
    }
    return study(**(body | changes))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_update_depends_on_the_noised_sums_alone(
    tiny_base: Path, tmp_path: Path, optimizer: str
) -> None:
    """Two different sets of records and the same noised sums: the same update, bit for bit. A
    learning rate, an early stop or a best step chosen by a private loss would tell them apart."""
    training = {"rounds": 1, "local_steps": 3, "sampling_rate": 1.0, "learning_rate": 0.1}
    plan = made(tiny_base, training=training | {"optimizer": optimizer})
    network = build(plan)
    start = network.initial(network.draw_factor(0))
    updates = []
    for seed, sizes in ((1, [1, 2, 3]), (2, [2, 1, 1, 4])):
        given, data = Given(), CachedDataset(network, records(sizes, seed))
        log = StepLog(tmp_path / "log")
        updates.append(local_round(plan, data, given, log, 1, start))
        assert given.asked == [len(sizes)] * 3  # whole patients are drawn, not their records
    one, two = updates
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert any(array.any() for array in one.values())


@pytest.mark.parametrize("membership", ["", "north"])
def test_nothing_of_who_was_drawn_is_written(tmp_path: Path, membership: str) -> None:
    """The log line of a step is known before the step: the plan's own values and no others."""
    plan, log = make_plan(sampling_rate=0.5), StepLog(tmp_path / "log.jsonl", membership)
    for _ in range(20):
        plan.step(6, 4, lambda rows: iter([Chunk(rows, [torch.ones(len(rows), 4)])]), log, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(lines) == 20 and len(set(lines)) == 1
    public = asdict(plan) | {"round": 1} | ({"membership": membership} if membership else {})
    named = {field.name for field in fields(Step)} - ({"membership"} - public.keys())
    assert json.loads(lines[0]) == {name: public[name] for name in named}
