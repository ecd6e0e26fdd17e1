"""Tables of study.toml for the coordinator's computations on public records, which cost no ε."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtune.core.config.types import (
    MOST_NAMES,
    Count,
    DataFile,
    Digest,
    Positive,
    Rank,
    Table,
    Text,
)


class PreconditionerTable(Table):
    """The settings of an adapter's public preconditioner: a fixed matrix for each B, computed from
    [public] records and their answers, by which the steps of B are multiplied."""

    rank: Rank = 64  # directions of each layer's output that are kept; all others count as one
    damping: Positive = 1.0  # in multiples of the mean curvature; a large one undoes the scaling
    # Whether rounds train nothing but these directions; steps before the first round train all.
    narrow: bool = Field(default=False, exclude_if=lambda narrow: not narrow)
    digest: Digest | None = None  # filled in when the study starts


class StartTable(Table):
    """Training before the first round, on public records only; it costs no ε."""

    # Steps on all of [public] with its answers, each as a site without noise would take it.
    steps: Annotated[int, Field(ge=0, le=10_000)] = 0
    learning_rate: Positive = 1.0  # of these steps; as training.learning_rate
    # A head starts at zero, at the base's vectors of the classes' names (or descriptions), or at a
    # logistic regression on [public] that is regularised towards these vectors.
    head: Literal["zero", "labels", "public"] = "zero"
    scale: Positive = 2.0  # length of each class's vector in the head
    # class -> words in its name's place
    descriptions: dict[Text, Text] = Field(default_factory=dict, max_length=MOST_NAMES)
    digest: Digest | None = None  # filled in when the study starts


class SelectionTable(DataFile):
    """Public records by which the coordinator chooses the step size of each round, and the adapter
    that is released. None of them may be in [evaluation], whose records must have no part in that
    choice."""

    patience: Count = 3  # rounds in a row of which no step lowers the loss; then the study ends
    # "better": the trained adapter or its public start ([start]), whichever has the better metric
    # on these records; the trained adapter if both are alike.
    release: Literal["better", "trained"] = Field(
        default="better", exclude_if=lambda rule: rule == "better"
    )
