"""The layers that a smaller base leaves out: those that are missed least, with what they added put
into the MLP before them; and where a base cannot be fitted so, the first ones and the last stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedtune.core.bases.find import find_base
from fedtune.derive import depth_pruning
from fedtune.derive.pruned_base import write_pruned_base

LAYERS, WORDS, HIDDEN = 8, 50, 32


def texts(count: int = 48) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, WORDS, draw.integers(6, 12)).astype(np.int32) for _ in range(count)]


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).requires_grad_(False).eval()


def idle(model: Any, *layers: int) -> None:
    """These layers pass on what they get."""
    for at in layers:
        model.model.layers[at].self_attn.o_proj.weight.zero_()
        model.model.layers[at].mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("first", [3, 4, 5])
def test_layers_that_do_nothing_are_the_ones_left_out(model: Any, first: int) -> None:
    idle(model, first, first + 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = depth_pruning.choose_pruned_layers(model, 2, texts())
    assert (found.first, found.width) == (first, 2)
    assert found.divergence < 1e-6
    # Nothing is missing, so nothing is made up for; and the model is as it was.
    assert torch.allclose(found.weight, before[f"model.layers.{first - 1}.mlp.down_proj.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def missed(model: Any, found: depth_pruning.PrunedLayers, weight: torch.Tensor) -> float:
    """KL of what the shortened model says from what the whole one says, on texts of its own."""
    fresh = texts(64)[48:]
    said = depth_pruning._next_token_log_probs(model, fresh)
    with depth_pruning._temporary_weight(model.model.layers[found.first - 1].mlp.down_proj, weight):
        now = depth_pruning._next_token_log_probs(
            depth_pruning.drop_layers(model, range(found.first, found.first + found.width)), fresh
        )
    return float((said.exp() * (said - now)).sum(dim=1).mean())


def test_the_mlp_before_the_gap_does_the_work_of_what_is_left_out(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 4 adds what a matrix can make of layer 3's inner states: layer 3 alone then does."""
    idle(model, 4, 5)
    layers, inner = model.model.layers, []
    extra = torch.randn(HIDDEN, 64, generator=torch.Generator().manual_seed(1))
    layers[3].mlp.down_proj.register_forward_pre_hook(lambda _, args: inner.append(args[0]))
    layers[4].register_forward_hook(lambda _, args, out: out + inner[-1] @ extra.T)
    monkeypatch.setattr(depth_pruning, "RIDGE", 1e-6)
    found = depth_pruning.choose_pruned_layers(model, 2, texts())
    assert found.first == 4
    own = layers[3].mlp.down_proj.weight
    assert missed(model, found, found.weight) < 1e-3 < 0.05 < missed(model, found, own)
    assert torch.allclose(found.weight - own, extra, atol=1e-2)


def test_a_position_counts_by_its_own_size(model: Any) -> None:
    """The twin of what made the fit follow a text's first position alone: one that is a thousand
    times as large hardly moves the matrix that all others ask for."""
    layer = model.model.layers[3]
    draw = torch.Generator().manual_seed(2)
    into, found = (torch.randn(400, HIDDEN, generator=draw) for _ in range(2))
    wanted = found + torch.randn(400, HIDDEN, generator=draw) * 0.1
    wanted[0] *= 1e6
    with_it = depth_pruning._refit(layer, into, found, wanted)
    without_it = depth_pruning._refit(layer, into[1:], found[1:], wanted[1:])
    assert (
        float((with_it - without_it).norm() / (without_it - layer.mlp.down_proj.weight).norm()) < 1
    )


def post_normed() -> Any:
    """Its MLP's output is normalised before it is added."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip


def test_only_a_base_that_adds_its_mlps_output_is_fitted(model: Any) -> None:
    assert depth_pruning.supports_refit(model)
    assert not depth_pruning.supports_refit(post_normed().requires_grad_(False).eval())


def written(base: Path, make: Callable[[], Any], folder: Path) -> Path:
    make().save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_another_base_keeps_the_first_layers_and_the_last(tmp_path: Path, tiny_base: Path) -> None:
    base = find_base(str(written(tiny_base, post_normed, tmp_path / "gemma")))
    assert write_pruned_base(base, 3, tmp_path / "small", texts()) == [0, 1, 3]
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert len(small.model.layers) == 3 and len(small.config.layer_types) == 3


def test_what_is_written_is_the_base_without_the_gap_and_says_what_was_chosen(
    tmp_path: Path, tiny_base: Path, model: Any
) -> None:
    idle(model, 4, 5)
    base = find_base(str(written(tiny_base, lambda: model, tmp_path / "base")))
    kept = write_pruned_base(base, 6, tmp_path / "small", texts())
    assert kept == [0, 1, 2, 3, 6, 7]
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    found = depth_pruning._next_token_log_probs(small, texts(4))
    assert torch.allclose(found, depth_pruning._next_token_log_probs(model, texts(4)), atol=1e-4)
