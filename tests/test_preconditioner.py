"""The public output preconditioner: the step is the one written out; no M moves anybody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedtune.core.config import Columns, LoraTable, PolicyTable, Site, SiteData, SiteTable, Study
from fedtune.core.dp import clip
from fedtune.core.dp.non_private import non_private_plan
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import ModelError
from fedtune.core.models import lora as lora_module
from fedtune.core.models import preconditioner
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays
from fedtune.core.models.network import Network
from fedtune.core.models.preconditioner import (
    LEAST,
    factor_of,
    factor_of_columns,
    identity_part,
    name_for,
    narrow_factors,
    step_adapter,
)
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training import selftest, unit_gradients
from fedtune.core.training.local_round import check_trains, local_round
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.core.vault.policy import refusals
from fedtune.server.rank_slices import pad_update
from tests.depth import long_but
from tests.dp.conftest import records, study
from tests.models.test_network import logits

SIZES = [1, 3, 2, 1, 4, 2]
C, RATE = 0.01, 100.0
LORA = {"rank": 4, "alpha": 8.0, "modules": ["q_proj", "down_proj"], "last_layers": 2}
TRAINING = {"rounds": 1, "local_steps": 3, "sampling_rate": 1.0, "learning_rate": RATE}
PUBLIC = {"path": "public.jsonl", "licence": "none", "columns": {"prompt": "p", "completion": "c"}}


def made(base: Path, **changes: Any) -> Study:
    body: dict[str, Any] = {
        "base": {"model": str(base), "dtype": "float32"},
        "lora": LORA | {"preconditioner": {"rank": 6, "damping": 0.5}},
        "public": PUBLIC,
        "training": TRAINING,
    }
    return study(**(body | changes))


def moment(size: int, seed: int = 0, spread: float = 30.0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(size, size))
    rows *= np.geomspace(spread, 1 / spread, size)
    return rows.T @ rows


def factors(network: Network, rank: int = 6) -> Arrays:
    return {
        name_for(name): factor_of(moment(len(b), seed), rank, 0.5)
        for seed, (name, b) in enumerate(network.trainable().items())
    }


def written_out(factor: np.ndarray, narrow: bool = False) -> np.ndarray:
    wide = factor.astype(np.float64)
    if narrow:
        return wide @ wide.T
    return identity_part(factor) * np.eye(len(wide)) - wide @ wide.T


def all_written_out(network: Network) -> dict[str, np.ndarray]:
    """M of each B."""
    return {
        name.replace(mark, ".lora_B."): written_out(factor, mark == ".lora_U.")
        for name, factor in network.preconditioner.items()
        for mark in (".lora_M.", ".lora_U.")
        if mark in name
    }


@pytest.fixture(params=[False, True], ids=["whole", "narrow"])
def either(network: Network, request: pytest.FixtureRequest) -> Network:
    """With a preconditioner of either form."""
    if request.param:
        network.load_frozen(network.frozen_factor() | narrow_factors(network.preconditioner))
    return network


@pytest.fixture
def network(tiny_base: Path) -> Network:
    """With a preconditioner, and an adapter away from zero."""
    network = build(made(tiny_base))
    network.load_frozen(network.draw_factor(3) | factors(network))
    draw = np.random.default_rng(1)
    network.load_trainable(
        {n: (draw.normal(size=a.shape) * 0.1).astype("f4") for n, a in network.trainable().items()}
    )
    return network


def engine_of(network: Network, engine: Any = "auto", **more: Any) -> UnitGradientEngine:
    return UnitGradientEngine(
        CachedDataset(network, records(SIZES)), CausalLM(), engine=engine, **more
    )


# ------------------------------------------------------------------------------------ what M is


def test_m_is_the_damped_inverse_root_of_the_curvature() -> None:
    curvature, damping = moment(24), 0.5
    values, vectors = np.linalg.eigh(curvature / (np.trace(curvature) / 24))
    exact = vectors @ np.diag((values + damping) ** -0.5) @ vectors.T
    exact /= np.sqrt((np.linalg.eigvalsh(exact) ** 2).mean())
    assert np.abs(written_out(factor_of(curvature, 23, damping)) - exact).max() < 1e-6
    few = written_out(factor_of(curvature, 6, damping))
    spectrum = np.linalg.eigvalsh(few)
    assert (spectrum**2).mean() == pytest.approx(1, abs=1e-6)
    assert np.allclose(few, few.T) and LEAST < spectrum.min() < 0.5 < spectrum.max() < 2
    assert np.ptp(spectrum[6:]) < 1e-6  # beyond the directions that are kept all count as one


@pytest.mark.parametrize("rank", [3, 6, 12])
def test_of_a_wide_layer_the_columns_give_the_same_m(rank: int) -> None:
    columns = np.random.default_rng(0).normal(size=(24, 9)) * np.geomspace(9, 0.1, 9)
    whole = written_out(factor_of(columns @ columns.T, rank, 0.5))
    assert np.abs(written_out(factor_of_columns(columns, rank, 0.5)) - whole).max() < 1e-5


def test_a_narrow_m_is_m_on_its_directions_alone() -> None:
    curvature = moment(24)
    wide = factor_of(curvature, 6, 0.5)
    (narrow,) = narrow_factors({"l.lora_M.w": wide}).values()
    whole, m = written_out(wide), written_out(narrow, narrow=True)
    vectors = np.linalg.eigh(curvature)[1]
    kept, others = vectors[:, -6:], vectors[:, :-6]
    assert np.abs(m @ others).max() < 1e-5
    assert (np.linalg.eigvalsh(m) ** 2).mean() == pytest.approx(1, abs=1e-5)
    scale = np.trace(kept.T @ m @ kept) / np.trace(kept.T @ whole @ kept)
    assert np.abs(m @ kept - scale * whole @ kept).max() < 1e-5 * scale


def test_public_text_without_a_gradient_is_refused() -> None:
    for broken in (np.zeros((8, 8)), np.full((8, 8), np.nan)):
        with pytest.raises(ModelError, match="are all zero, or not finite"):
            factor_of(broken, 4, 1.0)


# --------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("engine", ["auto", "opacus"])
def test_rows_are_m_times_the_rows_without_it(either: Network, engine: str) -> None:
    network = either
    rows = engine_of(network, engine).matrix(range(len(SIZES)))
    held = network.preconditioner
    with network.loaded(frozen=network.frozen_factor()):
        plain = engine_of(network, engine).matrix(range(len(SIZES)))
    assert network.preconditioner.keys() == held.keys()  # put back
    start, matrices = 0, all_written_out(network)
    for name, b in network.trainable().items():
        part = plain[:, start : start + b.size].reshape(-1, *b.shape).double().numpy()
        exact = matrices[name] @ part
        ours = rows[:, start : start + b.size].reshape(-1, *b.shape).double().numpy()
        assert np.abs(ours - exact).max() < 1e-5 * np.abs(exact).max()
        assert np.abs(ours - part).max() > 0.1 * np.abs(part).max()
        start += b.size


def test_a_round_is_the_round_written_out(either: Network, tiny_base: Path, tmp_path: Path) -> None:
    """Three steps without noise: gradients by plain autograd, M, clipping and mean in fp64, the
    adapter moved by M times the sum. The exported adapter in plain PEFT has the same logits."""
    network, bound = either, {"max_grad_norm": C, "unit": "patient"}
    plan = made(tiny_base, privacy="off", clipping=bound)
    data, given = CachedDataset(network, records(SIZES)), network.trainable()
    size = len(SIZES)
    update = local_round(
        plan, data, non_private_plan(plan, size), StepLog(tmp_path / "log"), 1, given
    )
    matrices = all_written_out(network)
    change = {name: np.zeros(b.shape) for name, b in given.items()}
    here = {name: b.astype(np.float64) for name, b in given.items()}
    for _ in range(TRAINING["local_steps"]):  # type: ignore[call-overload]
        rows = gradients(network, data, {n: a.astype(np.float32) for n, a in here.items()})
        rows = [{n: matrices[n] @ g for n, g in row.items()} for row in rows]
        norms = [np.sqrt(sum((g**2).sum() for g in row.values())) for row in rows]
        assert min(norms) > bound["max_grad_norm"]  # all are clipped
        for name in change:
            mean = sum(row[name] * (C / n) for row, n in zip(rows, norms, strict=True)) / size
            change[name] -= RATE * mean
            here[name] = given[name] + matrices[name] @ change[name]
    for name, exact in change.items():
        assert np.abs(update[name] - exact).max() < 2e-4 * np.abs(exact).max()
    adapter = step_adapter(
        lambda adapter: {n: a + update[n] for n, a in adapter.items()},
        given,
        network.preconditioner,
    )
    for name, exact in here.items():
        moved = np.abs(exact - given[name]).max()
        assert np.abs(adapter[name] - exact).max() < 2e-4 * moved
    _in_plain_peft(network, adapter, tiny_base, tmp_path / "adapter")


def gradients(
    network: Network, data: CachedDataset, adapter: Arrays
) -> list[dict[str, np.ndarray]]:
    """By unit: the mean of its records' gradients, one record at a time."""
    named = network.parameters()
    rows: list[dict[str, np.ndarray]] = []
    with network.loaded(trainable=adapter):
        for members in data.dataset.by_unit:
            total = {name: np.zeros(tuple(p.shape)) for name, p in named.items()}
            for index in members:
                (batch,) = data.batches([index])
                loss = CausalLM().losses(network, batch).sum()
                for name, g in zip(
                    named, torch.autograd.grad(loss, [*named.values()]), strict=True
                ):
                    total[name] += g.double().numpy() / len(members)
            rows.append(total)
    return rows


def _in_plain_peft(network: Network, adapter: Arrays, base: Path, folder: Path) -> None:
    ids = torch.randint(3, 280, (2, 17), generator=torch.Generator().manual_seed(0))
    with network.loaded(trainable=adapter):
        ours = logits(network, ids)
        network.save(folder)
    assert not [
        name for name in load_file(folder / "adapter_model.safetensors") if "lora_M" in name
    ]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        assert (plain(ids).logits - ours).abs().max() < 1e-5


def test_a_site_of_fewer_ranks_sends_columns_of_the_whole_update(
    network: Network, tiny_base: Path, tmp_path: Path
) -> None:
    plan = made(tiny_base, privacy="off", training=TRAINING | {"local_steps": 1}, clipping=None)
    data, given, ran = CachedDataset(network, records(SIZES)), network.trainable(), []
    for columns in (slice(None), slice(1, 3)):
        log = StepLog(tmp_path / f"log-{columns.start}")
        steps = non_private_plan(plan, len(SIZES))
        ran.append(local_round(plan, data, steps, log, 1, given, columns=columns))
    whole, some = ran
    for name, padded in pad_update(some, given, slice(1, 3)).items():
        assert np.abs(padded[:, 1:3] - whole[name][:, 1:3]).max() < 1e-5 * np.abs(whole[name]).max()
        assert not padded[:, [0, 3]].any()


# ------------------------------------------------------------------------------------ whom it moves


def update_of(network: Network, plan: Study, sizes: list[int], tmp_path: Path) -> np.ndarray:
    """One step with noise that vanishes, times divisor over rate: the clipped sum as it is sent."""
    site = plan_for_site(plan, 100)
    data, log = CachedDataset(network, records(sizes)), StepLog(tmp_path / f"{len(sizes)}")
    sent = local_round(plan, data, site, log, 1, network.trainable())
    return np.concatenate([a.ravel() for a in sent.values()]) * site.divisor / RATE


def check_that_the_last_unit_moves_c(network: Network, tiny_base: Path, tmp_path: Path) -> None:
    """The update with the last unit and without differ by C, but for the noise."""
    privacy = {"noise_multiplier": 1e-3, "delta": 1e-5, "unit": "patient"}
    plan = made(
        tiny_base, privacy=privacy, clipping={"max_grad_norm": C},
        training=TRAINING | {"local_steps": 1},
    )  # fmt: skip
    noise = np.sqrt(2 * sum(a.size for a in network.trainable().values())) * 1e-3 * C
    with_it = update_of(network, plan, SIZES, tmp_path)
    without = update_of(network, plan, SIZES[:-1], tmp_path)
    moved = float(np.linalg.norm(with_it - without))
    assert 0.95 * C < moved < 1.05 * np.hypot(C, noise)


def test_what_leaves_is_clipped_after_m(network: Network, tiny_base: Path, tmp_path: Path) -> None:
    """One unit less moves what is sent by at most C: M comes before the clip, and not after it. M
    is one that lengthens all that this unit has, by b = 1.3 or so."""
    data = CachedDataset(network, records(SIZES))
    crafted = {}
    for name, gradient in gradients(network, data, network.trainable())[-1].items():
        outputs = len(gradient)
        draw = np.random.default_rng(0).normal(size=(outputs, outputs // 2))
        own, _ = np.linalg.qr(gradient)
        others, _ = np.linalg.qr(draw - own @ (own.T @ draw))
        crafted[name_for(name)] = (1.1 * others).astype(np.float32)
        assert identity_part(crafted[name_for(name)]) > 1.25
    network.load_frozen(network.frozen_factor() | crafted)
    check_that_the_last_unit_moves_c(network, tiny_base, tmp_path)


def test_what_leaves_is_clipped_after_a_narrow_m(
    network: Network, tiny_base: Path, tmp_path: Path
) -> None:
    """M has an eigenvalue of 3 or so, on all that one unit has."""
    data, crafted = CachedDataset(network, records(SIZES)), {}
    for name, gradient in gradients(network, data, network.trainable())[-1].items():
        own, _ = np.linalg.qr(gradient)
        directions = own[:, :4] * (len(gradient) / 4) ** 0.25
        crafted[name_for(name, narrow=True)] = directions.astype(np.float32)
    network.load_frozen(network.frozen_factor() | crafted)
    assert min(np.linalg.eigvalsh(m).max() for m in all_written_out(network).values()) > 2
    check_that_the_last_unit_moves_c(network, tiny_base, tmp_path)


def test_m_does_not_follow_from_who_is_there(either: Network) -> None:
    network = either
    fewer = UnitGradientEngine(CachedDataset(network, records(SIZES[:-1])), CausalLM())
    some = range(len(SIZES) - 1)
    assert torch.equal(fewer.matrix(some), engine_of(network).matrix(some))


@pytest.mark.parametrize("condition", [1e8, 1e30])
def test_an_m_of_any_condition_moves_nobody_else(
    network: Network, condition: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even an M that no site admits: every other row is the same to the last bit, and no clipped
    row is longer than C."""
    crafted = {}
    for name, b in network.trainable().items():
        wide = np.zeros((len(b), 6), np.float32)
        wide[:6] = np.diag(np.geomspace(1e-4, np.sqrt(condition), 6))
        crafted[name_for(name)] = wide
    monkeypatch.setattr(network, "preconditioner", crafted)
    monkeypatch.setattr(preconditioner, "identity_part", lambda factor: 1.0)
    everybody = engine_of(network).matrix(range(len(SIZES)))
    for alone in range(len(SIZES)):
        (row,) = engine_of(network).matrix([alone])
        assert torch.equal(row, everybody[alone])
    clipped = clip.clip(everybody, 0.5)
    assert torch.linalg.vector_norm(clipped, dim=1).max() <= 0.5


def bad(network: Network, change: Any) -> Arrays:
    found = factors(network)
    name = next(iter(found))
    found[name] = change(found[name])
    return found


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda w: w * 100, id="too large"),
        pytest.param(lambda w: w * 1e18, id="overflows"),
        pytest.param(lambda w: np.full_like(w, np.nan), id="not a number"),
        pytest.param(lambda w: np.full_like(w, np.inf), id="infinite"),
        pytest.param(lambda w: w[:, :-1], id="fewer directions"),
        pytest.param(lambda w: w[:-1], id="of another layer"),
        pytest.param(
            lambda w: np.eye(*w.shape, dtype=np.float32) * 1.13, id="an eigenvalue near zero"
        ),
    ],
)
def test_what_a_hostile_coordinator_sends_is_refused(
    network: Network, tiny_base: Path, change: Any
) -> None:
    with pytest.raises(ModelError, match="preconditioner"):
        network.adopt(made(tiny_base), bad(network, change))
    assert network.preconditioner == {}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda u: u * 10, id="too large"),
        pytest.param(lambda u: u * 1e18, id="overflows"),
        pytest.param(lambda u: u * 0, id="nothing"),
        pytest.param(lambda u: np.full_like(u, np.nan), id="not a number"),
        pytest.param(lambda u: u[:, :-1], id="fewer directions"),
        pytest.param(lambda u: u[:-1], id="of another layer"),
    ],
)
def test_a_hostile_narrow_one_is_refused(network: Network, tiny_base: Path, change: Any) -> None:
    plan = made(tiny_base, lora=LORA | {"preconditioner": {"rank": 6, "narrow": True}})
    sent = narrow_factors(factors(network))
    network.adopt(plan, sent)
    assert network.preconditioner.keys() == sent.keys()
    name = next(iter(sent))
    with pytest.raises(ModelError, match="preconditioner"):
        network.adopt(plan, sent | {name: change(sent[name])})
    for asked, other in ((plan, factors(network)), (made(tiny_base), sent)):
        with pytest.raises(ModelError, match="preconditioner"):  # of the other form
            network.adopt(asked, other)


def test_the_digest_binds_it(network: Network, tiny_base: Path) -> None:
    sent = factors(network)
    table = {"rank": 6, "digest": lora_module.digest(sent)}
    plan = made(tiny_base, lora=LORA | {"preconditioner": table})
    adopted = network.adopt(plan, sent)
    assert network.preconditioner.keys() == sent.keys() <= adopted.keys()
    for other in (bad(network, lambda w: w * 0.9), {}):
        with pytest.raises(ModelError, match="preconditioner"):
            network.adopt(plan, other)
    network.adopt(made(tiny_base, lora=LORA), sent)  # a plan without one takes none
    assert network.preconditioner == {}


def test_a_site_takes_no_plan_that_leaves_it_open(tiny_base: Path) -> None:
    site = Site(
        site=SiteTable(name="a", declared_size=20),
        data=SiteData(path="a.jsonl", columns=Columns(prompt="q", completion="a")),
        policy=PolicyTable(bases="any"),
    )
    words = "the plan does not pin lora.preconditioner.digest"
    plan = made(tiny_base)
    assert words in [str(refusal) for refusal in refusals(plan, site, None)]
    pinned = {"rank": 6, "digest": "sha256:" + "0" * 64}
    plan = made(tiny_base, lora=LORA | {"preconditioner": pinned})
    assert words not in [str(refusal) for refusal in refusals(plan, site, None)]
    wide = made(tiny_base, lora=LORA | {"preconditioner": pinned | {"rank": 65}})
    said = [
        str(r)
        for r in refusals(wide, site, None)
        if str(r) not in map(str, refusals(plan, site, None))
    ]
    assert len(said) == 1 and "lora.preconditioner.rank" in said[0] and "max_rank" in said[0]


def test_an_eigenvalue_that_b_takes_below_the_bound_is_seen() -> None:
    for weight in (0.2, 0.9, 1.0):
        factor = np.zeros((50, 1), np.float32)
        factor[0] = np.sqrt(weight)
        b = identity_part(factor)
        assert ((b - weight) ** 2 + 49 * b**2) / 50 == pytest.approx(1)
    factor[0] = np.sqrt(1.01)
    with pytest.raises(ModelError):
        identity_part(factor)
    with pytest.raises(ModelError):
        identity_part(np.zeros((4, 4), np.float32))  # as many directions as outputs


# ------------------------------------------------------------------------------------ the self-test


@pytest.mark.parametrize("narrow", long_but([True], [False, True]))
def test_the_self_test_runs_with_it(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    table = {"rank": 6, "damping": 0.5, "narrow": narrow}
    plan = made(tiny_base, lora=LORA | {"preconditioner": table})
    results = {r.name: r for r in selftest.run(plan)}
    assert all(r.passed for r in results.values()), results
    monkeypatch.setattr(unit_gradients._Factor, "__call__", lambda self, gradient: gradient)
    results = {r.name: r for r in selftest.run(plan)}
    assert not results["parity"].passed  # twin


def test_a_step_with_it_learns(network: Network, tiny_base: Path) -> None:
    check_trains(made(tiny_base), network)


def test_weight_decay_and_missing_text_are_refused(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        made(tiny_base, training=TRAINING | {"weight_decay": 0.1})
    with pytest.raises(ValueError, match="public"):
        made(tiny_base, public=None)
    assert LoraTable().preconditioner is None
    assert "preconditioner" not in LoraTable().model_dump()  # digests of other plans stay
