"""Traps 18, 19, 27: no record's gradient depends on who else is in the batch."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.data.dataset import Dataset
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.classify import Classify
from fedtune.core.training.engines import EngineName
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import records


def labelled(sizes: list[int]) -> Dataset:
    """Records of equal length, so that they share a batch."""
    dataset, draw = records(sizes), np.random.default_rng(4)
    for index, e in enumerate(dataset.examples):
        ids = draw.integers(3, 280, size=12, dtype=np.int32)
        none = np.full_like(ids, -100)
        dataset.examples[index] = type(e)(ids, none, index % 3, e.unit)
    return dataset


def encoder(base: Path, kind: str) -> Network:
    lora = LoraTable(rank=4, alpha=8.0, modules=("query",)) if kind == "adapter" else None
    network = Network(find_base(str(base)), torch.float32, lora, labels=3)
    draw = np.random.default_rng(5)
    network.load_trainable(
        {n: draw.normal(size=a.shape).astype(np.float32) for n, a in network.trainable().items()}
    )
    return network


def rows(network: Network, dataset: Dataset, wanted: EngineName = "auto") -> torch.Tensor:
    engine = UnitGradientEngine(CachedDataset(network, dataset), Classify(), engine=wanted)
    return engine.matrix(range(dataset.n_units))


@pytest.mark.parametrize("wanted", ["auto", "opacus"])
@pytest.mark.parametrize("kind", ["head", "adapter"])
@pytest.mark.parametrize("unit", [0, 1], ids=["one record", "several"])
def test_a_classifiers_rows_are_their_own(
    tiny_encoder: Path, kind: str, wanted: EngineName, unit: int
) -> None:
    """Units of one record share batches with each other, and units of several with each other: of
    either kind one is changed, and others are there."""
    network, dataset = encoder(tiny_encoder, kind), labelled([1, 2, 1, 2, 1])
    before, changed = rows(network, dataset, wanted), copy.deepcopy(dataset)
    at = dataset.by_unit[unit][0]
    old = changed.examples[at]
    changed.examples[at] = type(old)(old.input_ids[::-1].copy(), old.target_ids, 2, old.unit)
    moved = (rows(network, changed, wanted) - before).norm(dim=1) / before.norm(dim=1)
    assert float(moved[unit]) > 0.01
    assert float(torch.cat([moved[:unit], moved[unit + 1 :]]).max()) < 1e-4


@pytest.mark.parametrize("wanted", ["auto", "opacus"])
def test_no_dropout_mask_is_drawn(tiny_encoder: Path, wanted: EngineName) -> None:
    """Trap 19: this base has dropout in its configuration; a mask is shared by a batch's rows."""
    network, dataset = encoder(tiny_encoder, "adapter"), labelled([1, 2, 1, 1])
    assert network.model.config.hidden_dropout_prob > 0
    assert torch.equal(rows(network, dataset, wanted), rows(network, dataset, wanted))


def test_padding_is_a_records_own(tiny_base: Path) -> None:
    """Trap 19: the length that a record is padded to does not depend on who else is drawn."""
    lora = LoraTable(rank=2, alpha=4.0, modules=("q_proj",))
    data = CachedDataset(
        Network(find_base(str(tiny_base)), torch.float32, lora, labels=0), records([9])
    )
    everyone = range(len(data.dataset.examples))
    together = {
        i: batch.mask.shape[1] for batch in data.batches(everyone) for i in batch.index.tolist()
    }
    assert len(set(together.values())) > 1
    for index in everyone:
        (batch,) = data.batches([index])
        assert batch.mask.shape[1] == together[index]
