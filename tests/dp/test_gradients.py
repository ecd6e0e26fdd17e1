"""Oracles (a) parity with a loop of one record, (b) row isolation, (c) neighbour sensitivity; each
with a twin that breaks the guarantee and is caught."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.dp import clip
from fedtune.core.dp.clip import Chunk
from fedtune.core.errors import ModelError
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives._interface import Batch
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training import unit_gradients
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import records


class BatchMean:
    """The twin: a language model's built-in loss, which averages over the batch's tokens."""

    def may_run_beside(self, batch: Batch) -> bool:
        return True

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        each = CausalLM().losses(network, batch)
        tokens = (batch.target_ids != -100).sum(dim=1)
        return each * tokens / tokens.sum()


def all_rows(engine: UnitGradientEngine, units: list[int] | None = None) -> torch.Tensor:
    if units is None:
        units = list(range(engine.data.dataset.n_units))
    return engine.matrix(units)


def one_by_one(engine: UnitGradientEngine) -> torch.Tensor:
    """Each unit's gradient by plain autograd, one record at a time."""
    data, rows = engine.data, []
    for members in data.dataset.by_unit:
        total = torch.zeros(engine.dimension, dtype=torch.float64)
        for index in members:
            (batch,) = data.batches([index])
            loss = engine.objective.losses(data.network, batch).sum()
            grads = torch.autograd.grad(loss, engine.parameters)
            total += torch.cat([g.double().flatten() for g in grads]) / len(members)
        rows.append(total)
    return torch.stack(rows)


def test_parity_with_micro_batches_of_one(engine: UnitGradientEngine) -> None:
    ours, plain = all_rows(engine).double(), one_by_one(engine)
    assert float((ours - plain).norm(dim=1).max() / plain.norm(dim=1).max()) < 1e-5


def test_parity_catches_a_loss_averaged_over_the_batch(network: Network) -> None:
    broken = UnitGradientEngine(CachedDataset(network, records([1, 3, 2, 1, 4, 2])), BatchMean())
    ours, plain = all_rows(broken).double(), one_by_one(broken)
    assert float((ours - plain).norm(dim=1).max() / plain.norm(dim=1).max()) > 0.1


def summed(rows: torch.Tensor, c: float, mode: str) -> torch.Tensor:
    total = torch.zeros(rows.shape[1], dtype=torch.int64)
    chunk = clip.Chunk(range(len(rows)), [rows])
    clip.add_clipped(total, chunk, clip.grid_for(c), c, mode)  # type: ignore[arg-type]
    return total


def moved_rows(engine: UnitGradientEngine, unit: int) -> torch.Tensor:
    """How far each unit's gradient moves when the first record of `unit` is replaced by another."""
    before = all_rows(engine)
    changed = copy.deepcopy(engine.data.dataset)
    index = changed.by_unit[unit][0]
    draw = np.random.default_rng(9)
    old = changed.examples[index]
    targets = draw.integers(3, 280, size=len(old.input_ids)).astype(np.int32)
    changed.examples[index] = type(old)(old.input_ids[::-1].copy(), targets, -100, unit)
    engine.data = CachedDataset(engine.data.network, changed)
    return (all_rows(engine) - before).norm(dim=1) / before.norm(dim=1)


@pytest.mark.parametrize("unit", range(6))
def test_row_isolation(engine: UnitGradientEngine, unit: int) -> None:
    """Units of one record and of several: they do not share micro-batches."""
    moved = moved_rows(engine, unit)
    assert float(moved[unit]) > 0.1
    assert float(torch.cat([moved[:unit], moved[unit + 1 :]]).max()) == 0


def test_row_isolation_catches_a_loss_averaged_over_the_batch(network: Network) -> None:
    # Unit 0's record shares a bucket, so a block, with unit 1's: short, and with as many targets.
    dataset, draw = records([1, 1]), np.random.default_rng(2)
    for unit in range(2):
        ids = draw.integers(3, 280, size=8, dtype=np.int32)
        targets = np.roll(ids, -1)
        targets[:2] = -100
        dataset.examples[unit] = type(dataset.examples[0])(ids, targets, -100, unit)
    engine = UnitGradientEngine(CachedDataset(network, dataset), BatchMean())
    before = all_rows(engine)
    shorter = dataset.examples[1].target_ids.copy()
    shorter[:3] = -100
    dataset.examples[1] = type(dataset.examples[1])(dataset.examples[1].input_ids, shorter, -100, 1)
    engine.data = CachedDataset(network, dataset)
    after = all_rows(engine)
    assert (
        float((after[0] - before[0]).norm() / before[0].norm()) > 1e-3
    )  # diluted by what fills the block; a row of one's own moves by 0


@pytest.mark.parametrize("mode", ["flat", "normalised"])
def test_removing_any_unit_moves_the_sum_by_at_most_c(
    engine: UnitGradientEngine, mode: str
) -> None:
    c, grid = 0.05, clip.grid_for(0.05)
    total = summed(all_rows(engine), c, mode)
    n = engine.data.dataset.n_units
    for gone in range(n):
        rest = all_rows(engine, [u for u in range(n) if u != gone])
        without = summed(rest, c, mode)
        moved = float(((total - without).double() * grid).norm())
        assert moved <= clip.sensitivity(c, engine.dimension, grid)


def test_clipping_records_instead_of_patients_is_caught(engine: UnitGradientEngine) -> None:
    """The twin: a patient with four records clipped one by one moves the sum by up to four C."""
    four = engine.data.dataset.by_unit[4]
    per_record = torch.zeros(engine.dimension, dtype=torch.float64)
    for index in four:
        (batch,) = engine.data.batches([index])
        loss = engine.objective.losses(engine.data.network, batch).sum()
        grads = torch.autograd.grad(loss, engine.parameters)
        per_record += clip.clip(torch.cat([g.flatten() for g in grads])[None], 0.001)[0]
    assert float(per_record.norm()) > 0.001 * 1.05
    ours = clip.clip(all_rows(engine, [4]), 0.001)
    assert float(ours.norm()) <= 0.001


def test_nothing_un_noised_stays_on_the_model(engine: UnitGradientEngine) -> None:
    all_rows(engine)
    for parameter in engine.parameters:
        assert parameter.grad is None
        assert not hasattr(parameter, "grad_sample")
    for module in engine.data.network.trained.modules():
        assert "forward" not in vars(module)
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            assert not module._forward_hooks
            assert not module._backward_hooks


def test_the_gradients_that_an_engine_gives_are_overwritten(engine: UnitGradientEngine) -> None:
    """Also those of a layout of which the rows are a copy."""
    inner, given = engine._engine, list[torch.Tensor]()

    class Watched:
        name, watching, side_by_side = inner.name, inner.watching, inner.side_by_side

        def __call__(self, losses: torch.Tensor) -> list[torch.Tensor | None]:
            gradients = list(inner(losses))
            given.extend(g for g in gradients if g is not None)
            return gradients

    engine._engine = Watched()  # type: ignore[assignment]
    for chunk in engine(list(range(engine.n_rows))):
        assert any(float(part.abs().max()) > 0 for part in chunk.parts)
        chunk.wipe()
    assert given and not any(gradient.any() for gradient in given)
    if inner.name == "one-pass":
        assert not all(gradient.is_contiguous() for gradient in given)


def test_what_was_averaged_before_a_failure_is_overwritten(
    engine: UnitGradientEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, means = UnitGradientEngine._of_records, list[torch.Tensor]()

    def of_records(self: UnitGradientEngine, records: list[int], *more: Any) -> Iterator[Any]:
        yield next(whole(self, records, *more))
        assert any(part.any() for part in means)
        raise RuntimeError

    def kept(rows: Any, parts: list[torch.Tensor]) -> Chunk:
        means.extend(parts)
        return Chunk(rows, parts)

    monkeypatch.setattr(UnitGradientEngine, "_of_records", of_records)
    monkeypatch.setattr(unit_gradients, "Chunk", kept)
    with engine._engine.watching(), pytest.raises(RuntimeError):
        engine._means([1], lambda *_: None, False)
    assert means and not any(part.any() for part in means)


def test_a_blocks_gradients_are_overwritten_if_they_cannot_be_put_together(
    engine: UnitGradientEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine computed, and what was already flattened of it."""
    compute, computed = engine._engine.__call__, list[torch.Tensor]()
    has_row_per_tile, asked = engine.data.network.has_row_per_tile, list[int]()

    def gradients(losses: torch.Tensor) -> Any:
        found = compute(losses)
        computed.extend(found)
        assert any(part.any() for part in found)
        return found

    def short_of_memory(parameter: torch.Tensor) -> bool:
        asked.append(1)
        if len(asked) == 2:
            raise MemoryError
        return has_row_per_tile(parameter)

    (batch,) = engine.data.batches([0])
    with engine._engine.watching(), pytest.raises(MemoryError):
        monkeypatch.setattr(engine, "_engine", gradients)
        monkeypatch.setattr(engine.data.network, "has_row_per_tile", short_of_memory)
        engine._per_record(batch)
    assert computed and not any(part.any() for part in computed)


def test_a_unit_that_is_tried_again_has_nothing_beside_it_not_even_its_own_records(
    engine: UnitGradientEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose memory holds one block at a time."""
    whole, hidden = all_rows(engine), engine.data.network.hidden

    def with_memory_for_one(*given: Any, **named: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        return hidden(*given, **named)

    monkeypatch.setattr(engine.data.network, "hidden", with_memory_for_one)
    monkeypatch.setattr(engine.data, "cores", 3)
    assert torch.equal(all_rows(engine), whole)


def test_a_library_that_panics_over_a_row_leaves_out_that_row_alone(
    engine: UnitGradientEngine,
) -> None:
    """A panic of Rust code is no Exception."""
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    whole, read = all_rows(engine), engine.data.compute_blocks
    (bad,) = engine.data.dataset.by_unit[2][:1]

    def compute_blocks(
        compute: Any, indices: Sequence[int], *more: Any, **named: Any
    ) -> Iterator[tuple[Batch, Any]]:
        if bad in indices:
            raise panic("of a record")
        yield from read(compute, indices, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.data, "compute_blocks", compute_blocks)
        try:
            left = all_rows(engine)
        except panic:
            left = torch.zeros_like(whole)
    others = [row for row in range(engine.n_rows) if row != 2]
    assert torch.equal(left[others], whole[others])
    assert not left[2].any() and whole[2].any()


def test_a_missing_gradient_is_an_error(engine: UnitGradientEngine) -> None:
    """Trap 16: a trainable layer that takes no part must not be passed over in silence."""
    stray = torch.nn.Parameter(torch.zeros(3))
    stray.grad_sample = None  # type: ignore[attr-defined]
    engine.parameters.append(stray)
    engine.trained.append(stray.detach())
    engine._factors.append(None)
    engine.dimension += stray.numel()
    with pytest.raises(ModelError, match="no per-record gradient"):
        all_rows(engine)


def test_equal_to_opacus_own_optimizer(network: Network) -> None:
    """Same clip, σ = 0, one record per unit: Opacus' DPOptimizer gives the same mean gradient."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    data = CachedDataset(network, records([1] * 6))
    engine = UnitGradientEngine(data, CausalLM())
    ours = clip.clip(all_rows(engine), 0.05).sum(dim=0) / 6
    watched = GradSampleModule(network.trained, loss_reduction="sum", strict=False)
    watched.train()
    optimizer = DPOptimizer(
        torch.optim.SGD(engine.parameters, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=0.05,
        expected_batch_size=6,
        loss_reduction="mean",
    )
    try:
        with pytest.warns(UserWarning, match="Full backward hook"):
            for batch in data.batches(range(6)):
                CausalLM().losses(network, batch).sum().backward()
        # Several micro-batches leave a list of per-record gradients; DPOptimizer takes it so.
        for parameter in engine.parameters:
            if isinstance(parameter.grad_sample, list):
                parameter.grad_sample = torch.cat(parameter.grad_sample)
        optimizer.pre_step()
        theirs = torch.cat([p.grad.flatten() for p in engine.parameters]).double()
    finally:
        watched.cleanup()
        network.trained.eval()
        for parameter in engine.parameters:
            parameter.grad = None
    assert float((ours - theirs).norm() / ours.norm()) < 1e-4
