"""Read records of text alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedtune.core.bases.find import Base
from fedtune.core.config import ObjectiveTable
from fedtune.core.data.media import Media
from fedtune.core.data.records import Record
from fedtune.core.modalities._interface import Modality


class Text:
    column = None
    starts = False
    avoid: frozenset[int] = frozenset()

    def place(self, record: Record, objective: ObjectiveTable) -> tuple[Record, int]:
        return record, 1

    def check(self, ids: list[int], tiles: int) -> None: ...

    def tensor(self, media: Media) -> torch.Tensor:
        raise TypeError("a text base reads no files")

    def generated(self, draw: np.random.Generator, like: Media | None = None) -> Media | None:
        return None


@dataclass(frozen=True)
class TextModality(Modality):
    """Reads records of text alone, in which no file needs a place-holder."""

    kinds = ("causal", "encoder")

    def reader(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> Text:
        return Text()
