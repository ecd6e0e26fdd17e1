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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from fedtune.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fedtune.config import ObjectiveTable
    from fedtune.models.cache import Batch
    from fedtune.models.network import Network

# text: prompt and completion, or plain text; label: text and one of the labels; pair: a prompt,
# the better and the worse completion; judged: a completion and whether it is desirable.
Shape = Literal["text", "label", "pair", "judged"]
READS: dict[Shape, str] = {
    "text": "prompts with their completions, conversations, or plain text",
    "label": "texts, each with one of the study's labels",
    "pair": "pairs, a prompt with a better and a worse answer (columns prompt, chosen, rejected); "
    "a pair is one record: what its two answers add up to is clipped once",
    "judged": "judged answers, each desirable or not (columns prompt, completion, label)",
}


class Objective(Protocol):
    def losses(self, network: Network, batch: Batch) -> torch.Tensor: ...


@dataclass(frozen=True)
class Teacher:
    """A frozen model by name and digest; at what temperature it is heard, and how many of its next
    tokens."""

    name: str
    digest: str
    temperature: float = 1.0
    top: int = 64


@dataclass(frozen=True)
class Found:
    """An objective with the study's options. outputs: rows of the head that it trains, or 0."""

    shape: Shape
    outputs: int
    losses: Callable[[Network, Batch], torch.Tensor]
    teacher: Teacher | None = None


def names() -> list[str]:
    """Every objective in this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(table: ObjectiveTable) -> Found:
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
    return Found(shape, outputs, losses, teacher)


def says(table: ObjectiveTable) -> str:
    """The objective in plain words: what it does, what it reads and what it trains.

    Errors: ConfigError, as `find`."""
    found = find(table)
    does = " ".join((importlib.import_module(f"{__name__}.{table.name}").__doc__ or "").split())
    head = " A head is trained, which writes no text." if found.outputs else ""
    return f"Objective {table.name}. {does} It reads {READS[found.shape]}.{head}"


def require(condition: bool, option: str, expected: str) -> None:
    """Errors: ConfigError unless `condition`."""
    if not condition:
        raise ConfigError(f"objective.options.{option} is out of range", expected)
