"""Cut a decoder into a frozen prefix and a tail, sharing every weight with the whole model.

With adapters in the last k blocks only, the states at the cut are the same in every step: they are
computed once per record, and each later step runs the tail alone. With adapters in the last
block's MLP only, the cut lies behind that block's attention: from there on every position stands
for itself, so the tail runs at the positions that have a target and nowhere else. A tail that
begins earlier still narrows there: the last block's MLP runs where a loss is asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fedtune.config import LoraTable


@dataclass(frozen=True)
class Split:
    """prefix(input_ids=…) and tail(inputs_embeds=states), each with `.last_hidden_state`.
    positionwise: the tail treats each position by itself. narrows: the tail takes keep=(B, K) and
    gives the states at these positions alone."""

    prefix: nn.Module
    tail: nn.Module
    positionwise: bool
    narrows: bool = False


def cut(model: PreTrainedModel, lora: LoraTable) -> Split | None:
    """The deepest cut below all adapters of a decoder backbone, or None where there is none.

    Guarantee: tail(prefix(x)) equals the whole backbone bit for bit on a probe, or the cut is not
    used. Call before the adapter is attached."""
    layers = getattr(model, "layers", None)
    if not lora.last_layers or not isinstance(layers, nn.ModuleList) or not hasattr(model, "norm"):
        return None
    candidates = []
    if lora.last_layers == 1 and _in_mlp(layers[-1], lora.modules):
        frozen = nn.ModuleList([*layers[:-1], _Attention(layers[-1])])
        tail = _Mlp(layers[-1], model.norm)
        candidates.append(Split(_with(model, layers=frozen, norm=nn.Identity()), tail, True))
    at = len(layers) - lora.last_layers
    prefix = _with(model, layers=layers[:at], norm=nn.Identity())
    if _usual(layers[-1]):
        ends = nn.ModuleList([*layers[at:-1], _Narrow(layers[-1])])
        candidates.append(Split(prefix, _with(model, layers=ends), False, narrows=True))
    candidates.append(Split(prefix, _with(model, layers=layers[at:]), False))
    return next((split for split in candidates if _exact(model, split)), None)


def _usual(layer: Any) -> bool:
    """Whether the block has the parts of a pre-norm decoder's."""
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    return all(hasattr(layer, part) for part in parts)


def _in_mlp(layer: Any, modules: tuple[str, ...]) -> bool:
    """Whether every named module is part of the block's MLP, and the block has the usual parts."""
    if not _usual(layer):
        return False
    inside = {name.rsplit(".", 1)[-1] for name, _ in layer.mlp.named_modules()}
    outside = {name.rsplit(".", 1)[-1] for name, _ in layer.self_attn.named_modules()}
    return set(modules) <= inside - outside


class _Attention(nn.Module):
    """The first half of a pre-norm block."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.attention = layer.input_layernorm, layer.self_attn

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = self.attention(hidden_states=self.norm(hidden_states), **kwargs)[0]
        return hidden_states + attended  # type: ignore[no-any-return]


class _Narrow(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """A pre-norm block whose second half runs at some positions alone."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.first = _Attention(layer)
        self.norm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(
        self, hidden_states: torch.Tensor, keep: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        states = self.first(hidden_states, **kwargs)
        if keep is not None:
            states = states.gather(1, keep[:, :, None].expand(-1, -1, states.shape[2]))
        return states + self.mlp(self.norm(states))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    """The second half of a pre-norm block, and the model's last norm."""

    def __init__(self, layer: Any, last: Any) -> None:
        super().__init__()
        self.norm, self.mlp, self.last = layer.post_attention_layernorm, layer.mlp, last

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> SimpleNamespace:
        out = inputs_embeds + self.mlp(self.norm(inputs_embeds))
        return SimpleNamespace(last_hidden_state=self.last(out))


@torch.no_grad()
def _exact(model: PreTrainedModel, split: Split) -> bool:
    probe = (torch.arange(1, 17) % model.config.vocab_size).unsqueeze(0).to(model.device)
    whole = model(input_ids=probe, use_cache=False).last_hidden_state
    try:
        states = split.prefix(input_ids=probe, use_cache=False).last_hidden_state
        parts = split.tail(inputs_embeds=states, use_cache=False).last_hidden_state
    except (TypeError, ValueError, AttributeError):  # a block of another make
        return False
    return torch.equal(whole, parts)


def _with(model: nn.Module, **modules: nn.Module) -> nn.Module:
    """A shallow copy of `model` with some children replaced; the rest is shared, not copied."""
    twin = copy.copy(model)
    object.__setattr__(twin, "_modules", {**model._modules, **modules})
    return twin
