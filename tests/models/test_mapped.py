"""A base lies in memory once: its parameters are pages of a file, and hold what the base says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune.core.bases import find, shared_memory
from fedtune.core.bases.find import cache_dir, find_base, load_backbone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))


def pages(file: Path) -> list[range]:
    """The addresses at which this process has `file` mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(file.resolve())]
    return [range(int(low, 16), int(high, 16)) for low, high in spans]


def within(model: torch.nn.Module, file: Path) -> bool:
    spans = pages(file)
    return all(any(p.data_ptr() in span for span in spans) for p in model.parameters())


def converted() -> Path:
    (found,) = (cache_dir() / "mapped").glob("*.safetensors")
    return found


def plain(folder: Path) -> dict[str, torch.Tensor]:
    """The base as transformers converts it, without us."""
    model = find._backbone(find_base(str(folder)), torch.bfloat16)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    found = dict(model.named_parameters())
    return found.keys() == expected.keys() and all(
        p.dtype == torch.bfloat16 and torch.equal(p, expected[name]) for name, p in found.items()
    )


def test_a_base_in_its_stored_type_is_mapped_as_it_is(tiny_base: Path) -> None:
    model = load_backbone(find_base(str(tiny_base)), torch.float32)
    assert within(model, tiny_base / "model.safetensors")
    assert not (cache_dir() / "mapped").exists()


def test_a_converted_base_is_written_once_and_mapped(tiny_base: Path) -> None:
    expected, found = plain(tiny_base), find_base(str(tiny_base))
    first = load_backbone(found, torch.bfloat16)
    written = converted().stat()
    second = load_backbone(found, torch.bfloat16)
    assert converted().stat().st_mtime_ns == written.st_mtime_ns
    for model in (first, second):
        assert within(model, converted()) and same(model, expected)


def test_without_the_file_the_copy_is_a_process_own(tiny_base: Path) -> None:
    """Twin: as transformers leaves it, no parameter is a page of a file."""
    model = find._backbone(find_base(str(tiny_base)), torch.bfloat16)
    assert not within(model, tiny_base / "model.safetensors")


@pytest.mark.parametrize("how", ["altered", "cut off", "another base"])
def test_a_file_that_holds_anything_else_is_written_anew(tiny_base: Path, how: str) -> None:
    expected, found = plain(tiny_base), find_base(str(tiny_base))
    load_backbone(found, torch.bfloat16)
    path = converted()
    if how == "altered":
        arrays = load_file(path)
        name = sorted(arrays)[0]
        flat = arrays[name].clone()
        flat.view(-1)[0] += 1
        save_file(arrays | {name: flat}, path)
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file({"x": torch.zeros(3)}, path)
    model = load_backbone(found, torch.bfloat16)
    assert same(model, expected) and within(model, converted())


def test_where_it_cannot_be_written_the_model_keeps_its_own(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared_memory, "save_file", full)
    model = load_backbone(find_base(str(tiny_base)), torch.bfloat16)
    assert same(model, plain(tiny_base))
    assert "cannot be kept (OSError)" in caplog.text
    assert not list((cache_dir() / "mapped").glob("*.new"))


def test_a_cache_that_cannot_be_written_costs_the_sharing_alone(
    tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    model = load_backbone(find_base(str(tiny_base)), torch.bfloat16)
    assert same(model, plain(tiny_base))
