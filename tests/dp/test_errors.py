"""Trap 33: what a record makes a library raise says nothing, and costs its own unit alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives._interface import Batch
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.engines import EngineName
from fedtune.core.training.unit_gradients import NoRowGradient, UnitGradientEngine
from tests.dp.conftest import records, study
from tests.query_rows import all_rows

SIZES, BAD = [1, 3, 1, 1, 2, 1], 2  # records of each unit; of which one record is bad
NAME = "Mrs Example"


class Raises:
    """A loss that a library cannot compute where one record is among the others."""

    def __init__(
        self, bad: int, error: type[BaseException] = MemoryError, when: str = "before"
    ) -> None:
        self.bad, self.error, self.when = bad, error, when

    def may_run_beside(self, batch: Batch) -> bool:
        return True

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        found = self.bad in batch.index.tolist()
        if found and self.when == "before":
            raise self.error(NAME)
        losses = CausalLM().losses(network, batch)
        if found and self.when == "after the forward pass":
            raise self.error(NAME)
        return RaisesInBackward.apply(losses, self.error) if found else losses  # type: ignore[no-any-return, no-untyped-call]


class RaisesInBackward(torch.autograd.Function):
    """Return the losses, and raise when their gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, losses: torch.Tensor, error: type[BaseException]) -> torch.Tensor:
        ctx.error = error
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise ctx.error(NAME)


def first(data: CachedDataset, unit: int) -> int:
    return data.dataset.by_unit[unit][0]


def rows(data: CachedDataset, objective: Any, engine: EngineName) -> torch.Tensor:
    made = UnitGradientEngine(data, objective, engine=engine)
    return made.matrix(range(data.dataset.n_units))


@pytest.fixture
def data(network: Network) -> CachedDataset:
    return CachedDataset(network, records(SIZES))


@pytest.mark.parametrize("engine", ["auto", "opacus"])
@pytest.mark.parametrize("unit", [BAD, 4])
@pytest.mark.parametrize("when", ["before", "after the forward pass", "in the backward pass"])
def test_a_record_that_raises_costs_its_own_unit(
    data: CachedDataset, engine: EngineName, unit: int, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One that shares its block with others, and one of a unit of several; and nothing of it is
    left in the network, with which the next step computes the others."""
    usual = rows(data, CausalLM(), engine)
    parts = list(data.network.trained.modules())
    attributes = [set(vars(part)) for part in parts]
    try:
        found = rows(data, Raises(first(data, unit), when=when), engine)
    except (MemoryError, NoRowGradient):
        pytest.fail("one record's error is the step's")
    others = [at for at in range(len(SIZES)) if at != unit]
    assert torch.equal(found[others], usual[others])
    assert not found[unit].any()
    assert NAME not in caplog.text
    assert [set(vars(part)) for part in parts] == attributes, "it is left on a layer"
    try:
        assert torch.equal(rows(data, CausalLM(), engine), usual)
    except NoRowGradient:
        pytest.fail("one record's error is the next step's")


def test_a_record_whose_states_cannot_be_computed_costs_its_own_unit(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = rows(CachedDataset(network, records(SIZES)), CausalLM(), "auto")
    network.states.clear()
    honest, data = Network.prefix, CachedDataset(network, records(SIZES))
    bad = data.dataset.examples[first(data, BAD)].input_ids.tolist()

    def prefix(self: Network, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if any(row[: len(bad)] == bad for row in ids.tolist()):
            raise IndexError(NAME)
        return honest(self, ids, *rest)

    monkeypatch.setattr(Network, "prefix", prefix)
    try:
        found = rows(data, CausalLM(), "auto")
    except (IndexError, RuntimeError):
        pytest.fail("one record's error is the step's")
    others = [at for at in range(len(SIZES)) if at != BAD]
    assert torch.equal(found[others], usual[others]) and not found[BAD].any()


def test_a_held_out_record_that_raises_costs_its_own_unit(
    data: CachedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = study()
    usual = all_rows(plan, data)
    raises = Raises(first(data, BAD))
    given = SimpleNamespace(
        losses=raises.losses,
        may_run_beside=raises.may_run_beside,
        record_format=CausalLM.record_format,
    )
    monkeypatch.setitem(plan.objective.__dict__, "resolved", given)
    try:
        found = all_rows(plan, data)
    except MemoryError:
        pytest.fail("one record's error is the answer's")
    others = [at for at in range(len(SIZES)) if at != BAD]
    assert torch.equal(found[others], usual[others])
    assert not torch.isfinite(found[BAD]).all()  # and so is nothing, not even one unit


def test_what_the_layers_decide_is_an_error_of_checks_and_of_no_round(data: CachedDataset) -> None:
    objective: Any = Raises(first(data, BAD), NoRowGradient)
    with pytest.raises(NoRowGradient):
        rows(data, objective, "auto")
    made = UnitGradientEngine(data, objective, engine="auto")
    try:
        chunks = [(chunk.rows, chunk.flat()) for chunk in made(list(range(len(SIZES))))]
    except NoRowGradient:
        pytest.fail("one record's error is the round's")
    silent = {
        row
        for rows_, flat in chunks
        for row, each in zip(rows_, flat, strict=True)
        if not each.any()
    }
    assert silent == {BAD}
