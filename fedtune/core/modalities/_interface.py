"""Define the interface of a modality, which turns records into tensors."""

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

    For a record with a file (an image, a recording), it writes place-holders for the file into the
    text, and turns the file into the tensor that the base's frozen encoder of images or audio (its
    tower) reads. Targets, caps, units and gradients are the same as for text alone.

    kinds: the kinds of base whose records it reads. A plan gives a modality no options, so all
    fields of a subclass must have defaults."""

    kinds: ClassVar[tuple[Kind, ...]]

    @abstractmethod
    def reader(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> Reader:
        """Build the reader that turns records into tensors for `base`. Errors: ModelError if the
        base cannot be read in this way; ConfigError if an extra package is missing."""
