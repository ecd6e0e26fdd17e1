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

    def __init__(self, bad: int, error: type[BaseException] = MemoryError) -> None:
        self.bad, self.error = bad, error

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        if self.bad in batch.index.tolist():
            raise self.error(NAME)
        return CausalLM().losses(network, batch)


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
def test_a_record_that_raises_costs_its_own_unit(
    data: CachedDataset, engine: EngineName, unit: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One that shares its block with others, and one of a unit of several."""
    usual = rows(data, CausalLM(), engine)
    try:
        found = rows(data, Raises(first(data, unit)), engine)
    except MemoryError:
        pytest.fail("one record's error is the step's")
    others = [at for at in range(len(SIZES)) if at != unit]
    assert torch.equal(found[others], usual[others])
    assert not found[unit].any()
    assert NAME not in caplog.text


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
    raises = Raises(first(data, BAD)).losses
    given = SimpleNamespace(losses=raises, record_format=CausalLM.record_format)
    monkeypatch.setitem(plan.objective.__dict__, "resolved", given)
    try:
        found = all_rows(plan, data)
    except MemoryError:
        pytest.fail("one record's error is the answer's")
    others = [at for at in range(len(SIZES)) if at != BAD]
    assert torch.equal(found[others], usual[others])
    assert not torch.isfinite(found[BAD]).all()  # and so is nothing, not even one unit


def test_what_the_layers_decide_is_still_an_error(data: CachedDataset) -> None:
    with pytest.raises(NoRowGradient):
        rows(data, Raises(first(data, BAD), NoRowGradient), "auto")
