"""Modalities turn a record into tensors. Each is a frozen dataclass in a module of its own.

The kind of the base decides which modality reads its records, unless the study names another
(base.modality)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.core.data.reader import Reader
from fedtune.core.errors import ModelError
from fedtune.core.modalities._interface import Modality
from fedtune.core.registry import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedtune.core.bases.find import Base

__all__ = ["MODALITIES", "Modality", "reader"]

MODALITIES = Group("modalities", "base.modality", __name__, Modality)  # type: ignore[type-abstract]


def reader(base: Base, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> Reader:
    """Build the reader that turns records into tensors for `base`.

    - base: the base that reads the records
    - tokenizer: the base's tokenizer
    - name: the modality that the study names (base.modality); None: the one that fits the base's
      kind

    Errors: ModelError if no modality fits the base; ConfigError if no modality has this name, or an
    extra package is not installed."""
    for candidate in [name] if name else MODALITIES.release():
        modality = MODALITIES.load(candidate)
        if base.kind in modality.kinds:
            return modality().reader(base, tokenizer)
    problem = f"modality {name} does not read" if name else "no modality reads"
    raise ModelError(f"{base.name}: {problem} records for a base of kind {base.kind}")
