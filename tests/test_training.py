"""A local round: every choice of the plan learns without noise, and only the noised sum counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.core.config import Study
from fedtune.core.dp.non_private import non_private_plan
from fedtune.core.dp.steplog import StepLog
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.training.local_round import local_round
from tests.dp.conftest import records, study

TRAINING = {"rounds": 1, "local_steps": 12, "sampling_rate": 1.0, "learning_rate": 0.5}
FAST = TRAINING | {"learning_rate": 20.0}  # the tiny random model has tiny gradients


def made(base: Path, **changes: object) -> Study:
    body: dict[str, object] = {
        "base": {"model": str(base), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0, "modules": ["q_proj", "down_proj"]},
        "training": TRAINING,
        "privacy": "off",
        "clipping": None,
    }
    return study(**(body | changes))


def loss(network: Network, data: CachedDataset, plan: Study) -> float:
    objective = plan.objective.resolved
    with torch.no_grad():
        each = [
            objective.losses(network, b) for b in data.batches(range(len(data.dataset.examples)))
        ]
    return float(torch.cat(each).mean())


@pytest.mark.parametrize(
    "changes",
    [
        {"training": FAST},
        {"training": TRAINING | {"optimizer": "adamw", "learning_rate": 0.01}},
        {"training": FAST | {"proximal_mu": 0.01}},
        {
            "lora": {"rank": 4, "alpha": 8.0, "modules": ["q_proj", "down_proj"], "train": "AB"},
            "training": FAST,
        },
        {
            "lora": {"rank": 4, "alpha": 8.0, "modules": ["down_proj"], "last_layers": 1},
            "training": FAST,
        },
        {"clipping": {"mode": "normalised"}, "training": FAST},
    ],
    ids=["sgd", "adamw", "fedprox", "A and B", "last MLP", "normalised"],
)
def test_a_round_lowers_the_loss_of_its_own_records(
    tiny_base: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    plan = made(tiny_base, **changes)
    network = build(plan)
    start = network.initial(network.draw_factor(0))
    data = CachedDataset(network, records([1] * 8))
    network.load_trainable(start)
    before = loss(network, data, plan)
    delta = local_round(plan, data, non_private_plan(plan, 8), StepLog(tmp_path / "log"), 1, start)
    assert loss(network, data, plan) == pytest.approx(before)  # the adapter is put back
    network.load_trainable({n: start[n] + delta[n] for n in start})
    assert loss(network, data, plan) < before - 1e-3


def test_the_proximal_term_holds_the_update_back(tiny_base: Path, tmp_path: Path) -> None:
    """FedProx (Li et al. 2020): the larger μ, the shorter the way from the round's start."""
    lengths = []
    for mu in (0.0, 1.5):
        plan = made(tiny_base, training=TRAINING | {"proximal_mu": mu})
        network = build(plan)
        start = network.initial(network.draw_factor(0))
        data = CachedDataset(network, records([1] * 8))
        delta = local_round(
            plan, data, non_private_plan(plan, 8), StepLog(tmp_path / "log"), 1, start
        )
        lengths.append(sum(float(np.square(d).sum()) for d in delta.values()))
    assert lengths[1] < 0.8 * lengths[0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_each_round_has_the_rate_of_its_schedule(
    tiny_base: Path, tmp_path: Path, schedule: str, optimizer: str
) -> None:
    """One step of either optimiser is proportional to its rate; round 1 has the plan's own."""
    settings = FAST | {"rounds": 4, "local_steps": 1, "optimizer": optimizer}
    settings |= {"learning_rate_schedule": schedule, "weight_decay": 0.0}
    plan = made(tiny_base, training=settings)
    network = build(plan)
    start = network.initial(network.draw_factor(0))
    data = CachedDataset(network, records([1] * 8))
    updates = [
        local_round(plan, data, non_private_plan(plan, 8), StepLog(tmp_path / "log"), n, start)
        for n in (1, 2, 4)
    ]
    expected = {"constant": (1, 1, 1), "linear": (1, 0.75, 0.25), "cosine": (1, 0.853553, 0.146447)}
    for update, share in zip(updates, expected[schedule], strict=True):
        for name, array in update.items():
            np.testing.assert_allclose(array, share * updates[0][name], rtol=2e-3, atol=1e-7)
    assert any(array.any() for array in updates[0].values())


def test_a_head_alone_learns_to_classify(tiny_encoder: Path, tmp_path: Path) -> None:
    plan = made(
        tiny_encoder,
        lora=None,
        objective={"name": "classify", "labels": ["x", "y"], "max_length": 64},
        training=TRAINING | {"learning_rate": 0.05},
    )
    network = build(plan)
    dataset = records([1] * 8)
    dataset.examples[:] = [
        type(e)(e.input_ids, np.full_like(e.target_ids, -100), e.unit % 2, e.unit)
        for e in dataset.examples
    ]
    data, start = CachedDataset(network, dataset), network.initial({})
    network.load_trainable(start)
    before = loss(network, data, plan)
    delta = local_round(plan, data, non_private_plan(plan, 8), StepLog(tmp_path / "log"), 1, start)
    network.load_trainable({n: start[n] + delta[n] for n in start})
    assert before == pytest.approx(float(np.log(2)))
    assert loss(network, data, plan) < before - 1e-2


@pytest.mark.parametrize("engine", ["auto", "opacus"])
def test_a_site_that_recomputes_sends_the_same_update(
    tiny_base: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opacus' hooks would give no gradient there (traps/test_trap_11_layers.py), and go without."""
    plan = made(tiny_base, training=FAST | {"engine": engine})
    network = build(plan)
    data, ran = CachedDataset(network, records([1, 2, 3])), non_private_plan(plan, 3)
    asked: list[bool] = []
    inside = network.recomputing
    monkeypatch.setattr(network, "recomputing", lambda w: asked.append(w) or inside(w))
    both = [
        local_round(plan, data, ran, StepLog(tmp_path / "log"), 1, network.trainable(), recompute)
        for recompute in (False, True)
    ]
    assert set(asked[:12]) == {False} and set(asked[12:]) == {engine == "auto"}
    for name in both[0]:
        assert np.allclose(both[0][name], both[1][name], rtol=1e-4, atol=1e-6)
