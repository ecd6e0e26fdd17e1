"""A row of a block does not depend on where it lies, on this machine's processor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedtune.core import boot
from fedtune.core.bases.architecture import has_whole_widths
from fedtune.core.models.cache import BLOCK_POSITIONS, _fit_to_vectors
from fedtune.core.objectives import kto
from fedtune.core.objectives._shapes import EIGHT, padded_length

PRODUCTS = """
import torch
torch.set_num_threads(1)
draw, found = torch.Generator().manual_seed(0), set()
for columns in (1, 2, 3, 4, 8, 18):
    for width in (32, 64, 576):
        for rows in ROWS:
            left, right = (torch.randn(n, width, generator=draw) for n in (rows, columns))
            order = torch.randperm(rows, generator=draw)
            plain = torch.nn.functional.linear(left, right)
            if not torch.equal(torch.nn.functional.linear(left[order], right), plain[order]):
                found.add(columns)
print("found", *sorted(found))
"""
# A block of several records has such a number of rows (core/models/places.py).
OF_A_BLOCK = (EIGHT, 5 * EIGHT, 256)
ANY = (2, 5, 13, 39, *OF_A_BLOCK)


def found_by(first: str, rows: tuple[int, ...]) -> list[int]:
    """The numbers of columns of products with such numbers of rows whose rows follow from their
    places, in a process that first runs this statement."""
    given = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    ran = [sys.executable, "-c", f"{first}\nROWS = {rows}\n{PRODUCTS}"]
    said = subprocess.run(ran, env=given, capture_output=True, text=True, check=True).stdout
    return [int(word) for word in said.split()[1:]]


def test_no_row_of_a_blocks_product_follows_its_place() -> None:
    assert found_by("import fedtune", OF_A_BLOCK) == []


def test_with_mkls_setting_none_does_whatever_the_number_of_rows() -> None:
    """On AMD's processors there is no such setting: there the rows of a product of one column do
    follow their place where eight does not divide their number."""
    if "GenuineIntel" not in boot.CPU_INFO.read_text(encoding="utf-8"):
        pytest.skip("fedtune sets MKL for Intel's processors alone")
    assert found_by("import fedtune", ANY) == []


def test_twin_of_one_to_three_columns_they_do_without_fedtune() -> None:
    if not (found := found_by("", ANY)):
        pytest.skip("on this processor no row does, with or without the setting")
    assert {*found} <= {1, 2, 3}


def test_where_mkl_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for vendor, own, told in (
        ("GenuineIntel", "", "AUTO,STRICT"),
        ("GenuineIntel", "AVX2", "AUTO,STRICT"),
        ("GenuineIntel", "AVX2,STRICT", "AVX2,STRICT"),
        ("GenuineIntel", "COMPATIBLE", "AUTO,STRICT"),
        ("GenuineIntel", "SSE4_2,STRICT", "AUTO,STRICT"),
        ("AuthenticAMD", "", ""),
    ):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
        monkeypatch.setattr(boot, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setenv("MKL_CBWR", own)
        boot.fix_products()
        assert os.environ["MKL_CBWR"] == told
    monkeypatch.setattr(boot, "CPU_INFO", tmp_path / "none")
    monkeypatch.delenv("MKL_CBWR")
    boot.fix_products()
    assert "MKL_CBWR" not in os.environ


# ------------------------------------------------------------------- functions of single numbers

FUNCTIONS = (torch.sigmoid, functional.silu, functional.softplus, functional.gelu, torch.tanh)
MORE = (torch.exp, functional.logsigmoid)
WIDTH = 8  # the least number of columns for which blocks are made


def follows_place(function: Callable[[Any], Any], rows: int, numbers: int, kind: Any) -> bool:
    """Whether a row of so many numbers gets other bits in another place, or another gradient."""
    draw = torch.Generator().manual_seed(rows * numbers)
    values = (3 * torch.randn(rows, numbers, generator=draw) + 2).to(kind)
    order = torch.arange(rows - 1, -1, -1)
    found = []
    for given in (values, values[order]):
        given = given.clone().requires_grad_(True)
        results = function(given)
        results.sum().backward()
        found.append((results.detach(), given.grad))
    (plain, slopes), (moved, moved_slopes) = found
    same = torch.equal(plain[order], moved) and torch.equal(slopes[order], moved_slopes)
    return not same


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_no_row_of_a_block_follows_its_place_in_a_function(kind: Any) -> None:
    """Blocks of every length and of the most rows that a plan's adapter may leave."""
    for length in sorted({padded_length(n) for n in range(1, 257)}):
        most = max(1, BLOCK_POSITIONS["cpu"] // length)
        for rows in {_fit_to_vectors(min(most, limit), length) for limit in range(1, most + 1)}:
            assert 1 <= rows <= most
            for function in (*FUNCTIONS, *MORE):
                for numbers in (length * WIDTH, length * 24):
                    assert not follows_place(function, rows, numbers, kind), (
                        function,
                        rows,
                        length,
                    )
                if kind is torch.float32 and rows > 1:
                    assert not follows_place(function, rows, 1, kind), (function, rows)


def test_twin_other_numbers_of_rows_follow_their_place() -> None:
    flawed = [n for n in range(2, 100) if follows_place(torch.sigmoid, n, 1, torch.float32)]
    if not flawed:
        pytest.skip("on this processor no row does")
    assert not {_fit_to_vectors(n, 1) for n in range(1, 300)} & {*flawed}


@pytest.mark.parametrize(("inner", "shares"), [(40, True), (43, False)])
def test_a_base_of_odd_widths_shares_no_block(inner: int, shares: bool) -> None:
    """Its scores of the vocabulary's tokens may have any number."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=1,
    )  # fmt: skip
    assert has_whole_widths(LlamaForCausalLM(config)) is shares
    config = GPT2Config(vocab_size=97, n_embd=24, n_inner=inner, n_layer=1, n_head=3)
    assert has_whole_widths(GPT2LMHeadModel(config)) is shares


@pytest.mark.parametrize("rows", [2, 9, 17, 33, 48, 63, 82, 143])
def test_a_judged_completions_loss_follows_from_itself(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a reference point at which a last digit of σ is 4 % of 1 - σ, for any number of rows.

    Twin: by `1 - sigmoid` the loss of a row follows its place, on processors with vectors."""
    zeros = SimpleNamespace(total=torch.zeros(rows, requires_grad=True))
    monkeypatch.setattr(kto, "likelihood", lambda *_: zeros)
    monkeypatch.setattr(kto, "reference", lambda *_: SimpleNamespace(total=torch.zeros(rows)))
    batch: Any = SimpleNamespace(label=torch.zeros(rows))
    network: Any = None
    losses = kto.KTO(reference_point=127.03706359863281).losses(network, batch)
    losses.sum().backward()
    assert zeros.total.grad is not None
    assert len({*losses.tolist()}) == len({*zeros.total.grad.tolist()}) == 1
