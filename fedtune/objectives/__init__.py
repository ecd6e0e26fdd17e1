"""Objectives: one module each, found by listing this package.

A module offers `losses(network, batch) -> (B,)`: for each record the mean over its OWN targets, so
that no record's loss depends on another (the built-in loss of a language model averages over the
batch's tokens and breaks the sensitivity bound)."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol, cast

import torch

from fedtune.errors import ConfigError
from fedtune.models.cache import Batch
from fedtune.models.network import Network


class Objective(Protocol):
    def losses(self, network: Network, batch: Batch) -> torch.Tensor: ...


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Objective:
    """Errors: ConfigError listing what exists."""
    if name not in names():
        raise ConfigError(f"objective.name = {name!r}", f"one of {', '.join(names())}")
    return cast(Objective, importlib.import_module(f"{__name__}.{name}"))
