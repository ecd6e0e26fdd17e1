"""A row of a matrix product does not depend on where it lies, on this machine's processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.core import boot

PRODUCTS = """
import torch
torch.set_num_threads(1)
draw, found = torch.Generator().manual_seed(0), set()
for columns in (1, 2, 3, 4, 8, 18):
    for width in (32, 64, 576):
        for rows in (2, 5, 8, 13, 39, 256):
            left, right = (torch.randn(n, width, generator=draw) for n in (rows, columns))
            order = torch.randperm(rows, generator=draw)
            plain = torch.nn.functional.linear(left, right)
            if not torch.equal(torch.nn.functional.linear(left[order], right), plain[order]):
                found.add(columns)
print("found", *sorted(found))
"""


def found_by(first: str) -> list[int]:
    """The numbers of columns of products whose rows follow from their places, in a process that
    first runs this statement."""
    given = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    ran = [sys.executable, "-c", f"{first}\n{PRODUCTS}"]
    said = subprocess.run(ran, env=given, capture_output=True, text=True, check=True).stdout
    return [int(word) for word in said.split()[1:]]


def test_no_row_of_a_product_follows_its_place() -> None:
    assert found_by("import fedtune") == []


def test_twin_of_one_to_three_columns_they_do_without_fedtune() -> None:
    if not (found := found_by("")):
        pytest.skip("on this processor no row does, with or without the setting")
    assert {*found} <= {1, 2, 3}


def test_where_mkl_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for vendor, own, told in (
        ("GenuineIntel", "", "AUTO,STRICT"),
        ("GenuineIntel", "AVX2", "AUTO,STRICT"),
        ("GenuineIntel", "AVX2,STRICT", "AVX2,STRICT"),
        ("GenuineIntel", "COMPATIBLE", "COMPATIBLE"),
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
