"""Engines compute per-record gradients in one backward pass. Each engine is a module here.

| one_pass | LoRA on linear layers, and linear layers themselves: the fastest, and the default |
| opacus   | Opacus' hooks, for every layer that it knows; chosen where one_pass does not fit |
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import nn

from fedtune.core.models.rank_slice import ALL

EngineName = Literal["auto", "opacus"]


class PerRecord(Protocol):
    """An engine that computes per-record gradients. It is called within its context `watching()`,
    on losses that were computed within the same context.

    Guarantee: after `watching()` nothing of a record is left on the model or in the engine."""

    name: str
    side_by_side: bool  # whether several threads may use it at once, on losses of their own

    def watching(self) -> AbstractContextManager[None]: ...

    def __call__(self, losses: torch.Tensor) -> list[torch.Tensor | None]:
        """Compute the gradient of each of the B losses. Return a list with one tensor (B, *shape)
        for each trained parameter; None in its place if its layer gave no gradient. The caller
        wipes the tensors."""
        ...


def choose(
    name: EngineName,
    trained: nn.Module,
    parameters: Sequence[nn.Parameter],
    columns: slice = ALL,
) -> PerRecord:
    """Choose and build the engine that computes the per-record gradients of a model.

    - name: study.training.engine; "auto": one_pass if it serves every parameter, else opacus;
      "opacus": always opacus
    - trained: the module that holds every trainable layer, which the engine watches
    - parameters: the trained parameters, in the order in which the engine returns their gradients
    - columns: the columns of each B whose gradients are needed; an engine may return all"""
    from fedtune.core.training.engines.one_pass import OnePass
    from fedtune.core.training.engines.opacus import OpacusHooks

    if name == "auto":
        one_pass = OnePass(trained, parameters, columns)
        if not one_pass.missing:
            return one_pass
    return OpacusHooks(trained, parameters)
