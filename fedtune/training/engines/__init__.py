"""Ways to get each record's own gradient out of one backward pass: one module each.

| one_pass | LoRA on linear layers, and linear layers themselves: the fastest, and the default |
| opacus   | Opacus' hooks, for every layer that it knows; where one_pass does not fit, by itself |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import nn

from fedtune.models.rank_slice import ALL

Wanted = Literal["auto", "opacus"]


class PerRecord(Protocol):
    """Used within `watching()`, on losses computed within it.

    Guarantee: after `watching()` nothing of a record is left on the model or in the engine."""

    name: str

    def watching(self) -> AbstractContextManager[None]: ...

    def __call__(self, losses: torch.Tensor) -> list[torch.Tensor | None]:
        """For each trained parameter the gradient of each of `losses` (B,), as (B, *shape); None
        where a layer gave none. The caller owns and wipes them."""
        ...


def choose(
    wanted: Wanted,
    trained: nn.Module,
    parameters: Sequence[nn.Parameter],
    columns: slice = ALL,
) -> PerRecord:
    """The engine for a model whose trainable parameters are `parameters`. columns: of each B these
    alone are asked for; an engine may still give all."""
    from fedtune.training.engines.one_pass import OnePass
    from fedtune.training.engines.opacus import OpacusHooks

    if wanted == "auto":
        fast = OnePass(trained, parameters, columns)
        if not fast.missing:
            return fast
    return OpacusHooks(trained, parameters)
