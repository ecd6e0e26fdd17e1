"""Modalities: one module each, found by listing this package. A record becomes tensors.

A module offers

    KINDS                       the kinds of base that it serves (models/known.py)
    reader(base, tokenizer)     a Reader

A modality writes place-holders into a record's text and turns its file into the tensor that the
frozen tower reads. All else (targets, caps, units, gradients) is as for text."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Literal, Protocol

from fedtune.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase

    from fedtune.config import ObjectiveTable
    from fedtune.data.media import Media
    from fedtune.data.records import Record
    from fedtune.models.base import Base


class Reader(Protocol):
    """One base's way of reading records.

    column: what [data].columns must name besides the text; starts: the place-holders are the
    text's own beginning, so the tokenizer adds none; avoid: token ids that no other text may hold.
    """

    column: Literal["image", "audio"] | None
    starts: bool
    avoid: frozenset[int]

    def place(self, record: Record, objective: ObjectiveTable) -> tuple[Record, int]:
        """The record with place-holders in its text, and its number of tiles (1 where there is
        nothing to count). Errors: Rejected."""

    def check(self, ids: list[int], tiles: int) -> None:
        """Errors: Rejected unless `ids` hold the place-holders of so many tiles, and no others."""

    def tensor(self, media: Media) -> torch.Tensor:
        """What the tower reads, fp32, (tiles, ...), of this file alone."""

    def generated(self, draw: np.random.Generator, like: Media | None = None) -> Media | None:
        """A file of noise, for checks that must not see a real one; with as many tiles as `like`.
        None where no file is read."""


def names() -> list[str]:
    """Every modality in this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def reader(base: Base, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """How `base` reads records. Errors: ModelError, ConfigError (an extra is not installed)."""
    for name in names():
        module = importlib.import_module(f"{__name__}.{name}")
        if base.kind in module.KINDS:
            found: Reader = module.reader(base, tokenizer)
            return found
    raise ModelError(f"{base.name}: no modality reads records for a base of kind {base.kind}")
