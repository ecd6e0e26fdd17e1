"""Sites that train fewer ranks of one adapter: the mean is exact, each keeps the guarantee on what
it trains, and a plan or a site says no in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fedtune.core.training.local_round
import fedtune.core.vault.worker
from fedtune.core.config import load_study
from fedtune.core.dp import clip
from fedtune.core.dp.non_private import non_private_plan
from fedtune.core.dp.steplog import StepLog
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.rank_slice import ALL
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training import selftest, unit_gradients
from fedtune.core.training.local_round import local_round
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.officer.site_files import sites_in
from tests import chance
from tests.depth import long_but
from tests.dp.conftest import make_plan, records, study
from tests.lora_ranks_kit import LORA, RANKS, lay_out
from tests.simulated import simulate

pytestmark = pytest.mark.usefixtures("no_worker_is_left")

ENGINES = ("auto", "opacus")


def dense(b: np.ndarray, a: np.ndarray, scale: float) -> np.ndarray:
    """What one layer's weights change by, fp64: columns of B on as many rows of A."""
    return scale * b.astype(np.float64) @ a[: b.shape[1]].astype(np.float64)


def test_the_released_change_is_the_weighted_mean_of_the_sites_own(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ = 0, ranks 8, 4 and 2, over a whole study in two rounds: each layer's ΔW is Σ over rounds
    of the weighted mean of what each site alone would add to the weights."""
    plan = lay_out(tmp_path, tiny_base)
    sent: list[tuple[dict[str, np.ndarray], slice]] = []

    def kept(*arguments: Any) -> dict[str, np.ndarray]:
        sent.append((local_round(*arguments), arguments[7]))  # the columns
        return sent[-1][0]

    monkeypatch.setattr(fedtune.core.vault.worker, "local_round", kept)
    simulate(plan, sites_in(tmp_path), tmp_path / "run")
    lora = load_study(plan).lora
    assert lora is not None and lora.scaling == 1.5
    arrays = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    blocks = [range(8)[columns] for _, columns in sent]  # in the order of answers
    assert {*blocks[:3]} == {range(8), range(4), range(2)}
    assert {*blocks[3:]} == {range(8), range(4, 8), range(2, 4)}
    weights = [{8: 20, 4: 30, 2: 40}[len(block)] for block in blocks]  # as declared
    for name in (n for n in arrays if "lora_B" in n):
        a = arrays[name.replace("lora_B", "lora_A")]
        inner = name.replace("lora_B", "lora_B.default")
        ours = dense(arrays[name], a, lora.scaling)
        each = [dense(update[inner], a[columns], lora.scaling) for update, columns in sent]
        assert all(np.abs(change).max() > 1e-4 for change in each)
        mean = sum(w * c for w, c in zip(weights, each, strict=True)) / 90
        assert np.abs(ours - mean).max() <= 1e-6 * np.abs(mean).max()
        # Twins: a site's own scale α/k; its columns on the first rows of A; sites alike; the mean
        # of those who train a column.
        scaled = [dense(u[inner], a[columns], 12.0 / u[inner].shape[1]) for u, columns in sent]
        first = [dense(u[inner], a, lora.scaling) for u, _ in sent]
        wrong = [sum(w * c for w, c in zip(weights, e, strict=True)) / 90 for e in (scaled, first)]
        wrong.append(sum(each) / 3)
        among = np.zeros_like(mean)
        for at in (0, 3):
            total, count = np.zeros_like(arrays[name], np.float64), np.zeros(8)
            for weight, (update, columns) in [*zip(weights, sent, strict=True)][at : at + 3]:
                total[:, columns] += weight * update[inner]
                count[columns] += weight
            among += dense(total / count, a, lora.scaling)
        wrong.append(among)
        for other in wrong:
            assert np.abs(ours - other).max() > 1e-2 * np.abs(mean).max()


def test_with_a_trained_a_no_mean_of_factors_would_be_exact() -> None:
    """Why such a plan is refused: the same sum, with A of their own, is off by far."""
    draw = np.random.default_rng(0)
    b = [draw.normal(size=(6, k)) for k in (8, 4, 2)]
    a = [draw.normal(size=(k, 5)) for k in (8, 4, 2)]
    mean = sum(x @ y for x, y in zip(b, a, strict=True)) / 3
    padded_b = sum(np.pad(x, ((0, 0), (0, 8 - x.shape[1]))) for x in b) / 3
    padded_a = sum(np.pad(y, ((0, 8 - len(y)), (0, 0))) for y in a) / 3
    assert np.abs(padded_b @ padded_a - mean).max() > 0.5 * np.abs(mean).max()


@pytest.mark.long  # by default: of one rank (tests/flower/test_pool.py)
def test_processes_give_the_same_adapter(tmp_path: Path, tiny_base: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        plan = lay_out(folder, tiny_base)
        body = simulate(plan, sites_in(folder), folder / "run", processes=processes)
        found.append(load_file(folder / "run" / "adapter" / "adapter_model.safetensors"))
        assert body["lora_ranks"]["sites"] == RANKS
        up = body["rounds"][-1]["bytes_up"]
        fewer = [up["north"] - up["south"], up["south"] - up["west"]]
        rows = sum(len(a) for n, a in found[-1].items() if "lora_B" in n)
        assert fewer == pytest.approx([4 * 4 * rows, 2 * 4 * rows], abs=16)  # fp32 columns
    assert all(np.abs(found[0][n] - found[1][n]).max() <= 1e-6 for n in found[0])


@pytest.fixture(scope="module")
def network(tiny_base: Path) -> Network:
    plan = study(base={"model": str(tiny_base), "dtype": "float32"}, lora=LORA)
    made = build(plan)
    draw = np.random.default_rng(1)
    given = {n: draw.normal(size=a.shape) * 0.1 for n, a in made.trainable().items()}
    made.load_trainable({n: a.astype(np.float32) for n, a in given.items()})
    return made


def engine_of(network: Network, wanted: Any, columns: slice) -> UnitGradientEngine:
    data = CachedDataset(network, records([1, 3, 2, 1, 4, 2]))
    return UnitGradientEngine(data, CausalLM(), engine=wanted, columns=columns)


@pytest.mark.parametrize("wanted", ENGINES)
@pytest.mark.parametrize("columns", [slice(0, 1), slice(5, 8), slice(0, 8)])
def test_rows_are_columns_of_the_whole_rows(network: Network, wanted: Any, columns: slice) -> None:
    whole, part = engine_of(network, wanted, ALL), engine_of(network, wanted, columns)
    units = range(6)
    pieces = torch.split(whole.matrix(units), [p.numel() for p in whole.parameters], dim=1)
    cut = [
        piece.view(6, *p.shape)[:, :, columns].flatten(1)
        for piece, p in zip(pieces, whole.parameters, strict=True)
    ]
    expected, found = torch.cat(cut, dim=1), part.matrix(units)
    width = columns.stop - columns.start
    assert found.shape == (6, part.dimension) == (6, whole.dimension * width // 8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_columns_that_are_not_trained_are_wiped() -> None:
    each = torch.ones(1, 1, 4)  # of one record and one output: a slice of it would be a view
    kept = unit_gradients._slice_columns(each, 2, slice(1, 3))
    assert kept.tolist() == [[[1.0, 1.0]]] and not each.any()


@pytest.mark.parametrize("mode", ["flat", "normalised"])
@pytest.mark.parametrize("wanted", ENGINES)
def test_removing_any_unit_moves_the_sum_by_at_most_c_and_all_of_c_is_its_own_columns(
    network: Network, mode: Any, wanted: Any
) -> None:
    """A unit is clipped over what its site trains: were it clipped over all columns, the part that
    is sent would be shorter than C though every gradient here is far longer."""
    c, grid = 1e-5, clip.grid_for(1e-5)
    engine = engine_of(network, wanted, slice(4, 6))

    def summed(units: list[int]) -> torch.Tensor:
        total = torch.zeros(engine.dimension, dtype=torch.int64)
        for chunk in engine(units):
            clip.add_clipped(total, chunk, grid, c, mode, gamma=1e-9)
        return total

    whole = summed(list(range(6)))
    for gone in range(6):
        moved = float((whole - summed([u for u in range(6) if u != gone])).double().norm()) * grid
        assert moved <= clip.sensitivity(c, engine.dimension, grid) + 1e-9
        assert moved >= 0.99 * c


@pytest.mark.parametrize("wanted", long_but(["auto"], ENGINES))
def test_the_sites_self_test_passes_and_is_tight_at_its_own_rank(
    tiny_base: Path, wanted: Any
) -> None:
    plan = study(
        base={"model": str(tiny_base)},
        lora=LORA,
        training={"rounds": 4, "sampling_rate": 1.0, "learning_rate": 0.1, "engine": wanted},
        privacy={"noise_multiplier": 1.6, "delta": 1e-4, "unit": "patient"},
    )
    results = selftest.run(plan, lora_rank=2)
    assert [r.name for r in results if r.passed] == ["parity", "isolation", "sensitivity", "noise"]
    assert results[2].figure == pytest.approx(1.0, abs=1e-5)


def test_the_self_test_catches_other_columns(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the first columns' gradients, which the site's own would be moved by."""
    plan = study(
        base={"model": str(tiny_base)},
        lora=LORA,
        training={"rounds": 4, "sampling_rate": 1.0, "learning_rate": 0.1, "engine": "opacus"},
        privacy={"noise_multiplier": 1.6, "delta": 1e-4},
    )
    first = lambda each, width, _: each[..., :width].clone()  # noqa: E731
    monkeypatch.setattr(unit_gradients, "_slice_columns", first)
    failed = [r.name for r in selftest.run(plan, lora_rank=2) if not r.passed]
    assert failed == ["parity"]


def test_noise_is_full_on_every_number_that_the_site_trains(
    network: Network, tmp_path: Path
) -> None:
    """Nobody is drawn: what is sent is the noise alone, σC/D on each number of two columns."""
    plan = study(
        base={"model": str(network.base.path), "dtype": "float32"},
        lora=LORA,
        training={"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
    )
    data, given = CachedDataset(network, records([])), network.trainable()
    trained = sum(a.shape[0] * 2 for a in given.values())
    all_of_it = chance.spread_for(0.98, 1.02)  # as if it were divided among fewer or more columns
    rounds = math.ceil(all_of_it.draws / trained)
    each = chance.spread_of(rounds, figures=2 * trained)
    assert max(each.missed(0.5), each.missed(2.0)) <= chance.MISSED
    ran = make_plan(noise_multiplier=3.0, max_grad_norm=0.5, divisor=6.0, rounds=rounds)
    log = StepLog(tmp_path / "log")
    turns = range(1, rounds + 1)
    drawn = [local_round(plan, data, ran, log, n, given, False, slice(3, 5)) for n in turns]
    assert {n: a.shape for n, a in drawn[0].items()} == {
        n: (a.shape[0], 2) for n, a in given.items()
    }
    numbers = np.stack([np.concatenate([u[n].ravel() for n in sorted(u)]) for u in drawn])
    scaled = numbers / (3.0 * 0.5 / 6.0)
    whole = chance.spread_of(scaled.size, figures=2)
    assert whole.holds(math.sqrt(np.mean(scaled**2)))
    assert all(each.holds(one) for one in np.sqrt(np.mean(scaled**2, axis=0)))
    assert len(log.steps()) == rounds


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_nothing_moves_the_columns_that_a_site_does_not_train(
    network: Network, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weight decay nor the proximal term, over several steps."""
    training = {"rounds": 1, "local_steps": 3, "sampling_rate": 1.0, "learning_rate": 0.1}
    plan = study(
        base={"model": str(network.base.path), "dtype": "float32"},
        lora=LORA,
        training=training | {"optimizer": optimizer, "weight_decay": 0.5, "proximal_mu": 0.5},
        privacy="off",
        clipping=None,
    )
    given, left = network.trainable(), list[dict[str, np.ndarray]]()
    load = network.load_trainable

    def watched(arrays: dict[str, np.ndarray]) -> None:
        left.append(network.trainable())
        load(arrays)

    monkeypatch.setattr(network, "load_trainable", watched)
    data = CachedDataset(network, records([1] * 4))
    log = StepLog(tmp_path / "log")
    local_round(plan, data, non_private_plan(plan, 4), log, 1, given, False, slice(2, 5))
    for name, trained in left[-1].items():  # as the round left the network, before it is put back
        delta = trained - given[name]
        assert (np.abs(delta[:, 2:5]).max(axis=0) > 0).all()
        assert not delta[:, :2].any() and not delta[:, 5:].any()
