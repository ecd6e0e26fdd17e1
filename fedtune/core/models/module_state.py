"""Describe what a model's modules hold, so that changes can be detected."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.core.errors import ConfigError

_SMALL = 2**20  # bytes; of a larger tensor not the content is compared, but the count of writes
_TABLES = ("_modules", "_parameters", "_buffers")  # attributes of a module that hold its parts
_SIMPLE = (type(None), bool, int, float, complex, str, bytes)
_SERIES = (list, tuple, set, frozenset, deque)
# Described by their identity alone. A module's content is described where it is a child.
_BY_IDENTITY = (nn.Module, type, FunctionType, BuiltinFunctionType, MethodType)


class KeepsState(ConfigError):
    """A base or teacher keeps something of a text that it read, so no record is read with it."""


def build_refusal(name: str, found: str) -> KeepsState:
    """Build the error for a model that keeps something of a text. name: the model's name; found: in
    words, what showed it, such as "the first text changed its state"."""
    return KeepsState(
        f"{name} keeps state of what it reads ({found})",
        "a model that computes each text as if it had read no other",
        "use another base or teacher, or a smaller objective.max_length; no record was read",
    )


def describe_state(model: nn.Module) -> dict[str, object]:
    """Describe everything that the modules of `model` hold (parameters, buffers, attributes) by
    name. Two descriptions are equal as long as nothing was written to the model between them."""
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
    """Return a description of a value that compares equal to a later one as long as nothing wrote
    to the value between them. seen: the descriptions of the objects met so far, by id. With them,
    an object that contains itself is described only once."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = id(value)  # for a value that contains itself
    seen[id(value)] = described = repr(_describe_parts(value, seen))
    return described


def _describe_parts(value: Any, seen: dict[int, object]) -> object:
    if isinstance(value, dict):
        return [(_describe(k, seen), _describe(v, seen)) for k, v in value.items()]
    if isinstance(value, _SERIES):
        return [_describe(item, seen) for item in value]
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return [_describe(item, seen) for item in value.flat]
        return hashlib.sha256(value.tobytes()).hexdigest(), value.dtype, value.shape
    if isinstance(value, torch.Generator):
        return _describe_tensor(value.get_state())
    if isinstance(value, _BY_IDENTITY):
        return id(value)
    if held := dict(_attributes_of(value)):
        return type(value).__name__, _describe_parts(held, seen)
    return id(value), repr(value)  # an object of a library: an iterator's repr says where it is


def _attributes_of(value: Any) -> Iterator[tuple[str, object]]:
    """Yield an object's attributes with their names, from its `__dict__` and from the slots of its
    classes."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                yield name, getattr(value, name)


def _describe_tensor(tensor: torch.Tensor) -> object:
    if tensor.nbytes > _SMALL or tensor.is_meta:
        return tensor.data_ptr(), tensor._version, tuple(tensor.shape)  # PyTorch counts writes
    content = _bytes_of(tensor).cpu().numpy().tobytes()
    return hashlib.sha256(content).hexdigest(), tuple(tensor.shape)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def sum_weights(model: nn.Module) -> list[int]:
    """Return, for each large tensor of the model, the sum of its bytes. `describe_state` describes
    such a tensor only by PyTorch's count of writes to it. A write that PyTorch does not count, such
    as one through `.data`, changes the sum. This reads all of the model's memory."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    return [_sum_bytes(_bytes_of(t)) for t in tensors.values() if t.nbytes > _SMALL]


def _sum_bytes(content: torch.Tensor) -> int:
    whole = len(content) - len(content) % 8  # eight bytes at a time, modulo 2**64
    return int(content[:whole].view(torch.int64).sum()) + int(content[whole:].sum())
