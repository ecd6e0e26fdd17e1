"""Fixtures of these tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.models import prefix_store
from fedtune.core.models.network import Network
from fedtune.core.models.prefix_store import PREFIX_STORE
from tests.models.test_network import MODULES, randomise


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


@pytest.fixture
def everything_is_dropped() -> Iterator[None]:
    """What other tests of this process still hold is put aside meanwhile."""
    outside = dict(vars(PREFIX_STORE))
    vars(PREFIX_STORE).update(vars(prefix_store.PrefixStore()))
    yield
    gc.collect()
    assert (PREFIX_STORE.in_memory, PREFIX_STORE.on_disk) == (0, 0)
    vars(PREFIX_STORE).update(outside)
