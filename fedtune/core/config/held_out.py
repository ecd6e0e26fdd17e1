"""Table [private_evaluation] of study.toml: the query to sites about their held-out records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedtune.core.config.types import MOST_NAMES, Count, Finite, Names, Noise, Table
from fedtune.core.registry.bands import band_names

CLASS = "class"  # the axis of objective.labels
MOST_AXES, MOST_CELLS = 20, 1000
Edges = Annotated[tuple[Finite, ...], Field(min_length=1, max_length=MOST_NAMES)]


class PrivateEvaluationTable(Table):
    """A query to the sites about the model's quality on their held-out records. A site answers with
    the sum of its units' scores and the number of units, both with noise, and charges its ledger.

    - score: "likelihood" is the likelihood of a record's answer; "accuracy" is whether the
      likeliest of objective.labels is the record's label
    - classes: whether each of objective.labels is asked about separately too
    - groups: column -> those of its values that are asked about separately too
    - bands: column of numbers -> the edges that divide it into bands, which are asked about
      separately too

    Guarantee: every class, group and band is named here, in a public plan; no record adds one."""

    noise_multiplier: Noise  # σ, in multiples of C (Study.query_norm)
    every: Count = 1  # rounds; the last one is always queried
    # Omitted where nothing is told apart, so that such plans keep their digest.
    score: Literal["likelihood", "accuracy"] = Field(
        default="likelihood", exclude_if=lambda score: score == "likelihood"
    )
    classes: bool = Field(default=False, exclude_if=lambda classes: not classes)
    groups: dict[str, Names] = Field(default_factory=dict, exclude_if=lambda groups: not groups)
    bands: dict[str, Edges] = Field(default_factory=dict, exclude_if=lambda bands: not bands)

    @model_validator(mode="after")
    def _check_axes(self) -> PrivateEvaluationTable:
        if CLASS in self.groups or CLASS in self.bands:
            raise ValueError(f'groups, bands: "{CLASS}" is reserved for objective.labels')
        if both := sorted(set(self.groups) & set(self.bands)):
            raise ValueError(f"bands.{both[0]}: the column is named in groups too")
        for column, values in self.groups.items():
            if not values or len({value.strip() for value in values}) < len(values):
                raise ValueError(
                    f"groups.{column}: must name at least one value, and each value once"
                )
        for column, edges in self.bands.items():
            if list(edges) != sorted(set(edges)):
                raise ValueError(f"bands.{column}: edges must rise, as in [18, 65, 80]")
        if len(self.groups) + len(self.bands) + self.classes > MOST_AXES:
            raise ValueError(
                f"groups, bands: at most {MOST_AXES - self.classes} columns"
                + (" beside classes" if self.classes else "")
                + ", because each one adds noise"
            )
        return self

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """The names of the groups and bands, by column. A site's answer has its figures for them in
        this order."""
        named = {name: tuple(value.strip() for value in v) for name, v in self.groups.items()}
        return named | {column: band_names(edges) for column, edges in self.bands.items()}
