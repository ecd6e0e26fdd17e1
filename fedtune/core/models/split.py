"""Split a decoder into a frozen prefix and a tail that share every weight with the whole model.

With adapters in the last k blocks only, the states at the cut are the same in every step: they are
computed once per record, and each later step runs the tail alone. With adapters in the last block's
MLP only, the cut lies behind that block's attention. No layer above it mixes positions, so the tail
runs only at positions that have a target. If the cut lies lower, only the last block's MLP is
narrowed in this way: it runs at the positions that need a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fedtune.core.bases.architecture import with_parts
from fedtune.core.config import LoraTable


@dataclass(frozen=True)
class Split:
    """The two parts of a decoder. Call them as prefix(input_ids=…) and tail(inputs_embeds=states);
    each returns an object with `.last_hidden_state`.

    - prefix: the frozen part, below the cut
    - tail: the part above it
    - positionwise: whether the tail treats each position by itself
    - narrows: whether the tail accepts keep=(B, K) and then returns the states at these positions
      only"""

    prefix: nn.Module
    tail: nn.Module
    positionwise: bool
    narrows: bool = False


def cut(model: Any, lora: LoraTable) -> Split | None:
    """Find the highest layer of a decoder below which no adapter lies, and return the parts below
    and above it. Return None if there is no such layer.

    - model: the decoder, to which no adapter is attached yet
    - lora: the plan's [lora] table, which says where adapters will lie

    Guarantee: a cut is used only if tail(prefix(x)) equals the whole decoder bit for bit on a short
    probe text."""
    layers = getattr(model, "layers", None)
    last = next((name for name in ("norm", "layer_norm") if hasattr(model, name)), "")
    if not lora.last_layers or not isinstance(layers, nn.ModuleList) or not last:
        return None
    # A decoder with a table of positions adds them to its input; above the cut it must not.
    without_positions = (
        {"embed_positions": _ZeroPositions()} if hasattr(model, "embed_positions") else {}
    )
    without_norm = {last: nn.Identity()}
    halves, candidates = _halves(layers[-1]), []
    if halves and lora.last_layers == 1 and halves.holds(lora.modules):
        frozen = nn.ModuleList([*layers[:-1], halves.first])
        tail = _Mlp(halves, getattr(model, last))
        candidates.append(Split(with_parts(model, layers=frozen, **without_norm), tail, True))
    first_adapted = len(layers) - lora.last_layers
    prefix = with_parts(model, layers=layers[:first_adapted], **without_norm)
    if halves:
        ends = nn.ModuleList([*layers[first_adapted:-1], _Narrow(halves)])
        candidates.append(
            Split(prefix, with_parts(model, layers=ends, **without_positions), False, narrows=True)
        )
    candidates.append(
        Split(prefix, with_parts(model, layers=layers[first_adapted:], **without_positions), False)
    )
    return next((split for split in candidates if _is_exact(model, split)), None)


@dataclass(frozen=True)
class _Halves:
    """The two halves of a pre-norm block: y = first(x), then y + mlp(norm(y)).

    - first: the attention, with its residual
    - norm, mlp: the norm and the MLP of the second half
    - inside: the last names of the modules that are in the MLP and not in the attention"""

    first: nn.Module
    norm: nn.Module
    mlp: nn.Module
    inside: frozenset[str]

    def holds(self, modules: tuple[str, ...]) -> bool:
        return set(modules) <= self.inside


def _halves(layer: Any) -> _Halves | None:
    """Split a decoder block into its two halves. Return None if the block is of no known
    architecture: LLaMA's, or Whisper's with cross-attention."""

    def has(*parts: str) -> bool:
        return all(hasattr(layer, part) for part in parts)

    if has("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        inside = frozenset(_last_names(layer.mlp) - _last_names(layer.self_attn))
        return _Halves(_Attention(layer), layer.post_attention_layernorm, layer.mlp, inside)
    if has("self_attn_layer_norm", "encoder_attn", "final_layer_norm", "activation_fn", "fc1"):
        inside = frozenset(("fc1", "fc2"))
        return _Halves(_WhisperAttention(layer), layer.final_layer_norm, _WhisperMlp(layer), inside)
    return None


def _last_names(module: nn.Module) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name, _ in module.named_modules()}


class _ZeroPositions(nn.Module):
    """A position embedding of zero, for the part above the cut: positions were added below it."""

    def forward(self, embedded: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.zeros_like(embedded)


class _WhisperAttention(nn.Module):
    """The first half of Whisper's decoder block: self-attention, then cross-attention to the
    recording. Only `_WhisperMlp` has the block as a sub-module, since hooks would run twice on a
    block that is in two modules."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.__dict__["layer"] = layer

    def forward(
        self, hidden_states: torch.Tensor, mask: Any, heard: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("use_cache", "cache")}
        kwargs.pop("encoder_attention_mask", None)
        layer: Any = self.layer
        self_attended = layer.self_attn(
            layer.self_attn_layer_norm(hidden_states), attention_mask=mask, **kwargs
        )
        states = hidden_states + self_attended[0]
        cross_attended = layer.encoder_attn(
            layer.encoder_attn_layer_norm(states),
            key_value_states=heard,
            attention_mask=None,
            **kwargs,
        )
        return states + cross_attended[0]  # type: ignore[no-any-return]


class _WhisperMlp(nn.Module):
    """The MLP of Whisper's decoder block. It calls the block's own layers, so that an adapter may
    take their place later."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = self.layer.activation_fn(self.layer.fc1(states))
        return self.layer.fc2(inner)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """The first half of a pre-norm block."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, self.attention = layer.input_layernorm, layer.self_attn

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended = self.attention(hidden_states=self.norm(hidden_states), **kwargs)[0]
        return hidden_states + attended  # type: ignore[no-any-return]


class _Narrow(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """A pre-norm block whose second half, the MLP, runs only at chosen positions: those in `keep`,
    or all positions if `keep` is None."""

    def __init__(self, halves: _Halves) -> None:
        super().__init__()
        self.first = halves.first
        self.norm = halves.norm
        self.mlp = halves.mlp

    def forward(
        self,
        hidden_states: torch.Tensor,
        *others: Any,
        keep: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        states = self.first(hidden_states, *others, **kwargs)
        if keep is not None:
            states = states.gather(1, keep[:, :, None].expand(-1, -1, states.shape[2]))
        return states + self.mlp(self.norm(states))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    """The second half of a pre-norm block, followed by the model's last norm."""

    def __init__(self, halves: _Halves, last: Any) -> None:
        super().__init__()
        self.norm = halves.norm
        self.mlp = halves.mlp
        self.last = last

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> SimpleNamespace:
        out = inputs_embeds + self.mlp(self.norm(inputs_embeds))
        return SimpleNamespace(last_hidden_state=self.last(out))


@torch.no_grad()
def _is_exact(model: Any, split: Split) -> bool:
    probe = (torch.arange(1, 17) % model.config.vocab_size).unsqueeze(0).to(model.device)
    inputs: dict[str, Any] = {"use_cache": False}
    if hasattr(model.config, "max_source_positions"):  # cross-attention to a recording
        size = (1, 8, int(model.config.d_model))
        tower_states = torch.sin(torch.arange(math.prod(size), device=probe.device)).view(size)
        inputs["encoder_hidden_states"] = tower_states.to(model.dtype)
    expected = model(input_ids=probe, **inputs).last_hidden_state
    try:
        states = split.prefix(input_ids=probe, **inputs).last_hidden_state
        actual = split.tail(inputs_embeds=states, **inputs).last_hidden_state
    except (TypeError, ValueError, AttributeError):  # a block of another architecture
        return False
    return torch.equal(expected, actual)
