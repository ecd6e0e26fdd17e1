"""Cut a decoder into a frozen prefix and a tail, sharing every weight with the whole model.

With adapters in the last k blocks only, the states at the cut are the same in every step: they are
computed once per record, and each later step runs the tail alone."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def cut(model: PreTrainedModel, last_layers: int) -> tuple[nn.Module, nn.Module] | None:
    """(prefix, tail) of a decoder backbone: prefix(input_ids) -> states at the cut;
    tail(inputs_embeds=states) -> the backbone's output. None where this architecture cannot be cut.

    Guarantee: tail(prefix(x)) equals the whole backbone on a probe, or None is returned."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(model, "norm"):
        return None
    at = len(layers) - last_layers
    prefix = _with(model, layers=layers[:at], norm=nn.Identity())
    tail = _with(model, layers=layers[at:])
    probe = torch.arange(1, 17).remainder(model.config.vocab_size).unsqueeze(0)
    with torch.no_grad():
        whole = model(input_ids=probe, use_cache=False).last_hidden_state
        parts = tail(
            inputs_embeds=prefix(input_ids=probe, use_cache=False).last_hidden_state,
            use_cache=False,
        ).last_hidden_state
    return (prefix, tail) if torch.equal(whole, parts) else None


def _with(model: nn.Module, **modules: nn.Module) -> nn.Module:
    """A shallow copy of `model` with some children replaced; the rest is shared, not copied."""
    twin = copy.copy(model)
    object.__setattr__(twin, "_modules", {**model._modules, **modules})
    return twin
