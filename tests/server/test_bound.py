"""The norm bound: no honest update is dropped, a longer one is, and how tight it is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from fedtune.core.dp.calibration import resolve
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.dp.steplog import StepLog
from fedtune.core.wire import seal
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.codec import encode
from fedtune.core.wire.keys import SigningKey
from fedtune.flower.records import to_record
from fedtune.server.admission import Outcome, outcome
from fedtune.server.bound import ROWS, norm_bound, terms
from fedtune.server.exchange import Reply
from tests.server.fakes import make_study

# name -> (d, declared size, q, C, training options, ratio of the bound to an honest median)
Setting = tuple[int, int, float, float, dict[str, Any], float]
SETTINGS: dict[str, Setting] = {
    "noise leads": (20_000, 200, 0.25, 1.0, {}, 1.5),
    "noise leads, four steps": (20_000, 200, 0.25, 0.5, {"local_steps": 4}, 2.5),
    "an adapter's size": (300_000, 200, 0.25, 1.0, {}, 1.1),
    "every unit, every step": (5_000, 60, 1.0, 1.0, {"learning_rate": 0.3}, 1.8),
    "decay and proximal term": (
        *(5_000, 400, 0.1, 1.0),
        {"local_steps": 5, "weight_decay": 0.1, "proximal_mu": 0.5, "learning_rate": 0.5},
        4.0,
    ),
    "few numbers, many units": (50, 5_000, 0.2, 1.0, {"local_steps": 2}, 25.0),  # clipping leads
}


def study_of(q: float, clip: float, changes: dict[str, Any]) -> Any:
    study = make_study()
    training = {"sampling_rate": q, "learning_rate": 1.0, **changes}
    update = {
        "training": study.training.model_copy(update=training),
        "clipping": study.clipping.model_copy(update={"max_grad_norm": clip}),
    }
    return study.model_copy(update=update)


def honest(study: Any, n: int, start: np.ndarray, share: float, rng: Any) -> np.ndarray:
    """One honest update, simulated: every sampled row points the same way with norm share · C."""
    t, d = study.training, start.size
    sigma, clip = study.privacy.noise_multiplier, study.clipping.max_grad_norm
    weights = start.copy()
    way = np.ones(d) / math.sqrt(d)
    for _ in range(t.local_steps):
        rows = rng.binomial(n, t.sampling_rate)
        noise = rng.standard_normal(d, dtype=np.float32) * (sigma * clip)
        gradient = (rows * share * clip * way + noise) / (t.sampling_rate * n)
        gradient += t.weight_decay * weights + t.proximal_mu * (weights - start)
        weights = weights - t.learning_rate * gradient
    return weights - start


@pytest.mark.parametrize("name", SETTINGS)
def test_no_honest_update_is_longer_and_the_bound_is_near(name: str):
    """10⁴ updates over the settings, half of them with every gradient aligned at the full norm C
    (worse than any real record), half with a tenth of it. The ratio is to the latter's median."""
    d, n, q, clip, changes, tight = SETTINGS[name]
    study, rng = study_of(q, clip, changes), np.random.default_rng(1)
    start = rng.standard_normal(d) * 0.02
    site = terms(study, resolve(study, n), n)
    bound = norm_bound(study, site, d, float(np.linalg.norm(start)))
    count = max(20, min(2_000, 8_000_000 // d))
    found = {
        share: [float(np.linalg.norm(honest(study, n, start, share, rng))) for _ in range(count)]
        for share in (1.0, 0.1)
    }
    assert max(found[1.0]) < bound
    ratio = bound / float(np.median(found[0.1]))
    print(f"{name}: bound / median of honest updates = {ratio:.2f}")
    assert ratio < tight


def test_a_site_twice_its_declared_size_still_passes():
    study, rng = study_of(0.25, 1.0, {}), np.random.default_rng(2)
    start = np.zeros(50)
    bound = norm_bound(study, terms(study, resolve(study, 500), 500), 50, 0.0)
    for _ in range(500):
        crowd = honest(study, ROWS * 500, start, 1.0, rng) * ROWS  # divided by the declared size
        assert np.linalg.norm(crowd) < bound


def test_the_real_plan_keeps_to_it(tmp_path):
    """The divisor, the rate and the noise of fedtune.core.dp.plan, not of this file."""
    study = study_of(0.25, 1.0, {"local_steps": 3})
    d, n = 4_000, 100
    plan, log = plan_for_site(study, n), StepLog(tmp_path / "steps.jsonl")
    site = terms(study, resolve(study, n), n)
    assert (site.divisor, site.steps, site.records) == (plan.divisor, plan.steps, plan.records)
    bound = norm_bound(study, site, d, 0.0)
    rows = torch.ones(n, d)  # clipped to C, all in one direction
    norms = []
    for _ in range(40):
        steps = [
            plan.step(n, d, lambda some: iter([Chunk(some, [rows[some]])]), log, 1)
            for _ in range(3)
        ]
        norms.append(float(torch.stack(steps).sum(0).norm()))
    assert max(norms) < bound < 3 * float(np.median(norms))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_keeps_to_it_whatever_the_gradients(decay: float):
    changes = {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": decay}
    for steps in (1, 2, 7, 40):
        study = study_of(0.25, 1.0, {**changes, "local_steps": steps})
        d, rng = 300, np.random.default_rng(steps)
        start = rng.standard_normal(d).astype(np.float32)
        site = terms(study, resolve(study, 100), 100)
        bound = norm_bound(study, site, d, float(np.linalg.norm(start)))
        noise = [rng.standard_normal(d) for _ in range(steps)]
        growing = [np.full(d, 30.0**k) for k in range(min(steps, 12))]
        late = [*([np.full(d, 1e-6)] * (steps - 1)), np.ones(d)]
        worst = 0.0
        for gradients in (noise, growing, late, [np.ones(d)] * steps):
            weights = torch.nn.Parameter(torch.tensor(start))
            optimizer = torch.optim.AdamW([weights], lr=0.01, weight_decay=decay)
            for gradient in gradients:
                weights.grad = torch.tensor(gradient, dtype=torch.float32)
                optimizer.step()
            worst = max(worst, float((weights.detach() - torch.tensor(start)).norm()))
        assert worst < bound
        if not decay:
            assert bound < 4 * worst


# ------------------------------------------------------------------------- at the coordinator


def judged(study: Any, update: np.ndarray, n: int, longest: float | None = None) -> Outcome:
    """What the coordinator makes of this update, sealed by an honest site."""
    key, record = SigningKey(), to_record(encode({"w": update}, "float32"))
    site = terms(study, resolve(study, n), n)
    event = {
        "sigma": site.noise_multiplier, "q": site.sampling_rate, "records": site.records,
        "max_grad_norm": site.max_grad_norm, "steps": 1,
    }  # fmt: skip
    said = {"name": "a", "status": "trained", "events": str([event]).replace("'", '"')}
    header = seal.Header(
        study.digest,
        1,
        "",
        "a",
        "0" * 64,
        "n",
        seal.body_digest(bodies(record), said),
        {"token": "00"},
    )
    content = {"update": record, "site": said | seal.seal(key, header)}
    content["site"] = ConfigRecord(content["site"])
    bound = norm_bound(study, site, update.size, 0.0) if longest is None else longest
    return outcome(
        Reply(2, RecordDict(content)), {"w": np.zeros(update.size, np.float32)}, True, [],
        key.public, replace(header, body=""), terms=site, longest=bound,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["noise leads", "every unit, every step"])
def test_an_honest_update_is_taken_and_a_longer_one_dropped(name: str):
    d, n, q, clip, changes, _ = SETTINGS[name]
    study, rng = study_of(q, clip, changes), np.random.default_rng(3)
    update = honest(study, n, np.zeros(d), 0.1, rng)
    bound = norm_bound(study, terms(study, resolve(study, n), n), d, 0.0)
    assert judged(study, update, n).status == "trained"
    for longer in (update * 10, update * (3 * bound / np.linalg.norm(update))):
        got = judged(study, longer, n)
        assert got.status == "dropped" and "is longer" in got.reason
        assert judged(study, longer, n, longest=math.inf).status == "trained"  # the twin
