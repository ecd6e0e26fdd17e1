"""Training objectives. Each has a module here with a frozen dataclass, whose fields are
study.objective.options.

A record's loss is computed from its own passages alone, so that it depends on no other record.
(The built-in loss of a language model averages over the batch's tokens, which would break the
sensitivity bound.) Quantities that couple units in other tools (KTO's batch estimate, reward
centring) are constants here. No objective's module imports torch before a loss is computed, since
a plan is made without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.core.objectives._interface import (
    READS,
    Batch,
    Network,
    Objective,
    RecordFormat,
    Teacher,
    require,
)
from fedtune.core.objectives._tokens import likelihood, reference
from fedtune.core.registry import Group, summary

if TYPE_CHECKING:
    from fedtune.core.config import ObjectiveTable

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Network",
    "Objective",
    "RecordFormat",
    "Teacher",
    "describe",
    "likelihood",
    "names",
    "reference",
    "require",
]

OBJECTIVES = Group("objectives", "objective.name", __name__, Objective)  # type: ignore[type-abstract]


def names() -> list[str]:
    """Return the names of all objectives of this release."""
    return OBJECTIVES.release()


def describe(table: ObjectiveTable) -> str:
    """Return a text in plain words for a person who decides about a study: what its objective does,
    what records it reads, and whether it trains a head. table: the plan's objective.

    Errors: ConfigError if the objective, or one of its options, does not exist or is out of
    range."""
    objective = table.resolved
    head = " A head is trained, which writes no text." if objective.outputs else ""
    reads = READS[objective.record_format]
    return f"Objective {table.name}. {summary(type(objective))} It reads {reads}.{head}"
