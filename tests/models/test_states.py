"""States at the cut, in memory and in the file: the same gradients, and nothing left to read."""

from __future__ import annotations

import gc
import json
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from fedtune.bases.find import find_base
from fedtune.config import LoraTable
from fedtune.data.dataset import Dataset, Example
from fedtune.dp import noise, sampling
from fedtune.dp.steplog import StepLog
from fedtune.errors import InfrastructureError
from fedtune.models import cache, prefix_store
from fedtune.models.cache import CachedDataset
from fedtune.models.network import Network
from fedtune.models.prefix_store import PREFIX_STORE, Altered, PrefixStore
from fedtune.objectives._shapes import padded_length
from fedtune.objectives.causal_lm import CausalLM
from fedtune.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import make_plan, records
from tests.models.test_network import MODULES, randomise

NOTHING, EVERYTHING = 0, 2**40  # bytes in memory


@pytest.fixture(params=["blocks", "last MLP"])
def network(request: pytest.FixtureRequest, tiny_base: Path) -> Network:
    """Cut below the last two blocks, or behind the last attention, where positions part."""
    deep = request.param == "last MLP"
    lora = LoraTable(
        rank=4,
        alpha=8.0,
        modules=("gate_proj", "down_proj") if deep else MODULES,
        last_layers=1 if deep else 2,
    )
    made = Network(find_base(str(tiny_base)), torch.float32, lora, labels=0)
    assert made.positionwise == deep
    randomise(made)
    return made


@pytest.fixture(autouse=True)
def everything_is_dropped() -> Iterator[None]:
    """What other tests of this process still hold is put aside meanwhile."""
    outside = dict(vars(PREFIX_STORE))
    vars(PREFIX_STORE).update(vars(prefix_store.PrefixStore()))
    yield
    gc.collect()
    assert (PREFIX_STORE.in_memory, PREFIX_STORE.on_disk) == (0, 0)
    vars(PREFIX_STORE).update(outside)


def gradients(network: Network, data: CachedDataset) -> list[torch.Tensor]:
    """Each record's own gradient, from its micro-batch of one."""
    found = []
    for index in range(len(data.dataset.examples)):
        (batch,) = data.batches([index])
        loss = CausalLM().losses(network, batch).sum()
        each = torch.autograd.grad(loss, list(network.parameters().values()))
        found.append(torch.cat([g.flatten() for g in each]))
    return found


def without_a_cache(network: Network, dataset: Dataset) -> list[torch.Tensor]:
    """The same through the whole base, which knows nothing of a cut."""
    found = []
    for example in dataset.examples:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        targets = torch.from_numpy(example.target_ids.astype(np.int64))
        loss = functional.cross_entropy(network.model(input_ids=ids).logits[0], targets)
        each = torch.autograd.grad(loss, list(network.parameters().values()))
        found.append(torch.cat([g.flatten() for g in each]))
    return found


def test_the_same_gradients_in_memory_in_the_file_and_without_a_cache(network: Network) -> None:
    dataset = records([1, 3, 2, 1])
    held = gradients(network, inside := CachedDataset(network, dataset, EVERYTHING))
    assert PREFIX_STORE.in_memory > 0 and PREFIX_STORE.on_disk == 0
    size = sum(state.read().nbytes for state in network.states.values())
    assert PREFIX_STORE.in_memory == size
    del inside
    spilled = gradients(network, outside := CachedDataset(network, dataset, NOTHING))
    assert PREFIX_STORE.in_memory == 0 and PREFIX_STORE.on_disk > size
    del outside
    half = gradients(network, CachedDataset(network, dataset, size // 2))
    whole = without_a_cache(network, dataset)
    for one, two, three, plain in zip(held, spilled, half, whole, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
        assert float((one - plain).norm() / plain.norm()) < 1e-5


def test_some_in_memory_and_the_rest_in_the_file(network: Network) -> None:
    dataset = records([1] * 12)
    CachedDataset(network, dataset, EVERYTHING).warm()
    data = CachedDataset(network, dataset, limit := 4096)
    data.warm()
    assert 0 < PREFIX_STORE.in_memory <= limit and PREFIX_STORE.on_disk > 0
    assert sum(len(batch.index) for batch in data.batches(range(12))) == 12


def test_the_default_is_a_quarter_of_the_machine_or_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for text, expected in (("max\n", pages // 4), (f"{2**30}\n", 2**28), ("9" * 30, pages // 4)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(prefix_store, "_CGROUP", tmp_path / "memory.max")
        assert prefix_store.default_limit.__wrapped__() == expected


# ------------------------------------------------------------------------------------ the file


def the_file() -> int:
    assert PREFIX_STORE._file is not None
    return PREFIX_STORE._file.number


def content() -> bytes:
    return os.pread(the_file(), os.fstat(the_file()).st_size, 0)


def test_the_file_has_no_name_and_is_the_owners_alone(network: Network) -> None:
    data = CachedDataset(network, records([2, 2]), NOTHING)
    data.warm()
    found = os.fstat(the_file())
    assert stat.S_IMODE(found.st_mode) == 0o600 and found.st_nlink == 0 and found.st_size > 0


def readable(network: Network) -> bool:
    """Whether any position's states stand in the file as they are."""
    rows = [row for s in network.states.values() for row in s.read()]
    assert rows
    body = content()
    return any(row.numpy().tobytes()[:16] in body for row in rows)


def test_what_is_in_the_file_is_not_readable(network: Network) -> None:
    data = CachedDataset(network, records([2, 2]), NOTHING)
    data.warm()
    assert not readable(network)
    keys = [state.key for state in data._states]
    assert len(set(keys)) == len(keys) == 4
    body = content()
    assert not any(key in body or key[:16] in body for key in keys)


class InTheClear:
    """The twin: a cipher that writes what it is given."""

    generate_key = staticmethod(AESGCM.generate_key)

    def __init__(self, key: bytes) -> None: ...

    def encrypt(self, nonce: bytes, data: bytes, record: bytes) -> bytes:
        return data

    def decrypt(self, nonce: bytes, data: bytes, record: bytes) -> bytes:
        return data


def test_states_written_in_the_clear_are_caught(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_store, "AESGCM", InTheClear)
    data = CachedDataset(network, records([2, 2]), NOTHING)
    data.warm()
    assert readable(network)


def flip(data: CachedDataset, at: int) -> None:
    body = bytearray(content())
    body[at] ^= 1
    os.pwrite(the_file(), body, 0)


def swap(data: CachedDataset, _: int) -> None:
    """Two whole blocks of one size change places."""
    sealed = list(data._states)
    body = bytearray(content())
    one, two = next((a, b) for a in sealed for b in sealed if a.at < b.at and a.size == b.size)
    first, second = (slice(s.at, s.at + s.size) for s in (one, two))
    body[first], body[second] = body[second], body[first]
    os.pwrite(the_file(), body, 0)


def cut_off(data: CachedDataset, _: int) -> None:
    os.ftruncate(the_file(), os.fstat(the_file()).st_size - 5)


@pytest.mark.parametrize(
    ("spoil", "at"), [(flip, 0), (flip, 700), (flip, -1), (swap, 0), (cut_off, 0)]
)
def test_an_altered_block_is_noticed_and_its_states_computed_again(
    network: Network,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[CachedDataset, int], None],
    at: int,
) -> None:
    dataset = records([1] * 6)
    dataset = Dataset([*dataset.examples, *records([1] * 6, seed=0).examples], 12, dataset.rejected)
    for example in dataset.examples[6:]:
        example.input_ids[0] += 1  # other records of the same lengths
    data = CachedDataset(network, dataset, NOTHING)
    right = gradients(network, data)
    spoil(data, at)
    altered = 0
    for state in data._states:
        assert state is not None
        try:
            state.read()
        except Altered:
            altered += 1
    assert altered == (2 if spoil is swap else 1)
    with caplog.at_level(logging.WARNING):
        again = gradients(network, data)
    for one, two in zip(right, again, strict=True):
        assert float((one - two).norm() / one.norm()) < 1e-5
    assert len(caplog.records) == altered
    assert all("altered" in record.getMessage() for record in caplog.records)
    caplog.clear()
    gradients(network, data)
    assert not caplog.records  # what was computed again has a good block now


def test_a_block_is_bound_to_its_record(network: Network) -> None:
    """Even under the same key."""
    store = PrefixStore()
    kept = store.keep(torch.ones(3, 4), b"one", NOTHING)
    assert torch.equal(kept.read(), torch.ones(3, 4))
    object.__setattr__(kept, "record", b"two")
    with pytest.raises(Altered):
        kept.read()


def test_dropped_room_is_used_again_and_given_back() -> None:
    store = PrefixStore()
    body = torch.randn(5, 8, dtype=torch.float32)
    kept = [store.keep(body + n, bytes([n]), NOTHING) for n in range(4)]
    full = store.on_disk
    assert store._file is not None
    size = os.fstat(store._file.number).st_size
    del kept[1]
    assert store.on_disk == full * 3 // 4
    kept.append(store.keep(body, b"new", NOTHING))
    assert os.fstat(store._file.number).st_size == size
    assert [float((k.read() - body).mean().round()) for k in kept] == [0.0, 2.0, 3.0, 0.0]
    kept.clear()
    kept.append(store.keep(body.bfloat16(), b"small", NOTHING))
    assert os.fstat(store._file.number).st_size < size // 4
    assert torch.equal(kept[0].read(), body.bfloat16())


def test_a_fork_writes_into_a_file_of_its_own() -> None:
    store = PrefixStore()
    mine = store.keep(torch.full((2, 3), 1.0), b"mine", NOTHING)
    child = os.fork()
    if not child:
        theirs = store.keep(torch.full((2, 3), 2.0), b"theirs", NOTHING)
        right = float(theirs.read().sum()) == 12 and float(mine.read().sum()) == 6
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    second = store.keep(torch.full((2, 3), 3.0), b"second", NOTHING)
    assert (float(mine.read().sum()), float(second.read().sum())) == (6.0, 18.0)


def test_a_folder_that_cannot_be_written_is_said_in_words(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(PREFIX_STORE, "_file", None)
    with pytest.raises(InfrastructureError, match=r"cache_memory"):
        CachedDataset(network, records([1]), NOTHING).warm()


# ------------------------------------------------------------------------- whose states they are


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


# --------------------------------------------------------------------------------- micro-batches


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
        p.setitem(cache.STEP, "cpu", budget)
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
