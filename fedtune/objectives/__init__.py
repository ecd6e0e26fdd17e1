"""Objectives: one module each, found by listing this package.

A module offers

    SHAPE                                 what a record must say
    losses(network, batch, *, …) -> (B,)  keyword-only arguments are study.objective.options
    check(*, …)                           the same arguments; ConfigError where one is out of range
    outputs(labels) -> int                rows of a trained head; left out: the model's own head
    shape(labels)                         in place of SHAPE, where it depends on the labels
    taught(*, …) -> Teacher               whose figures each record carries as targets

A record's loss comes from its own passages alone, so that no record's loss depends on another
(the built-in loss of a language model averages over the batch's tokens and breaks the sensitivity
bound). What couples units in other tools (KTO's batch estimate, reward centring) is a constant."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from functools import partial
from typing import TYPE_CHECKING

from fedtune.errors import ConfigError
from fedtune.objectives._interface import READS, ObjectiveSpec

if TYPE_CHECKING:
    from fedtune.config import ObjectiveTable


def names() -> list[str]:
    """Every objective in this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def resolve(table: ObjectiveTable) -> ObjectiveSpec:
    """Errors: ConfigError listing what exists: the objectives, or this one's options."""
    if table.name not in names():
        raise ConfigError(f"objective.name = {table.name!r}", f"one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{table.name}")
    every = inspect.signature(module.losses).parameters.values()
    known = {p.name: p.default for p in every if p.kind is p.KEYWORD_ONLY}
    for name, value in table.options.items():
        if name not in known:
            expected = "one of " + ", ".join(known) if known else "no options"
            raise ConfigError(f"objective.options.{name} is not known", expected)
        if isinstance(known[name], str) != isinstance(value, str):
            raise ConfigError(f"objective.options.{name} = {value!r}", f"such as {known[name]!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"objective.options.{name} = {value!r}", "a finite number")
    if hasattr(module, "check"):
        module.check(**table.options)
    losses = partial(module.losses, **table.options) if table.options else module.losses
    outputs = module.outputs(table.labels) if hasattr(module, "outputs") else 0
    shape = module.shape(table.labels) if hasattr(module, "shape") else module.SHAPE
    teacher = module.taught(**table.options) if hasattr(module, "taught") else None
    return ObjectiveSpec(shape, outputs, losses, teacher)


def describe(table: ObjectiveTable) -> str:
    """The objective in plain words: what it does, what it reads and what it trains.

    Errors: ConfigError, as `find`."""
    found = resolve(table)
    does = " ".join((importlib.import_module(f"{__name__}.{table.name}").__doc__ or "").split())
    head = " A head is trained, which writes no text." if found.outputs else ""
    return f"Objective {table.name}. {does} It reads {READS[found.shape]}.{head}"
