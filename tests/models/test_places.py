"""Where a row's digits follow from its place on this machine, each record is computed by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.data.dataset import NO_TARGET
from fedtune.core.models import cache as cache_module
from fedtune.core.models import loss as loss_module
from fedtune.core.models import places
from fedtune.core.models.cache import Bucket, CachedDataset
from fedtune.core.models.network import BLOCK_POSITIONS, Network
from fedtune.core.models.random_records import random_records
from fedtune.core.objectives._shapes import split_evenly
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import study
from tests.models.test_products import OF_A_BLOCK, found_by

CPU = torch.device("cpu")
LINEAR, SILU = functional.linear, functional.silu


@pytest.fixture(autouse=True)
def tried_anew() -> Iterator[None]:
    for tried in (places._product_keeps_digits, places._functions_keep_digits):
        tried.cache_clear()
    yield
    for tried in (places._product_keeps_digits, places._functions_keep_digits):
        tried.cache_clear()


def made(base: Path, *modules: str) -> Network:
    lora = LoraTable(rank=2, modules=modules, last_layers=1)
    return Network(find_base(str(base)), torch.float32, lora, labels=0)


def cached(network: Network, base: Path) -> CachedDataset:
    return CachedDataset(network, random_records(network, study(base={"model": str(base)})))


def last_row_by_other_digits(left: torch.Tensor, *rest: Any) -> torch.Tensor:
    product = LINEAR(left, *rest)
    product[-1] = torch.nextafter(product[-1], torch.tensor(torch.inf))
    return product


def last_number_by_other_digits(values: torch.Tensor) -> torch.Tensor:
    more = torch.zeros_like(values)
    more[-1] = 1e-6
    return SILU(values) + more


@pytest.mark.parametrize("how", ["as it is", "a product's last row", "a function's last number"])
def test_records_share_a_block_where_rows_keep_their_digits(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "a product's last row":
        monkeypatch.setattr(places.functional, "linear", last_row_by_other_digits)
    elif how == "a function's last number":
        monkeypatch.setattr(places, "FUNCTIONS", (last_number_by_other_digits,))
    network = made(tiny_base, "down_proj")
    shares = how == "as it is"
    assert network.shares_blocks is shares and network.keeps_apart
    monkeypatch.undo()
    data = cached(network, tiny_base)
    sizes = {size for _, size, _ in data._block_groups(range(8), None)}
    assert (max(sizes) > 1) is shares
    assert (data._prefix_block(Bucket(16)) > 1) is shares


@pytest.mark.long
def test_a_processor_without_avx2_computes_each_record_by_itself(tiny_encoder: Path) -> None:
    """As MKL and PyTorch compute there: the setting that keeps rows apart has no effect on it."""
    old = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in old.items():
            patch.setenv(name, value)
        if not found_by("import fedtune", OF_A_BLOCK):
            pytest.skip("no row follows its place here, whatever MKL is told")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from fedtune.core.models.network import Network\n"
        "from fedtune.core.bases.find import find_base\n"
        "print(Network(find_base(sys.argv[1]), torch.float32, None, labels=2).shares_blocks)"
    )
    ran = [sys.executable, "-c", code, str(tiny_encoder)]
    said = subprocess.run(ran, env=os.environ | old, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False"]


@pytest.mark.parametrize("module", ["q_proj", "down_proj"])
def test_a_block_is_whole_at_the_positions_that_are_left(tiny_base: Path, module: str) -> None:
    """The head runs at the positions with a target alone, and so may the last block's MLP: a block
    of fewer than eight records has a multiple of eight of them."""
    network = made(tiny_base, module)
    data = cached(network, tiny_base)
    data._buckets = [Bucket(40, targets=count) for count in (1, 2, 4, 8, 16)]
    assert [size for _, size, _ in data._block_groups(range(5), None)] == [1, 1, 1, 6, 6]
    data._buckets = [Bucket(8, targets=count) for count in (1, 2, 4, 8)]
    assert {size for _, size, _ in data._block_groups(range(4), None)} == {32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_product_of_a_block_has_a_number_of_rows_that_is_tried(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Of every length, with one target and with all: layers, head and their gradients. Twin: a
    block of six records whose head runs at one position each."""
    lora = LoraTable(rank=2, modules=("q_proj", "down_proj"))
    network = Network(find_base(str(tiny_base)), dtype, lora, labels=0)
    table = study(base={"model": str(tiny_base)})
    honest, seen = loss_module._apply, list[tuple[int, int]]()

    def noted(states: torch.Tensor, *rest: torch.Tensor) -> Any:
        seen.append((len(states), int(sizes[-1])))
        return honest(states, *rest)

    monkeypatch.setattr(loss_module, "_apply", noted)
    sizes = list[int]()
    for length in (16, 40, 56, 80, 96, 128):
        records = random_records(network, table, count=12, length=length)
        for example in records.examples:
            example.target_ids[:-1] = NO_TARGET
        data = CachedDataset(network, records)
        sizes += [size for _, size, _ in data._block_groups(range(12), None)][:1]
        UnitGradientEngine(data, table.objective.resolved).matrix(range(12))
    assert len({rows for rows, _ in seen}) > 1
    assert all(rows % 8 == 0 or size == 1 for rows, size in seen)
    assert max(rows for rows, _ in seen) <= BLOCK_POSITIONS["cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_fit_to_vectors", lambda rows, *_: rows)
        sizes.append(6)
        UnitGradientEngine(data, table.objective.resolved).matrix(range(12))
    assert not all(rows % 8 == 0 or size == 1 for rows, size in seen)


@pytest.mark.parametrize("total", [1, 7, 8, 40, 200, 256, 1000])
def test_parts_of_a_heads_positions_have_a_number_that_is_tried(total: int) -> None:
    for limit in (1, 43, 52, 170, 10_000):
        parts = [part for part, _ in split_evenly(total, limit)]
        rows = {part.stop - part.start for part in parts}
        assert len(rows) == 1 and max(rows) <= max(limit, 1) + 7
        assert len(parts) == 1 or rows.pop() % 8 == 0
        assert sorted({n for part in parts for n in range(part.start, part.stop)}) == [
            *range(total)
        ]
