"""Modalities: one module each, found by listing this package. A record becomes tensors.

A module offers

    KINDS                       the kinds of base that it serves (config/known_bases.py)
    reader(base, tokenizer)     a Reader

A modality writes place-holders into a record's text and turns its file into the tensor that the
frozen tower reads. All else (targets, caps, units, gradients) is as for text."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from fedtune.data.reader import Reader
from fedtune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedtune.bases.find import Base


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
