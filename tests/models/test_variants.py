"""Variants of LoRA: one is admitted since the oracles pass, another refused since they do not."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer

from fedtune.core.config import LoraTable
from fedtune.core.models import lora as lora_module
from fedtune.core.models.build import build
from fedtune.core.training import selftest
from tests.models.test_quantise import study_of

TABLE = {"rank": 4, "alpha": 8.0, "modules": ["q_proj", "down_proj"], "last_layers": 2}


def test_rslora_is_a_scaling_and_the_oracles_pass(tiny_base: Path, tmp_path: Path) -> None:
    study = study_of(tiny_base, None, lora=TABLE | {"variant": "rslora"})
    assert study.lora is not None and study.lora.scaling == 4.0
    network = build(study)
    layers = [m for m in network.model.modules() if isinstance(m, LoraLayer)]
    assert layers and {layer.scaling["default"] for layer in layers} == {4.0}
    network.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is True
    for result in selftest.run(study):
        assert result.passed, result


def test_plain_lora_scales_by_the_rank() -> None:
    assert LoraTable(rank=4, alpha=8.0).scaling == 2.0


@pytest.mark.parametrize("engine", ["auto", "opacus"])
def test_dora_has_no_per_record_gradient(
    tiny_base: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why DoRA is no option: let through, with its magnitudes trained as they are meant to be, the
    site's self-test stops the study."""
    attach = lora_module.attach

    def with_magnitudes(model: Any, lora: LoraTable, name: str) -> PeftModel:
        adapted = attach(model, lora, name)
        found = [p for n, p in adapted.named_parameters() if "lora_magnitude_vector" in n]
        assert found
        for parameter in found:
            parameter.requires_grad_(True)
        return adapted

    monkeypatch.setattr(lora_module, "LoraConfig", partial(LoraConfig, use_dora=True))
    monkeypatch.setattr(lora_module, "attach", with_magnitudes)
    training = {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0, "engine": engine}
    results = selftest.run(study_of(tiny_base, None, lora=TABLE, training=training))
    assert not all(result.passed for result in results), results
