"""Several passages in one pass say what each says alone, and writing copies no weight for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from fedtune.core.bases.find import find_base
from fedtune.core.errors import ModelError
from fedtune.core.models.loaded import LoadedModel, load
from fedtune.core.models.network import Network
from tests.dp.conftest import study

PASSAGES = [np.array(ids, np.int32) for ids in ([5, 6, 7, 8, 9], [7], [9, 5, 5])]


def with_head(folder: Path, base: Path, objective: dict[str, object]) -> LoadedModel:
    made = study(base={"model": str(base)}, lora=None, objective=objective)
    network = Network(find_base(str(base)), torch.float32, None, 2)
    draw = np.random.default_rng(0)
    arrays = {n: draw.normal(size=a.shape) for n, a in network.trainable().items()}
    network.load_trainable({n: a.astype(np.float32) for n, a in arrays.items()})
    network.save(folder / "adapter")
    (folder / "plan.json").write_text(made.model_dump_json())
    return load(folder)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_encoder"])
def test_scores_of_several_are_those_of_each(
    tmp_path: Path, base: str, request: pytest.FixtureRequest
) -> None:
    objective = {"name": "classify", "labels": ["a", "b"], "max_length": 64}
    whole = with_head(tmp_path, request.getfixturevalue(base), objective)
    alone = torch.stack([whole.scores(ids) for ids in PASSAGES])
    torch.testing.assert_close(whole.scores_all(PASSAGES), alone, rtol=1e-5, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.01


def test_next_tokens_of_several_are_those_of_each(tiny_base: Path) -> None:
    whole = load(tiny_base)
    at = [np.arange(len(ids)) for ids in PASSAGES]
    for ids, places, found in zip(PASSAGES, at, whole.next_tokens_all(PASSAGES, at), strict=True):
        torch.testing.assert_close(found, whole.next_tokens(ids, places), rtol=1e-5, atol=1e-5)


def test_a_base_without_a_head_scores_nothing(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="no trained head"):
        load(tiny_base).scores(PASSAGES[0])


@pytest.mark.parametrize("broken", [False, True])
def test_the_head_is_given_states_in_one_piece(tiny_base: Path, broken: bool) -> None:
    """A view has its weight copied for each passage; the twin, without the hook, is given one."""
    model = load(tiny_base).model
    if broken:
        model.lm_head._forward_pre_hooks.clear()
    pieces: list[bool] = []
    model.lm_head.register_forward_pre_hook(
        lambda _, given: pieces.append(given[0].is_contiguous())
    )
    model.generate(input_ids=torch.tensor([[5, 6, 7], [7, 8, 9]]), max_new_tokens=2, pad_token_id=0)
    assert all(pieces) is not broken and len(pieces) == 2


@pytest.fixture
def adapted(tmp_path: Path, tiny_base: Path) -> Path:
    """A run's folder with an adapter that says something of its own."""
    made = study(base={"model": str(tiny_base)})
    network = Network(find_base(str(tiny_base)), torch.float32, made.lora, 0)
    draw = np.random.default_rng(0)
    arrays = {n: draw.normal(size=a.shape) for n, a in network.trainable().items()}
    network.load_trainable({n: a.astype(np.float32) for n, a in arrays.items()})
    network.save(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "plan.json").write_text(made.model_dump_json())
    return tmp_path / "run"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 1000.0},
    "rslora": {"use_rslora": True},
    "layers": {"layers_to_transform": [0]},
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_one_digest_of_a_run_is_one_model(adapted: Path, tiny_base: Path, name: str) -> None:
    """Twin: PEFT, which computes as adapter_config.json says."""
    ids, at = PASSAGES[0], np.arange(3)
    first = load(adapted)

    def by_peft() -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        read: Any = PeftModel.from_pretrained(base, str(adapted / "adapter"))
        with torch.no_grad():
            logits: torch.Tensor = read(
                input_ids=torch.from_numpy(ids[None].astype(np.int64))
            ).logits
        return torch.log_softmax(logits[0, :3], dim=1)

    said = first.next_tokens(ids, at)
    torch.testing.assert_close(said, by_peft(), rtol=1e-4, atol=1e-4)
    change(adapted / "adapter" / "adapter_config.json", **OTHER_SETTINGS[name])
    assert torch.equal(load(adapted, first.digest).next_tokens(ids, at), said)
    assert (by_peft() - said).abs().max() > 0.01


OTHER_PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha": ("lora", {"alpha": 16.0}),
    "variant": ("lora", {"variant": "rslora"}),
    "template": ("objective", {"template": "Well, {text}"}),
    "length": ("objective", {"max_length": 32}),
    "privacy": ("privacy", {"epsilon": 3.0}),
}


@pytest.mark.parametrize("name", OTHER_PLANS)
def test_the_digest_of_a_run_sees_what_its_plan_computes(adapted: Path, name: str) -> None:
    first, (table, values) = load(adapted).digest, OTHER_PLANS[name]
    plan = json.loads((adapted / "plan.json").read_text())
    change(adapted / "plan.json", **{table: plan[table] | values})
    assert load(adapted).digest != first
    with pytest.raises(
        ModelError, match=r"`fedtune models verify RUN` shows the run's present one"
    ):
        load(adapted, first)


def test_arrays_that_the_plans_adapter_does_not_have_are_refused(adapted: Path) -> None:
    file = adapted / "adapter" / "adapter_model.safetensors"
    arrays = load_file(file)
    name = next(n for n in arrays if ".lora_B." in n)
    save_file(arrays | {name.replace("lora_B", "lora_C"): arrays[name]}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="other names"):
        load(adapted)
    plan = json.loads((adapted / "plan.json").read_text())
    change(adapted / "plan.json", lora=plan["lora"] | {"last_layers": 1})
    save_file(arrays, file, {"format": "pt"})
    with pytest.raises(ModelError, match="other names"):
        load(adapted)
