"""Define the interface of a modality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedtune.core.bases.find import Base
    from fedtune.core.config.known_bases import Kind
    from fedtune.core.data.reader import Reader


@dataclass(frozen=True)
class Modality(ABC):
    """Turns a record into tensors.

    It writes place-holders into a record's text and turns the record's file into the tensor that
    the base's frozen tower reads. Targets, caps, units and gradients are as for text.

    kinds: the kinds of base whose records it reads. A plan gives a modality no options, so all
    fields of a subclass must have defaults."""

    kinds: ClassVar[tuple[Kind, ...]]

    @abstractmethod
    def reader(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> Reader:
        """Build the reader for `base`. Errors: ModelError, ConfigError (an extra is missing)."""
