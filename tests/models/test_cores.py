"""Blocks that are computed side by side give what each gives alone, in order, and leave nothing."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.models import cores
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.cores import compute_side_by_side, one_operator_thread
from fedtune.core.models.network import Network
from fedtune.core.models.tiny import generate_records
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.engines import one_pass
from fedtune.core.training.unit_gradients import NoRowGradient, UnitGradientEngine
from tests.dp.conftest import records
from tests.objectives.test_contract import ADAPTERS, NAMES, case_of, suits

PATIENCE = 60.0  # seconds


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute(block: int) -> torch.Tensor:
    assert torch.get_num_threads() == 1
    return torch.full((3,), float(block))


def values(found: Iterator[tuple[int, torch.Tensor]]) -> list[tuple[int, float]]:
    return [(block, float(result[0])) for block, result in found]


def in_turn(count: int, cores_: int | None, **more: Any) -> Iterator[tuple[int, torch.Tensor]]:
    more = {"positions_of": lambda _: 1} | more
    return compute_side_by_side(more.pop("compute", compute), range(count), cores_, **more)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_results_come_in_the_order_of_their_blocks(count: int) -> None:
    with threads(2):
        assert values(in_turn(20, count)) == [(n, float(n)) for n in range(20)]
        assert torch.get_num_threads() == 2


def test_without_cores_the_caller_computes_with_all_its_threads() -> None:
    def here(block: int) -> torch.Tensor:
        assert torch.get_num_threads() == 2 and threading.current_thread() is mine
        return torch.ones(1)

    mine = threading.current_thread()
    with threads(2):
        assert len(list(in_turn(3, None, compute=here))) == 3


def test_as_many_blocks_as_cores_are_computed_at_once() -> None:
    all_here = threading.Barrier(3)

    def meet(block: int) -> torch.Tensor:
        all_here.wait(PATIENCE)  # passes only if three are computed at once
        return torch.ones(1)

    assert len(list(in_turn(9, 3, compute=meet))) == 9


def test_no_more_positions_are_held_than_the_cores_have_room_for() -> None:
    made: list[int] = []

    def blocks() -> Iterator[int]:
        for block in range(6):
            made.append(block)
            yield block

    room = 2 * cores.POSITIONS_PER_CORE
    found = compute_side_by_side(compute, blocks(), 2, positions_of=lambda _: room)
    next(found)
    assert made == [0, 1]  # the second waits to be begun until the first is taken
    assert len(list(found)) == 5


def test_a_block_that_may_not_share_is_computed_alone() -> None:
    running: set[int] = set()

    def watch(block: int) -> torch.Tensor:
        running.add(block)
        if block % 4 == 0:
            assert running == {block} and threading.current_thread() is mine
        running.discard(block)
        return torch.ones(1)

    mine = threading.current_thread()
    found = in_turn(16, 4, compute=watch, may_share=lambda block: block % 4 != 0)
    assert len(list(found)) == 16


def test_what_failed_is_raised_at_its_turn_and_the_rest_is_discarded() -> None:
    discarded: list[float] = []

    def fails(block: int) -> torch.Tensor:
        if block == 2:
            raise ValueError("two")
        return compute(block)

    found = in_turn(9, 3, compute=fails, discard=lambda result: discarded.append(float(result[0])))
    assert values(pair for pair in (next(found), next(found))) == [(0, 0.0), (1, 1.0)]
    with pytest.raises(ValueError, match="two"):
        next(found)
    assert discarded == [3.0, 4.0, 5.0][: len(discarded)] and discarded


def test_a_caller_who_stops_leaves_no_result() -> None:
    discarded: list[float] = []
    found = in_turn(9, 3, discard=lambda result: discarded.append(float(result[0])))
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert discarded == [1.0, 2.0, 3.0]


def test_all_threads_start_before_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a number of the machine's one counter: how many blocks there are is private."""
    monkeypatch.setattr(cores, "_threads", {})
    before = threading.active_count()
    list(in_turn(1, 4, may_share=lambda _: False))
    assert threading.active_count() == before + 4
    list(in_turn(40, 4))
    assert threading.active_count() == before + 4


def test_a_thread_keeps_its_one_thread_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also once the process's own number is another: a thread takes it at its first use."""
    monkeypatch.setattr(cores, "_threads", {})
    pool = cores._start_threads(2)
    with threads(4):
        assert pool.submit(torch.get_num_threads).result() == 1


def test_threads_that_cannot_all_start_leave_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_threads", {})
    start, started = threading.Thread.start, []

    def only_two(self: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", only_two)
    with pytest.raises(RuntimeError, match="start"):
        list(in_turn(3, 4))
    for thread in started:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in started)


def test_a_block_that_cannot_be_made_fails_at_its_turn() -> None:
    def blocks() -> Iterator[int]:
        yield from range(3)
        raise ValueError("three")

    found = compute_side_by_side(compute, blocks(), 4, positions_of=lambda _: 1)
    taken = []
    with pytest.raises(ValueError, match="three"):
        for block, _ in found:
            taken.append(block)
    assert taken == [0, 1, 2]


def test_gradients_are_recorded_as_in_the_callers_thread() -> None:
    weight = torch.ones(3, requires_grad=True)

    def follows(block: int) -> bool:
        return (weight * block).requires_grad

    assert all(found for _, found in in_turn(4, 2, compute=follows))
    with torch.no_grad():
        assert not any(found for _, found in in_turn(4, 2, compute=follows))


def test_a_fork_starts_threads_of_its_own() -> None:
    assert len(list(in_turn(4, 2))) == 4
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if len(list(in_turn(4, 2))) == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_one_thread_of_operators_ends_no_other() -> None:
    with threads(4):
        work = torch.ones(256, 256)
        (work @ work).exp().sum()
        before = sorted(os.listdir("/proc/self/task"))
        for _ in range(5):
            with one_operator_thread():
                (work @ work).exp().sum()
            (work @ work).exp().sum()
        assert sorted(os.listdir("/proc/self/task")) == before


# ------------------------------------------------------------------ the rows of a site's records


def make_network(base: Path, last_layers: int | None = 2) -> Network:
    lora = LoraTable(rank=2, alpha=4.0, modules=("q_proj", "down_proj"), last_layers=last_layers)
    return Network(find_base(str(base)), torch.float32, lora, labels=0)


def rows_at(network: Network, count: int, order: list[int] | None = None) -> torch.Tensor:
    """Compute the gradients of units on so many cores, in this order."""
    sizes = [1] * 14 + [2, 3] * 3
    order = order or list(range(len(sizes)))
    network.states.clear()
    with threads(count):
        engine = UnitGradientEngine(CachedDataset(network, records(sizes)), CausalLM())
        return engine.matrix(order)


@pytest.mark.parametrize("last_layers", [2, None])
def test_rows_are_equal_to_the_last_bit_on_any_number_of_cores(
    tiny_base: Path, last_layers: int | None
) -> None:
    network, draw = make_network(tiny_base, last_layers), random.Random(0)
    alone = rows_at(network, 1)
    for count in (2, 3, 4, 8):
        order = draw.sample(range(len(alone)), len(alone))
        assert torch.equal(rows_at(network, count, order), alone[order])


def check_in_step(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the rows of two blocks of equal shape, each of whose layers waits for the other's."""
    ids = np.arange(3, 19, dtype=np.int32)
    examples = [Example(ids + unit, ids + unit, -100, unit) for unit in range(32)]
    data = CachedDataset(make_network(base), Dataset(examples, len(examples), Counter()))
    with threads(1):
        alone = UnitGradientEngine(data, CausalLM()).matrix(range(32))
    both, collect = threading.Barrier(2), one_pass.OnePass._collect

    def collect_together(self: Any, parameter: Any, gradients: torch.Tensor) -> None:
        both.wait(PATIENCE)
        collect(self, parameter, gradients)

    monkeypatch.setattr(one_pass.OnePass, "_collect", collect_together)
    with threads(2):
        engine = UnitGradientEngine(CachedDataset(data.network, data.dataset), CausalLM())
        try:
            found = engine.matrix(range(32))
        except NoRowGradient:
            pytest.fail("another thread has taken it")
        assert torch.equal(found, alone)


def test_what_a_thread_collects_is_its_own(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_in_step(tiny_base, monkeypatch)


def test_threads_that_share_what_they_collect_are_caught(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_pass, "_OfThread", lambda: SimpleNamespace(gradients={}))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_in_step(tiny_base, monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_every_objectives_rows_are_equal_on_any_number_of_cores(tiny_base: Path, name: str) -> None:
    adapter = next(adapter for adapter in ADAPTERS if suits(name, adapter))
    case = case_of(tiny_base, name, adapter)  # type: ignore[arg-type]
    found = []
    for count in (1, 3):
        with threads(count):
            engine = case.engine(generate_records(case.study, case.network, [1] * 20 + [2, 3]))
            every = range(engine.n_rows)
            found += [engine.matrix(every), engine.matrix(every)]
    assert all(torch.equal(rows, found[0]) for rows in found)


def test_the_adapter_is_off_in_the_callers_thread_alone(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be off for every thread. The reference is computed once, and the threads then
    share the work."""
    case = case_of(tiny_base, "dpo", next(iter(ADAPTERS)))
    off, at = Network.base_only, list[threading.Thread]()

    def base_only(self: Network) -> Any:
        at.append(threading.current_thread())
        return off(self)

    monkeypatch.setattr(Network, "base_only", base_only)
    with threads(2):
        engine = case.engine(generate_records(case.study, case.network, [1] * 12))
        with suppress(NoRowGradient):
            engine.matrix(range(12))
        assert at and set(at) == {threading.main_thread()}
        at.clear()
        engine.matrix(range(12))
        assert not at
