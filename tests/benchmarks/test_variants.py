"""What is timed against each other computes the same step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks import variants
from benchmarks.variants import VARIANTS, Setting, World

SETTING = Setting(base="tiny", records=3, tokens=16, labelled=0.5, optimizer="sgd")


@pytest.fixture(autouse=True)
def neither_clipped_nor_noised(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(variants, "C", 1e6)
    monkeypatch.setattr(variants, "SIGMA", 1e-13)
    monkeypatch.setattr(variants, "RATE", 1.0)
    yield


def moved(setting: Setting, name: str) -> dict[str, torch.Tensor]:
    """By how much one step moves each trained tensor, from an adapter that is the same for all."""
    torch.manual_seed(0)
    variant = VARIANTS[name](World(setting))
    model = variant.model if hasattr(variant, "model") else variant.data.network.model
    draw = torch.Generator().manual_seed(1)
    adapter = {n: p for n, p in sorted(model.named_parameters()) if "lora_" in n}
    for parameter in adapter.values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    before = {n: p.detach().clone() for n, p in adapter.items()}
    variant.step()
    return {n: p.detach() - before[n] for n, p in adapter.items()}


@pytest.mark.parametrize("train", ["AB", "B"])
@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "plain PEFT"])
def test_every_variant_takes_the_step_of_plain_peft(name: str, train: str) -> None:
    setting = replace(SETTING, train=train)
    plain, found = moved(setting, "plain PEFT"), moved(setting, name)
    assert plain.keys() == found.keys()
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-6)
        assert bool(value.any()) == ("lora_B" in key or train == "AB")


def test_other_targets_are_noticed() -> None:
    plain = moved(SETTING, "plain PEFT")
    other = moved(replace(SETTING, labelled=0.75), "ours")
    assert any(not torch.allclose(other[k], v, rtol=1e-3, atol=1e-6) for k, v in plain.items())
