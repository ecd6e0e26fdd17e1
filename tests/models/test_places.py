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
from fedtune.core.models import places
from fedtune.core.models.cache import Bucket, CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.random_records import random_records
from tests.dp.conftest import study
from tests.models.test_products import found_by

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


def test_a_processor_without_avx2_computes_each_record_by_itself(tiny_encoder: Path) -> None:
    """As MKL and PyTorch compute there: the setting that keeps rows apart has no effect on it."""
    old = {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in old.items():
            patch.setenv(name, value)
        if not found_by("import fedtune"):
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
    """Where the last block's MLP runs at the positions with a target alone, a block of fewer than
    eight records has a multiple of eight of them."""
    network = made(tiny_base, module)
    assert network.narrows is (module == "q_proj")
    data = cached(network, tiny_base)
    data._buckets = [Bucket(40, targets=count) for count in (1, 2, 4, 8, 16)]
    sizes = [size for _, size, _ in data._block_groups(range(5), None)]
    assert sizes == ([1, 1, 1, 6, 6] if network.narrows else [6] * 5)
    data._buckets = [Bucket(8, targets=count) for count in (1, 2, 4, 8)]
    assert {size for _, size, _ in data._block_groups(range(4), None)} == {32}
