"""Sites that train fewer ranks of one adapter: the mean is exact, each keeps the guarantee on what
it trains, and a plan or a site says no in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fedtune.client.site
import fedtune.training.local_round
from fedtune.audit import selftest
from fedtune.client.policy import refusals
from fedtune.client.review import review
from fedtune.client.site import SiteWorker
from fedtune.client.site import worker as worker_of
from fedtune.config import LoraTable, Study, load_site, load_study
from fedtune.config.sites import sites_in
from fedtune.dp import clip
from fedtune.dp.non_private import plain_plan
from fedtune.dp.plan import plan_for_site
from fedtune.dp.steplog import StepLog
from fedtune.errors import ConfigError, PolicyRefused
from fedtune.launch.simulate import simulate
from fedtune.ledger.ledger import Ledger
from fedtune.models.cache import CachedDataset
from fedtune.models.network import Network, build
from fedtune.models.rank_slice import ALL, rank_slice, slice_update, trained_slice
from fedtune.models.start import start
from fedtune.objectives.causal_lm import CausalLM
from fedtune.strategies import build as strategy_of
from fedtune.training import unit_gradients
from fedtune.training.local_round import local_round
from fedtune.training.unit_gradients import UnitGradientEngine
from fedtune.wire.codec import layout, shapes
from tests.client.test_site import make_site, notes
from tests.dp.conftest import make_plan, records, study

RANKS = {"north": 8, "south": 4, "west": 2}
ENGINES = ("auto", "opacus")
LORA = {"rank": 8, "alpha": 12.0, "modules": ["q_proj", "down_proj"], "min_rank": 2}

STUDY = """
privacy = "off"
[study]
name = "ranks"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 8
min_rank = 2
alpha = 12
modules = ["q_proj", "down_proj"]
last_layers = 2
[objective]
name = "causal_lm"
max_length = 64
[training]
rounds = 2
local_steps = 2
sampling_rate = 1.0
optimizer = "adamw"
weight_decay = 0.1
learning_rate = 0.05
[clipping]
max_grad_norm = 0.5
unit = "patient"
[strategy]
weights = "declared"
min_sites = 3
round_timeout = 120
[wire]
update = "float32"
adapter = "float32"
"""
SITE = """
[site]
name = "{name}"
declared_size = {size}
state = "state-{name}"
{rank}
[data]
path = "{name}.jsonl"
columns = {{ prompt = "q", completion = "a", patient = "who" }}
[policy]
bases = "any"
allow_privacy_off = true
"""


def lay_out(folder: Path, base: Path, ranks: dict[str, int] = RANKS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for at, (name, rank) in enumerate(ranks.items()):
        rows = [
            {"who": str(n // 2), "q": f"{name}: fever on day {7 * n + at}", "a": "yn"[n % 2]}
            for n in range(16)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        line = f"lora_rank = {rank}" if rank < 8 else ""
        text = SITE.format(name=name, size=20 + 10 * at, rank=line)
        (folder / f"site-{name}.toml").write_text(text)
    (folder / "study.toml").write_text(STUDY.format(base=base))
    return folder / "study.toml"


# ------------------------------------------------------------------------------- it is exact


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
        sent.append((local_round(*arguments), arguments[-1]))
        return sent[-1][0]

    monkeypatch.setattr(fedtune.client.site, "local_round", kept)
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


# ------------------------------------------------------------------- the guarantee at one site


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
    kept = unit_gradients._cut(each, 2, slice(1, 3))
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


@pytest.mark.parametrize("wanted", ENGINES)
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
    monkeypatch.setattr(unit_gradients, "_cut", first)
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
    ran = make_plan(noise_multiplier=3.0, max_grad_norm=0.5, divisor=6.0, rounds=40)
    log = StepLog(tmp_path / "log")
    drawn = [local_round(plan, data, ran, log, n, given, False, slice(3, 5)) for n in range(1, 41)]
    assert {n: a.shape for n, a in drawn[0].items()} == {
        n: (a.shape[0], 2) for n, a in given.items()
    }
    numbers = np.stack([np.concatenate([u[n].ravel() for n in sorted(u)]) for u in drawn])
    std = 3.0 * 0.5 / 6.0
    assert np.std(numbers) == pytest.approx(std, rel=0.02)
    assert np.abs(numbers.std(axis=0) / std - 1).max() < 0.6  # 40 draws of each number
    assert len(log.steps()) == 40


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
    seen: list[dict[str, np.ndarray]] = []

    def watched(arrays: dict[str, np.ndarray], columns: slice) -> dict[str, np.ndarray]:
        seen.append(arrays)
        return slice_update(arrays, columns)

    monkeypatch.setattr(fedtune.training.local_round, "narrowed", watched)
    data = CachedDataset(network, records([1] * 4))
    log = StepLog(tmp_path / "log")
    local_round(plan, data, plain_plan(plan, 4), log, 1, network.trainable(), False, slice(2, 5))
    for delta in seen[0].values():
        assert (np.abs(delta[:, 2:5]).max(axis=0) > 0).all()
        assert not delta[:, :2].any() and not delta[:, 5:].any()


# ------------------------------------------------------------------------- plans and policies


def plan_of(base: Path, **lora: object) -> Study:
    return study(base={"model": str(base), "dtype": "float32"}, lora=LORA | lora)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"min_rank": 9}, "at most rank"),
        ({"train": "AB"}, "mean of the sites' B·A is not the product"),
    ],
)
def test_a_plan_that_cannot_be_exact_is_no_plan(lora: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoraTable.model_validate(LORA | lora, strict=False)


def test_the_study_file_names_the_key(tmp_path: Path, tiny_base: Path) -> None:
    plan = lay_out(tmp_path, tiny_base)
    plan.write_text(plan.read_text().replace("min_rank = 2", 'min_rank = 2\ntrain = "AB"'))
    with pytest.raises(ConfigError, match=r"study.toml: lora: min_rank: .*train = \"B\""):
        load_study(plan)


def test_a_trimmed_mean_takes_no_mixed_ranks(tiny_base: Path) -> None:
    plan = plan_of(tiny_base)
    trimmed = plan.model_copy(
        update={"strategy": plan.strategy.model_copy(update={"name": "trimmed_mean"})}
    )
    with pytest.raises(ConfigError, match=r"trimmed_mean cannot use lora\.min_rank"):
        strategy_of(trimmed)


def test_plans_without_min_rank_are_what_they_were(tiny_base: Path) -> None:
    """Their digest, and what an older release reads, know no such key."""
    assert "min_rank" not in plan_of(tiny_base, min_rank=None).model_dump_json()
    assert plan_of(tiny_base).digest != plan_of(tiny_base, min_rank=None).digest


@pytest.mark.parametrize(
    ("most", "lora", "says"),
    [
        (None, {"min_rank": None}, ""),
        (8, {"min_rank": None}, ""),
        (64, {"min_rank": None}, ""),
        (2, {}, ""),
        (1, {}, "at least 2"),
        (4, {"min_rank": None}, "ask for lora.min_rank"),
        (4, {"min_rank": None, "train": "AB"}, 'ask for lora.train = "B"'),
    ],
)
def test_a_site_trains_fewer_ranks_only_where_the_plan_counts_on_it(
    tmp_path: Path, tiny_base: Path, most: int | None, lora: dict[str, object], says: str
) -> None:
    plan = plan_of(tiny_base, **lora, a_digest="sha256:" + "0" * 64)
    site = make_site(tmp_path)
    site = site.model_copy(update={"site": site.site.model_copy(update={"lora_rank": most})})
    found = [str(r) for r in refusals(plan, site, plan_for_site(plan, 12))]
    assert [says in words and "site.lora_rank" in words for words in found] == [True] * bool(says)


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    """A site file with lora_rank = 3."""
    notes(tmp_path)
    path = tmp_path / "site.toml"
    path.write_text(
        f'[site]\nname = "a"\ndeclared_size = 12\nlora_rank = 3\nstate = "{tmp_path}/state"\n'
        '[data]\npath = "notes.jsonl"\n'
        'columns = { prompt = "note", completion = "answer", patient = "who" }\n'
        '[policy]\nbases = "any"\nmax_delta = 1e-4\n'
    )
    return path


def begun(base: Path, **lora: object) -> Any:
    made = plan_of(base, **lora)
    privacy = {"epsilon": 6.0, "delta": 1e-4, "unit": "patient"}
    return start(Study.model_validate(made.model_dump() | {"privacy": privacy}, strict=False))


def test_a_site_declares_its_rank_and_keeps_it_for_the_study(ranked: Path, tiny_base: Path) -> None:
    made = begun(tiny_base)
    worker = SiteWorker(load_site(ranked), ranked)
    assert worker.prepare(made.study, made.frozen).lora_rank == 3
    ranked.write_text(ranked.read_text().replace("lora_rank = 3", "lora_rank = 4"))
    assert worker.prepare(made.study, made.frozen).lora_rank == 3
    delta = worker.train(made.study.digest, 1, made.adapter).delta
    sent = {n: (a.dtype.name, a.shape) for n, a in delta.items()}
    first = rank_slice(made.study.lora, 3, 1)
    assert sent == layout(shapes(slice_update(made.adapter, first)), "int8")
    again = worker.train(made.study.digest, 1, made.adapter).delta
    assert all((again[n] == delta[n]).all() for n in delta)
    assert len(worker.log.steps()) == 1
    # Started again, it declares what the file now says, and cannot send the other update as such.
    other = SiteWorker(load_site(ranked), ranked)
    assert other.prepare(made.study, made.frozen).lora_rank == 4
    with pytest.raises(PolicyRefused, match=r"site\.lora_rank was changed .* set it back"):
        other.train(made.study.digest, 1, made.adapter)
    assert len(other.log.steps()) == 1, "it was neither trained nor paid for again"


def test_where_the_plan_leaves_no_choice_no_rank_is_said(ranked: Path, tiny_base: Path) -> None:
    made = begun(tiny_base, min_rank=None)
    worker = SiteWorker(load_site(ranked), ranked)
    said = worker.prepare(made.study, made.frozen)
    assert not said.admitted and "site.lora_rank" in said.reason and said.lora_rank is None
    ranked.write_text(ranked.read_text().replace("lora_rank = 3", "lora_rank = 64"))
    said = SiteWorker(load_site(ranked), ranked).prepare(made.study, made.frozen)
    assert said.admitted and said.lora_rank is None


def test_a_review_says_what_the_site_trains(ranked: Path, tiny_base: Path) -> None:
    site = load_site(ranked)
    found = review(begun(tiny_base).study, site, Ledger(site.site.state))
    words = " ".join(line for _, lines in found.sections for line in lines)
    assert "3 of its ranks each round here, in turn (site.lora_rank)" in words
    assert "how many ranks it trains" in words
    assert found.refusals == []


def test_what_a_site_trains_of_a_head_is_all_of_it() -> None:
    head = np.zeros((3, 8), np.float32)
    assert trained_slice("head.weight", head, slice(0, 2)) is head
    assert trained_slice("layer.lora_B.default.weight", head, slice(0, 2)).shape == (3, 2)
    assert trained_slice("layer.lora_B.default.weight", head, ALL).shape == head.shape


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Any:
    worker_of.cache_clear()
    yield
    worker_of.cache_clear()
