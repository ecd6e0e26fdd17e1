"""Describe what a model's modules hold, so that a change of it is seen."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from fedtune.core.errors import ConfigError

_SMALL = 2**20  # bytes of a tensor up to which its content is compared, not its writes
_TABLES = ("_modules", "_parameters", "_buffers")  # of a module
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)


class KeepsState(ConfigError):
    """A base or teacher keeps state of a text that it read; no record is read with it."""


def build_refusal(name: str, found: str) -> KeepsState:
    """Build the error that names the model and how its state was found to change."""
    return KeepsState(
        f"{name} keeps state of what it reads ({found})",
        "a model that computes each text as if it had read no other",
        "use another base or teacher, or a smaller objective.max_length; no record was read",
    )


def describe_state(model: nn.Module) -> dict[str, object]:
    """Describe everything that the modules of `model` hold (parameters, buffers, attributes) by
    name, so that two descriptions are equal as long as nothing was written to it."""
    seen: dict[int, object] = {}
    state: dict[str, object] = {}
    for path, module in model.named_modules():
        held = {n: v for n, v in vars(module).items() if n not in _TABLES}
        for name, value in (held | module._parameters | module._buffers).items():
            # A table's entries one by one: transformers adds hooks at the first reading.
            entries = value if isinstance(value, dict) else {None: value}
            for key, entry in entries.items():
                state[f"{path}/{name}/{key!r}"] = _describe(entry, seen)
    return state


def _describe(value: Any, seen: dict[int, object]) -> object:
    """Describe a value so that it compares equal as long as nothing writes to it."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = id(value)  # of a value that holds itself
    inner: list[object]
    if isinstance(value, dict):
        inner = [(_describe(k, seen), _describe(v, seen)) for k, v in value.items()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = [_describe(item, seen) for item in value]
    elif isinstance(value, nn.Module | type) or callable(value) or not hasattr(value, "__dict__"):
        return id(value)  # a module is described where it is a child; a function by what it is
    else:
        inner = [type(value).__name__, _describe(vars(value), seen)]
    seen[id(value)] = described = repr(inner)
    return described


def _describe_tensor(tensor: torch.Tensor) -> object:
    if tensor.nbytes > _SMALL or tensor.is_meta:
        return tensor.data_ptr(), tensor._version, tuple(tensor.shape)  # PyTorch counts writes
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest(), tuple(tensor.shape)
