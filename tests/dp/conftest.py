"""A tiny network with patients' records, as a site would train on."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable, Study
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.dp.plan import DpPlan
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.ledger_kit import run_round


def records(sizes: list[int], seed: int = 0) -> Dataset:
    """`sizes[u]` records of different lengths for unit u."""
    draw = np.random.default_rng(seed)
    examples = []
    for unit, size in enumerate(sizes):
        for _ in range(size):
            length = int(draw.integers(4, 40))
            ids = draw.integers(3, 280, size=length + 1, dtype=np.int32)
            targets = ids[1:].copy()
            targets[: int(draw.integers(0, length))] = -100
            examples.append(Example(ids[:-1].copy(), targets, -100, unit))
    return Dataset(examples, len(sizes), Counter())


@pytest.fixture(scope="session", params=["cut", "whole"])
def network(request: pytest.FixtureRequest, tiny_base: Path) -> Network:
    """LoRA on the last two of four blocks (states cached at the cut), or on all of them."""
    last = 2 if request.param == "cut" else None
    modules = ("q_proj", "gate_proj", "down_proj")
    lora = LoraTable(rank=4, alpha=8.0, modules=modules, last_layers=last)
    made = Network(find_base(str(tiny_base)), torch.float32, lora, labels=0)
    arrays = made.trainable()
    draw = np.random.default_rng(1)  # B away from zero: a more telling point than the start
    made.load_trainable(
        {n: draw.normal(size=a.shape).astype(np.float32) * 0.1 for n, a in arrays.items()}
    )
    return made


@pytest.fixture(params=["auto", "opacus"])
def engine(request: pytest.FixtureRequest, network: Network) -> UnitGradientEngine:
    data = CachedDataset(network, records([1, 3, 2, 1, 4, 2]))
    return UnitGradientEngine(data, CausalLM(), engine=request.param)


@pytest.fixture
def plan() -> DpPlan:
    return make_plan()


def make_plan(**changes: object) -> DpPlan:
    fields: dict[str, object] = dict(
        study="sha256:" + "0" * 64,
        unit="patient",
        sampling_rate=1.0,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="flat",
        gamma=0.01,
        rounds=2,
        local_steps=1,
        delta=1e-5,
        divisor=6.0,
    )
    return DpPlan(**(fields | changes))  # type: ignore[arg-type]


def study(**changes: object) -> Study:
    body: dict[str, object] = {
        "study": {"name": "t"},
        "base": {"model": "tiny"},
        "lora": {"rank": 4, "alpha": 8.0, "modules": ["q_proj"]},
        "objective": {"name": "causal_lm", "max_length": 64},
        "training": {"rounds": 4, "sampling_rate": 1.0, "learning_rate": 0.1},
        "clipping": {},
        "privacy": {"epsilon": 8.0, "delta": 1e-4},
    }
    return Study.model_validate(body | changes, strict=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ledgers to copy: `new`, with one dataset declared, and `used`, with five rounds released."""
    models = tmp_path_factory.mktemp("models")
    Ledger(models / "new").declare("notes", [], "sha256:0", [b"ann", b"bob"])
    shutil.copytree(models / "new", models / "used")
    for round_ in range(1, 6):
        run_round(Ledger(models / "used"), round_)
    return models


@pytest.fixture
def ledger(folder: Path, models: Path) -> Ledger:
    shutil.copytree(models / "new", folder)
    return Ledger(folder)


@pytest.fixture
def used(folder: Path, models: Path) -> Ledger:
    shutil.copytree(models / "used", folder)
    return Ledger(folder)
