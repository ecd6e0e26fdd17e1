"""States at the cut, in memory and in the file: the same gradients, and nothing left to read."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedtune.core.data.dataset import Dataset
from fedtune.core.models import prefix_store
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.prefix_store import PREFIX_STORE, Altered, PrefixStore
from fedtune.core.objectives._interface import Batch
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.depth import long_but
from tests.disks import disk
from tests.dp.conftest import records
from tests.expected import raises_nothing
from tests.models.states_kit import EVERYTHING, NOTHING, gradients, without_a_cache

pytestmark = pytest.mark.usefixtures("everything_is_dropped")


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


SPOILT = [(flip, 0), (swap, 0), (cut_off, 0), (flip, 700), (flip, -1)]


@pytest.mark.parametrize(("spoil", "at"), long_but(SPOILT[:3], SPOILT))
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


def refusing_after(room: int, patch: pytest.MonkeyPatch) -> None:
    """Let the disk take `room` bytes of states and no more."""
    written, honest = 0, os.pwrite

    def pwrite(number: int, block: bytes, at: int) -> int:
        nonlocal written
        if written + len(block) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += len(block)
        return honest(number, block, at)

    patch.setattr(prefix_store.os, "pwrite", pwrite)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_full_disk_costs_time_and_changes_no_gradient(
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    share: float,
) -> None:
    """How many records it takes follows from the length of them all."""
    dataset = records([1, 3, 2, 1, 8, 5])
    held = gradients(network, inside := CachedDataset(network, dataset, EVERYTHING))
    size = PREFIX_STORE.in_memory
    del inside
    refusing_after(int(share * size), monkeypatch)
    full = CachedDataset(network, dataset, NOTHING)
    with raises_nothing():
        computed = gradients(network, full)
    for one, two in zip(held, computed, strict=True):
        assert torch.equal(one, two)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "No space left" in said[0] and "cache_memory" in said[0]


@pytest.mark.parametrize("how", ["no folder", "too little is left for others"])
def test_a_file_that_cannot_be_made_or_may_not_grow(
    network: Network,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    dataset = records([1, 3])
    held = gradients(network, CachedDataset(network, dataset, EVERYTHING))
    monkeypatch.setattr(PREFIX_STORE, "_file", None)
    if how == "no folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "file"))
    else:
        monkeypatch.setattr(PREFIX_STORE, "least_free", 2**60)
    for one, two in zip(
        held, gradients(network, CachedDataset(network, dataset, NOTHING)), strict=True
    ):
        assert torch.equal(one, two)
    assert PREFIX_STORE.on_disk == 0 and "cache_memory" in caplog.text


@pytest.mark.parametrize("beside", [0, 4 * 2**20])
def test_what_the_ledgers_room_gave_up_is_not_the_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: int
) -> None:
    """On a disk that has room for the states and LEAST_FREE, and 4 MiB that are lent. Twin: a store
    that was told of no room."""
    monkeypatch.setattr(prefix_store, "LEAST_FREE", 2**20)
    with disk(tmp_path / "disk") as small:
        monkeypatch.setenv("FEDTUNE_CACHE", str(small.path))
        store, states = PrefixStore(), torch.ones(512, 1024)  # 2 MiB
        store.leave_free(beside)
        with small.with_room_for(4 * 2**20):
            one = store.keep(states, b"one", NOTHING)
            assert store.on_disk == 0 if beside else store.on_disk > states.nbytes
        store.leave_free(0)
        with small.with_room_for(8 * 2**20):
            two = store.keep(states, b"two", NOTHING)
            assert store.on_disk > states.nbytes, "it writes where there is space for both"
        del one, two


def test_memory_that_runs_out_is_taken_from_the_states(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that did not fit beside them are computed when they are gone, and equal to the bit."""
    dataset = records([1, 3, 2])
    data = CachedDataset(network, dataset, EVERYTHING)
    engine, rows = UnitGradientEngine(data, CausalLM()), range(dataset.n_units)
    held, honest = engine.matrix(rows), CachedDataset._batch

    def short(self: CachedDataset, *given: Any) -> Batch:
        if PREFIX_STORE.in_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, *given)

    assert PREFIX_STORE.in_memory > 0
    monkeypatch.setattr(CachedDataset, "_batch", short)
    assert torch.equal(engine.matrix(rows), held)
    assert PREFIX_STORE.in_memory == 0 and float(held.abs().max()) > 0


@pytest.mark.parametrize(
    "error, ran_out",
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("allocate memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, ran_out: bool) -> None:
    assert prefix_store.is_out_of_memory(error) is ran_out
