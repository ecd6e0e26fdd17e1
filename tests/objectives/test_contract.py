"""What every objective must keep, found by listing the package; each with twins that break it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.nn import functional

from fedtune.audit import contracts
from fedtune.core import objectives
from fedtune.core.bases.find import find_base
from fedtune.core.config import ObjectiveTable, Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.dp import clip
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.tiny import generate_records, tiny_network
from fedtune.core.objectives import _tokens
from fedtune.core.objectives._interface import Batch, Objective, RecordFormat
from fedtune.core.objectives.distill import divergence
from fedtune.core.objectives.reward import rewards
from fedtune.core.training import selftest
from fedtune.core.training.engines import EngineName
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests import chance
from tests.dp.conftest import make_plan, study

SIZES = (1, 3, 2, 1, 4, 2)
NAMES = objectives.names()
LABELS = ["yes", "no", "maybe"]
ADAPTERS: dict[str, dict[str, object] | None] = {
    "cut": {"modules": ["q_proj", "down_proj"], "last_layers": 2, "rank": 4},
    "positions apart": {"modules": ["gate_proj", "down_proj"], "last_layers": 1, "rank": 4},
    "head alone": None,
}
# Everything that an objective's options switch on, beside the defaults.
OPTIONS: dict[str, list[dict[str, float | str]]] = {
    "dpo": [{"variant": "ipo"}, {"label_smoothing": 0.2, "beta": 0.5}],
    "kto": [{"beta": 0.5, "reference_point": 0.7, "lambda_undesirable": 1.5}],
    "orpo": [{"weight": 1.0}],
    "prototypes": [{"directions": 5.0, "count_weight": 2.0}],
    "reward": [{"margin": 0.5, "centring": 0.1}],
    "distill": [{"temperature": 2.0, "hard": 0.3}],
}
# What an objective cannot do without: this teacher is never asked, generated records have targets.
NEEDED: dict[str, dict[str, float | str]] = {
    "distill": {"teacher": "any", "digest": "sha256:" + "0" * 64}
}
By = Literal["unit", "record"]
NETWORKS: dict[tuple[str, int, int], Network] = {}


@dataclass
class Case:
    """An objective at its options, on records of the kind that it learns from."""

    study: Study
    found: Objective
    network: Network
    data: Dataset
    wanted: EngineName = "auto"
    by: By = "unit"

    def engine(self, data: Dataset | None = None) -> UnitGradientEngine:
        cached = CachedDataset(self.network, self.data if data is None else data)
        return UnitGradientEngine(cached, self.found, self.by, self.wanted)

    def rows(self, data: Dataset | None = None) -> torch.Tensor:
        engine = self.engine(data)
        return engine.matrix(range(engine.n_rows))


def case_of(
    base: Path,
    name: str,
    adapter: str,
    options: dict[str, float | str] | None = None,
    wanted: EngineName = "auto",
    by: By = "unit",
) -> Case:
    table: dict[str, object] = {"name": name, "max_length": 64, "options": every(name, options)}
    if reads(name) == "label" or (adapter == "head alone" and not heads(name, labels=())):
        table["labels"] = LABELS  # without them a distilled student has no head
    made = study(base={"model": str(base)}, objective=table, lora=ADAPTERS[adapter])
    found = made.objective.resolved
    key = (adapter, found.outputs, found.directions)
    if key not in NETWORKS:
        NETWORKS[key] = tiny_network(made, find_base(str(base)))
    network = NETWORKS[key]
    return Case(made, found, network, generate_records(made, network, SIZES), wanted, by)


def every(name: str, options: dict[str, float | str] | None = None) -> dict[str, float | str]:
    return NEEDED.get(name, {}) | (options or {})


def plain(name: str, labels: tuple[str, ...] = ()) -> Objective:
    return ObjectiveTable(name=name, labels=labels, options=every(name)).resolved


def reads(name: str) -> RecordFormat:
    return plain(name).record_format


def heads(name: str, labels: tuple[str, ...] = ("a", "b")) -> bool:
    return plain(name, labels).outputs > 0


HEADED = [name for name in NAMES if heads(name)]


def suits(name: str, adapter: str) -> bool:
    """Whether an objective can train so: class statistics have a frozen base, a head is not for
    all."""
    return name in HEADED if adapter == "head alone" else not plain(name).directions


EVERY = [
    pytest.param(name, options, adapter, id=" ".join([name, *map(str, options.values()), adapter]))
    for name in NAMES
    for options in [{}, *OPTIONS.get(name, [])]
    for adapter in ADAPTERS
    if suits(name, adapter)
]


@pytest.fixture(params=["auto", "opacus"])
def wanted(request: pytest.FixtureRequest) -> EngineName:
    found: EngineName = request.param
    return found


# By default several rows a unit, of which one is the simple case.
@pytest.fixture(params=["unit", pytest.param("record", marks=pytest.mark.long)])
def by(request: pytest.FixtureRequest) -> By:
    found: By = request.param
    return found


def by_autograd(case: Any) -> Any:
    return pytest.param(*case.values, "auto", id=f"{case.id}-auto")


def by_hooks(case: Any) -> Any:
    """Opacus's rows of every loss, option and adapter are a loop's, by the first test of a `case`;
    what those rows keep is asked by default of each loss without options alone."""
    _, options, adapter = case.values
    marks = pytest.mark.long if options or adapter == "positions apart" else ()
    return pytest.param(*case.values, "opacus", id=f"{case.id}-opacus", marks=marks)


@pytest.fixture
def case(
    tiny_base: Path,
    name: str,
    options: dict[str, float | str],
    adapter: str,
    wanted: EngineName,
    by: By,
) -> Case:
    return case_of(tiny_base, name, adapter, options, wanted, by)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    names, cases = ("name", "options", "adapter"), EVERY
    if metafunc.function in (
        test_a_row_is_its_own_records_alone,
        test_leaving_a_unit_out_moves_the_sum_by_at_most_c,
    ):
        names, cases = (*names, "wanted"), [*map(by_autograd, EVERY), *map(by_hooks, EVERY)]
    metafunc.parametrize(names, cases)


def one_by_one(case: Case) -> torch.Tensor:
    """Each row by plain autograd, one record at a time, fp64."""
    data, each = CachedDataset(case.network, case.data), []
    parameters = list(case.network.update_parameters().values())
    for index in range(len(case.data.examples)):
        (batch,) = data.batches([index])
        parts = torch.autograd.grad(case.found.losses(case.network, batch).sum(), parameters)
        each.append(torch.cat([part.double().flatten() for part in parts]))
    if case.by == "record":
        return torch.stack(each)
    return torch.stack(
        [torch.stack([each[i] for i in members]).mean(dim=0) for members in case.data.by_unit]
    )


def apart(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return float((ours.double() - plain).norm(dim=1).max() / plain.norm(dim=1).max())


def moved(case: Case, unit: int = 4) -> tuple[float, float]:
    """How far rows move when `unit` gets other records: its own most, and anyone else's most."""
    before = case.rows()
    after = case.rows(selftest._edit_unit(case.data, unit, case.study, case.network))
    each = (after - before).norm(dim=1) / before.norm(dim=1)
    own = case.data.by_unit[unit] if case.by == "record" else [unit]
    others = [row for row in range(len(each)) if row not in own]
    return float(each[own].max()), float(each[others].max())


def removed(case: Case, c: float) -> float:
    """The most that leaving a unit out moves the clipped sum, in c for each of its rows."""
    grid = clip.grid_for(c)

    def total(data: Dataset) -> torch.Tensor:
        rows = case.rows(data)
        found = torch.zeros(rows.shape[1], dtype=torch.int64)
        clip.add_clipped(found, clip.Chunk(range(len(rows)), [rows]), grid, c, "flat", 0.01)
        return found.double() * grid

    whole, worst = total(case.data), 0.0
    for unit in range(case.data.n_units):
        n = len(case.data.by_unit[unit]) if case.by == "record" else 1
        without = total(selftest._remove_unit(case.data, unit))
        worst = max(worst, float((whole - without).norm()) / (c * n))
    return worst


def test_rows_are_those_of_a_loop_of_one_record(case: Case) -> None:
    assert apart(case.rows(), one_by_one(case)) < 1e-5


def test_a_row_is_its_own_records_alone(case: Case) -> None:
    own, others = moved(case)
    assert own > 0.01
    assert others < 1e-4


def test_leaving_a_unit_out_moves_the_sum_by_at_most_c(case: Case) -> None:
    c = float(case.rows().norm(dim=1).median()) / 3  # most rows are clipped
    assert 0.9 < removed(case, c) < 1 + 1e-3


@pytest.mark.parametrize("wanted", ["auto"])  # no engine and no row is asked
@pytest.mark.parametrize("by", ["unit"])
def test_a_loss_is_the_same_in_any_company_and_at_any_time(case: Case) -> None:
    """(B,), fp32; no dropout, nothing of the batch: alone, together and again."""
    data = CachedDataset(case.network, case.data)
    assert contracts.malformed_losses(case.study, data) == 0
    assert contracts.measure_repeatability(case.study, data) == 0
    assert contracts.measure_batch_dependence(case.study, data) <= contracts.BATCH_ROUNDING


def test_nobody_drawn_and_nobody_there_are_steps_of_noise(case: Case) -> None:
    plan = replace(make_plan(), unit=case.by if case.by == "record" else "patient")
    engine = case.engine()
    assert list(engine([])) == []
    nobody = case.engine(Dataset([], 0, Counter()))
    assert nobody.n_rows == 0
    log, once = selftest.MemoryLog(), chance.spread_for(0.5, 2.0)
    turns = range(1, math.ceil(once.draws / engine.dimension) + 1)
    drawn = torch.stack([plan.step(0, nobody.dimension, nobody, log, turn) for turn in turns])
    assert drawn.shape == (len(turns), engine.dimension) and len(log.lines) == len(turns)
    found = float(drawn.double().square().mean().sqrt()) * plan.divisor
    assert chance.spread_of(drawn.numel()).holds(found)


# The rows of every loss by Opacus are compared with a loop's, above.
OTHERS = [("auto", "record"), ("opacus", "patient"), ("opacus", "record")]


@pytest.mark.parametrize(
    ("engine", "unit"),
    [
        ("auto", "patient"),  # several rows a unit, so its single rows too
        *(pytest.param(*other, marks=pytest.mark.long) for other in OTHERS),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_four_oracles_pass(tiny_base: Path, name: str, engine: str, unit: str) -> None:
    results = selftest.run(private(tiny_base, name, unit, engine))
    assert [r.name for r in results] == ["parity", "isolation", "sensitivity", "noise"]
    assert all(r.passed for r in results), results


def private(base: Path, name: str, unit: str, engine: str = "auto") -> Study:
    table: dict[str, object] = {"name": name, "max_length": 64, "options": every(name)}
    if reads(name) == "label":
        table["labels"] = LABELS
    return study(
        base={"model": str(base)},
        objective=table,
        lora=None if plain(name).directions else {"modules": ["q_proj"], "last_layers": 2},
        training={"rounds": 4, "sampling_rate": 1.0, "learning_rate": 0.1, "engine": engine},
        privacy={"noise_multiplier": 1.6, "delta": 1e-4, "unit": unit},
    )


# ------------------------------------------------------------------------------------- twins


def batch_divergence(network: Network, batch: Batch) -> torch.Tensor:
    """KTO as it is usually run: the reference point is a mean over the batch."""
    ratio = _tokens.likelihood(network, batch).total - _tokens.reference(network, batch).total
    gain = 0.1 * (ratio - ratio.detach().mean())
    wanted = batch.label == 1
    return 1 - torch.sigmoid(torch.where(wanted, gain, -gain))


def reward_centred(network: Network, batch: Batch) -> torch.Tensor:
    """Rewards drawn to zero mean over the batch."""
    found = rewards(network, batch)
    better, worse = found.view(-1, 2).unbind(dim=1)
    return -functional.logsigmoid(better - worse) + 0.1 * found.mean() ** 2


def margin_centred(network: Network, batch: Batch) -> torch.Tensor:
    """DPO with margins counted from half their mean over the batch."""
    now, before = _tokens.likelihood(network, batch), _tokens.reference(network, batch)
    better, worse = (now.total - before.total).view(-1, 2).unbind(dim=1)
    gained = better - worse
    return -functional.logsigmoid(0.1 * (gained - gained.mean() / 2))


def in_batch_negatives(network: Network, batch: Batch) -> torch.Tensor:
    """ORPO against the next record's worse completion."""
    better, worse = _tokens.likelihood(network, batch).mean.view(-1, 2).unbind(dim=1)
    return -better - functional.logsigmoid(better - worse.roll(1))


def batch_mean(network: Network, batch: Batch) -> torch.Tensor:
    """The built-in loss of a language model: the mean over the batch's tokens."""
    found = _tokens.likelihood(network, batch)
    return -found.total / found.targets.sum().clamp_min(1) * len(batch.label)


def logits_centred(network: Network, batch: Batch) -> torch.Tensor:
    hidden = network.hidden(batch.prefix, batch.mask)
    logits = network.logits(network.pool(hidden, batch.mask))
    return functional.cross_entropy(logits - logits.mean(dim=0) / 2, batch.label, reduction="none")


def teacher_centred(network: Network, batch: Batch) -> torch.Tensor:
    """The teacher's figures counted from their mean over the batch."""
    assert batch.soft is not None
    tokens, logp = batch.soft
    found = torch.log_softmax(logp - logp.mean(dim=0, keepdim=True), dim=2)
    return divergence(network, replace(batch, soft=(tokens, found)))


def features_centred(network: Network, batch: Batch) -> torch.Tensor:
    """Class statistics of vectors less half of their mean over the batch."""
    vectors = network.pool(network.hidden(batch.prefix, batch.mask), batch.mask)
    products = network.class_sums(vectors - vectors.mean(dim=0) / 2, 0.35)
    return -products.gather(1, batch.label[:, None])[:, 0]


TWINS: dict[str, Callable[..., torch.Tensor]] = {
    "distill": teacher_centred,
    "causal_lm": batch_mean,
    "classify": logits_centred,
    "dpo": margin_centred,
    "kto": batch_divergence,
    "orpo": in_batch_negatives,
    "prototypes": features_centred,
    "reward": reward_centred,
}


def with_the_batchs_mean(name: str) -> Callable[..., torch.Tensor]:
    """The twin of an objective that has none of its own: its losses, and their mean to each."""
    found, own = plain(name), objectives.OBJECTIVES.load(name).losses

    def losses(network: Network, batch: Batch) -> torch.Tensor:
        each = own(found, network, batch)
        return each + each.mean()

    return losses


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_couples_records_is_caught(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind = objectives.OBJECTIVES.load(name)
    twin = TWINS.get(name) or with_the_batchs_mean(name)
    monkeypatch.setattr(kind, "losses", staticmethod(twin))
    adapter = "head alone" if plain(name).directions else "cut"
    case = case_of(tiny_base, name, adapter, by="record")
    assert apart(case.rows(), one_by_one(case)) > 1e-3
    assert max(moved(case, unit)[1] for unit in range(case.data.n_units)) > 1e-3
    failed = {r.name for r in selftest.run(private(tiny_base, name, "patient")) if not r.passed}
    assert {"parity", "isolation"} <= failed


def dropped(network: Network, batch: Batch) -> torch.Tensor:
    found = _tokens.likelihood(network, batch).mean
    return -functional.dropout(found, 0.5)


def summed(network: Network, batch: Batch) -> torch.Tensor:
    return batch_mean(network, batch).sum()


def double(network: Network, batch: Batch) -> torch.Tensor:
    return -_tokens.likelihood(network, batch).mean.double()


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (dropped, contracts.measure_repeatability),
        (summed, contracts.malformed_losses),
        (double, contracts.malformed_losses),
        (batch_mean, contracts.measure_batch_dependence),
    ],
)
def test_a_loss_that_breaks_a_contract_is_caught(
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[..., torch.Tensor],
    check: Callable[..., float],
) -> None:
    monkeypatch.setattr(objectives.OBJECTIVES.load("causal_lm"), "losses", staticmethod(broken))
    case = case_of(tiny_base, "causal_lm", "cut")
    assert check(case.study, CachedDataset(case.network, case.data)) > contracts.BATCH_ROUNDING


@pytest.mark.parametrize("name", [name for name in NAMES if reads(name) == "preference"])
def test_half_a_pair_is_caught(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The twin: one passage of a pair makes the gradient."""
    whole = UnitGradientEngine._per_record

    def half(engine: UnitGradientEngine, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with pytest.MonkeyPatch.context() as patch:
            sums = torch.Tensor.sum
            patch.setattr(
                torch.Tensor, "sum",
                lambda t, *a, **k: t[:, 0] if t.dim() > 2 and k == {"dim": 1} else sums(t, *a, **k),
            )  # fmt: skip
            return whole(engine, batch)

    monkeypatch.setattr(UnitGradientEngine, "_per_record", half)
    case = case_of(tiny_base, name, "cut", by="record")
    assert apart(case.rows(), one_by_one(case)) > 1e-2
