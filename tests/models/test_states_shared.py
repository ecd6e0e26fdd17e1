"""Whose states are kept, and in which micro-batches."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.dp import noise, sampling
from fedtune.core.dp.steplog import StepLog
from fedtune.core.models import cache
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.prefix_store import PREFIX_STORE
from fedtune.core.objectives._shapes import padded_length
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import make_plan, records
from tests.models.states_kit import EVERYTHING, NOTHING, gradients, without_a_cache
from tests.models.test_network import MODULES, randomise

pytestmark = pytest.mark.usefixtures("everything_is_dropped")


def test_the_same_tokens_with_other_targets_have_states_of_their_own(network: Network) -> None:
    """Where positions stand for themselves, other targets keep other positions."""
    ids = np.arange(5, 25, dtype=np.int32)
    early, late = (np.full(20, -100, np.int32) for _ in range(2))
    early[3:6], late[15:18] = ids[3:6], ids[15:18]
    none = records([1]).rejected
    first, then = (Dataset([Example(ids, t, -100, 0)], 1, none) for t in (early, late))
    held = CachedDataset(network, first)
    gradients(network, held)
    (found,), (plain,) = (
        gradients(network, CachedDataset(network, then)),
        without_a_cache(network, then),
    )
    assert float((found - plain).norm() / plain.norm()) < 1e-5


def test_what_reads_the_same_is_computed_once(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one answer in several pairs."""
    one = records([1] * 4, seed=7)
    twice = Dataset([*one.examples, *one.examples], 8, one.rejected)
    computed, honest = [], network.prefix

    def counted(ids: torch.Tensor, mask: torch.Tensor, *seen: None) -> torch.Tensor:
        computed.append(len(ids.unique(dim=0)))  # a block is filled with its first record
        return honest(ids, mask, *seen)

    monkeypatch.setattr(network, "prefix", counted)
    data = CachedDataset(network, twice)
    found = gradients(network, data)
    assert sum(computed) == 4
    assert len({id(state) for state in data._states}) == 4
    for left, right in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("memory", [NOTHING, EVERYTHING])
def test_a_record_that_nobody_sees_any_more_is_erased_and_the_others_stay(
    network: Network, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a patient withdraws: the site reads its records anew, and drops the old view."""
    dataset = records([1, 2, 3])
    data = CachedDataset(network, dataset, memory)
    data.warm()
    before = PREFIX_STORE.in_memory + PREFIX_STORE.on_disk
    rest = Dataset(dataset.examples[1:], 2, dataset.rejected)
    fewer = CachedDataset(network, rest, memory)
    del data
    gc.collect()
    assert len(network.states) == 5 and PREFIX_STORE.in_memory + PREFIX_STORE.on_disk < before
    monkeypatch.setattr(network, "prefix", lambda *_: pytest.fail("computed twice"))
    assert sum(len(batch.index) for batch in fewer.batches(range(5))) == 5


def test_below_the_cut_nothing_is_trained_and_nothing_is_dropped(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Also where the base's configuration has dropout, and while a step is under way."""
    folder = tmp_path / "with-dropout"
    folder.mkdir()
    for path in tiny_base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    lora = LoraTable(rank=4, alpha=8.0, modules=MODULES, last_layers=2)
    network = Network(find_base(str(folder)), torch.float32, lora, labels=0)
    assert network._split is not None
    own = set(network.model.modules())
    below = [module for module in network._split.prefix.modules() if module in own]
    assert not any(isinstance(module, LoraLayer) for module in below)
    trained = {id(p) for p in network.parameters().values()}
    assert not trained & {id(p) for module in below for p in module.parameters()}
    ids = torch.arange(3, 40)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = network.prefix(ids, mask)
    randomise(network)
    engine = UnitGradientEngine(CachedDataset(network, records([1, 1])), CausalLM())
    for _ in engine([0, 1]):
        assert not any(module.training for module in below)
        assert torch.equal(network.prefix(ids, mask), before)


@pytest.mark.parametrize("lengths", [[1], [8, 1, 5, 3], [480], [2, 480, 7, 33, 33, 32, 64]])
def test_every_record_is_in_one_micro_batch_of_its_own_length(
    network: Network, lengths: list[int]
) -> None:
    draw = np.random.default_rng(0)
    examples = []
    for unit, length in enumerate(lengths):
        ids = draw.integers(3, 280, size=length, dtype=np.int32)
        examples.append(Example(ids, ids.copy(), -100, unit))
    data = CachedDataset(network, Dataset(examples, len(lengths), records([1]).rejected))
    for budget in (1, 64, 4096):
        seen = []
        for batch in data.batches(range(len(lengths)), budget):
            rows, width = batch.mask.shape
            assert rows == 1 or rows * width <= budget
            assert {padded_length(n) for n in batch.mask.sum(dim=1).tolist()} == {width}
            assert [lengths[i] for i in batch.index.tolist()] == batch.mask.sum(dim=1).tolist()
            seen += batch.index.tolist()
        assert sorted(seen) == list(range(len(lengths)))


def summed(
    network: Network, order: list[int], budget: int, folder: Path, patch: pytest.MonkeyPatch
) -> torch.Tensor:
    """One step's integer sum over records in that order, in blocks of that many positions."""
    data = CachedDataset(network, records([1] * 8))
    engine = UnitGradientEngine(data, CausalLM())
    plan = make_plan(divisor=8.0)  # a power of two, so that fp32 carries the integers exactly
    with patch.context() as p:
        p.setitem(cache.BLOCK_POSITIONS, "cpu", budget)
        p.setattr(sampling, "poisson", lambda *_: order)
        p.setattr(noise, "gaussian_on_grid", lambda d, *_: torch.zeros(d, dtype=torch.int64))
        found = plan.step(8, engine.dimension, engine, StepLog(folder / "log"), 1)
    return found.double() * 8.0 * 2**20


def test_order_and_token_budget_do_not_change_the_sum(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order not by a bit, the budget to rounding."""
    orders = [list(range(8)), [3, 0, 7, 1, 6, 2, 5, 4], list(range(7, -1, -1))]
    alone = [summed(network, order, 1, tmp_path, monkeypatch) for order in orders]
    assert 0 < float(alone[0].abs().max()) < 2**24
    assert torch.equal(alone[0], alone[1]) and torch.equal(alone[0], alone[2])
    for order in orders:
        for budget in (64, 100, 4096):
            other = summed(network, order, budget, tmp_path, monkeypatch)
            assert float((other - alone[0]).norm() / alone[0].norm()) < 1e-5
