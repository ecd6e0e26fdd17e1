"""Quantised bases: gradients against plain autograd on the dequantised weights, in fp64; oracles;
a study from its start to its export."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from fedtune.core.bases import quantise as quantise_module
from fedtune.core.bases.find import find_base
from fedtune.core.bases.quantise import round_weights
from fedtune.core.config import LoraTable, QuantisationTable, Study
from fedtune.core.data.dataset import NO_TARGET
from fedtune.core.errors import ConfigError
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.tiny import generate_records
from fedtune.core.training import selftest
from fedtune.core.training.local_round import check_trains
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.derive.export import export
from fedtune.officer.review import _runs
from fedtune.public.factor import public_factor
from fedtune.runs.run import Run
from tests.client.test_site import make_site
from tests.depth import long_but
from tests.test_merging import study as finished_study

bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="pip install 'fedtune[qlora]'")
METHODS = ("nf4", "int8")


def study_of(where: Path, method: str | None, **more: Any) -> Study:
    body: dict[str, Any] = {
        "study": {"name": "small"},
        "base": {"model": str(where), "dtype": "float32"},
        "lora": {"rank": 4, "modules": ["q_proj", "down_proj"], "last_layers": 2, "train": "AB"},
        "objective": {"name": "causal_lm", "max_length": 64},
        "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "clipping": {"max_grad_norm": 0.5},
        "privacy": {"noise_multiplier": 1.0, "delta": 1e-3},
    } | more
    if method:
        body["base"]["quantisation"] = {"method": method}
    return Study.model_validate_json(json.dumps(body))


def moved(network: Network) -> Network:
    """Away from B = 0, so that A has a gradient too."""
    draw = np.random.default_rng(0)
    network.load_trainable(
        {n: draw.normal(0, 0.3, a.shape).astype("f4") for n, a in network.trainable().items()}
    )
    return network


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_held_in_few_bits_and_the_head_is_not(tiny_base: Path, method: str) -> None:
    network = build(study_of(tiny_base, method))
    kinds = {type(m).__name__ for n, m in network.model.named_modules() if n.endswith("base_layer")}
    assert kinds == {{"nf4": "Linear4bit", "int8": "Linear8bitLt"}[method]}
    inner: Any = network.model.get_base_model()  # type: ignore[operator]
    assert inner.model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    assert inner.lm_head.weight.dtype == torch.float32


OWN_PROCESS = """
import sys
from fedtune.core.boot import hide_quantisation
hide_quantisation()
from fedtune.core.config import Study
from fedtune.core.models.build import build
seen = []
for text in sys.argv[1:]:
    network = build(Study.model_validate_json(text))
    kinds = {type(m).__name__ for n, m in network.model.named_modules() if n.endswith("base_layer")}
    loaded = bool(sys.modules.get("bitsandbytes"))
    seen.append((*kinds, loaded, "torch._inductor.compile_fx" in sys.modules))
print(seen)
"""


def test_a_process_of_ours_imports_it_once_a_plan_quantises(tiny_base: Path) -> None:
    """It brings PyTorch's compiler, which is most of what such a process would import."""
    plans = [study_of(tiny_base, method).model_dump_json() for method in (None, *METHODS)]
    words = [sys.executable, "-c", OWN_PROCESS, *plans]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(
        [("Linear", False, False), ("Linear4bit", True, True), ("Linear8bitLt", True, True)]
    )


def test_gradients_are_those_of_the_dequantised_weights(tiny_base: Path) -> None:
    """nf4: every record's gradient against transformers and plain autograd, in fp64."""
    study = study_of(tiny_base, "nf4")
    network = moved(build(study))
    data = generate_records(study, network, [1, 1, 1, 1, 1])
    engine = UnitGradientEngine(CachedDataset(network, data), study.objective.resolved)
    assert engine.name == "one-pass"
    found = engine.matrix(range(5)).double()
    plain: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert study.base.quantisation is not None
    round_weights(plain, study.base.quantisation, torch.float32)
    plain = plain.double()
    named = {n: p.detach().double().requires_grad_() for n, p in network.parameters().items()}
    for name, layer in list(plain.named_modules()):
        key = f"base_model.model.{name}.lora_"
        if f"{key}A.default.weight" in named:
            layer.forward = _adapted(
                layer, named[f"{key}A.default.weight"], named[f"{key}B.default.weight"], 4.0
            )
    for row, example in enumerate(data.examples):
        logits = plain(torch.from_numpy(example.input_ids.astype("i8"))[None]).logits[0]
        target = torch.from_numpy(example.target_ids.astype("i8"))
        loss = functional.cross_entropy(logits, target, ignore_index=NO_TARGET)
        parts = torch.autograd.grad(loss, list(named.values()))
        expected = torch.cat([part.flatten() for part in parts])
        assert (found[row] - expected).norm() <= 1e-4 * expected.norm()


def _adapted(layer: Any, a: torch.Tensor, b: torch.Tensor, scaling: float) -> Any:
    return lambda x: functional.linear(x, layer.weight) + scaling * (x @ a.T) @ b.T


@pytest.mark.parametrize("method", METHODS)
def test_a_pass_without_gradients_changes_no_gradient(tiny_base: Path, method: str) -> None:
    """bitsandbytes repacks 4-bit weights at the first such pass on some processors, for good."""
    study = study_of(tiny_base, method)
    network = moved(build(study))
    data = CachedDataset(network, generate_records(study, network, [1, 1, 1]))
    engine = UnitGradientEngine(data, study.objective.resolved)
    before = engine.matrix(range(3))
    (batch, *_) = data.batches([0])
    with torch.no_grad():
        study.objective.resolved.losses(network, batch)
    assert torch.allclose(engine.matrix(range(3)), before, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_oracles_pass(tiny_base: Path, method: str, dtype: str) -> None:
    base = {"model": str(tiny_base), "dtype": dtype}
    study = study_of(tiny_base, None, base=base | {"quantisation": {"method": method}})
    for result in selftest.run(study):
        assert result.passed, result


@pytest.mark.parametrize("threshold", [None, 6.0])
def test_no_record_decides_how_anothers_numbers_are_rounded(
    tiny_base: Path, threshold: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8: with LLM.int8()'s own threshold one record's outliers change another's row."""
    if threshold is not None:
        monkeypatch.setattr(quantise_module, "OUTLIERS", threshold)
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    quantise_module.quantise(layer, QuantisationTable(method="int8"), torch.float32)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 5, 64, generator=draw)
    wild = rows.clone()
    wild[1, :, 7] = 50.0
    same = torch.equal(layer(rows)[0], layer(wild)[0])
    assert same is (threshold is None)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(tiny_base: Path, method: str) -> None:
    check_trains(study_of(tiny_base, method), build(study_of(tiny_base, method)))


def test_states_and_networks_are_not_shared_with_other_ways_of_quantising(tiny_base: Path) -> None:
    plain, small = build(study_of(tiny_base, None)), build(study_of(tiny_base, "nf4"))
    assert small is not plain and small.states is not plain.states
    again = study_of(tiny_base, "nf4")
    assert build(again) is small
    body = again.model_dump(mode="json")
    body["base"]["quantisation"]["block_size"] = 128
    other = Study.model_validate_json(json.dumps(body))
    assert build(other) is not small and other.digest != again.digest


def test_a_public_factor_is_built_on_what_is_trained(tiny_base: Path) -> None:
    study = study_of(tiny_base, "nf4")
    network = build(study)
    factor = public_factor(network, generate_records(study, network, [1] * 9), 4)
    assert set(factor) == set(network.frozen_factor())


@pytest.mark.parametrize("method", long_but(["nf4"], METHODS))
def test_a_finished_run_is_exported_with_the_weights_it_was_trained_on(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    old = 'dtype = "float32"'
    made = {old: f'{old}\nquantisation = {{ method = "{method}" }}'}
    run = finished_study(tmp_path / "study", tiny_base, "small4", **made)
    out = export(Run(run), tmp_path / "model", "hf")
    assert "quantised" in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    study = Study.model_validate_json((run / "plan.json").read_text())
    network = build(study)
    from fedtune.core.models.adapter_files import load_adapter

    saved = load_adapter(run / "adapter")
    network.load_frozen({n: saved[n] for n in network.frozen_factor()})
    network.load_trainable({n: saved[n] for n in network.parameters()})
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected: torch.Tensor = network.model(ids).logits
        found = model(ids).logits
        whole = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)(ids).logits
    room = 1e-4 if method == "nf4" else 0.05 * float(expected.abs().max())
    assert (found - expected).abs().max() <= room
    assert (whole - expected).abs().max() > room


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_weights_are_those_that_are_trained_on(method: Any, dtype: torch.dtype) -> None:
    table = QuantisationTable(method=method)
    whole = torch.nn.Sequential(torch.nn.Linear(128, 96, bias=False))
    small = torch.nn.Sequential(torch.nn.Linear(128, 96, bias=False)).to(dtype)
    small.load_state_dict(whole.state_dict())
    quantise_module.quantise(small, table, dtype)
    round_weights(whole, table, dtype)
    weight = small[0].weight
    if method == "nf4":
        held = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        held = small[0].state.CB.float() * (small[0].state.SCB[:, None] / 127.0)
    assert torch.equal(whole[0].weight, held.float())


def test_a_review_says_it(tmp_path: Path, tiny_base: Path) -> None:
    said = "\n".join(_runs(study_of(tiny_base, "nf4"), None, make_site(tmp_path)))
    assert "its weights rounded here to nf4" in said


def test_without_the_extra_it_says_which(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    base, lora = find_base(str(tiny_base)), LoraTable(modules=("q_proj",))
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*fedtune\[qlora\]"):
        Network(base, torch.float32, lora, 0, QuantisationTable(method="nf4"))


def test_what_computes_is_in_the_plan(tiny_base: Path) -> None:
    base = {"model": str(tiny_base), "quantisation": {"method": "nf4"}}
    with pytest.raises(ValueError, match="a quantised base needs"):
        study_of(tiny_base, None, base=base)
    assert math.isfinite(len(study_of(tiny_base, "nf4").digest))
