"""Read a clip and a text about it, for Idefics3, SmolVLM and LLaVA. Experimental."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedtune.core.bases.find import Base
from fedtune.core.config import ObjectiveTable
from fedtune.core.data.files import Rejected
from fedtune.core.data.media import Media, clip, keep_frames
from fedtune.core.data.records import Record
from fedtune.core.data.video import FRAMES
from fedtune.core.errors import ModelError
from fedtune.core.modalities._interface import Modality
from fedtune.core.modalities.image_text import Images, ImageText, Square, put_before


class Clips:
    """Reads a video clip as FRAMES images in order, each of one tile. The base's reader of images
    prepares each frame and gives its place-holders."""

    column: Literal["video"] = "video"
    starts = False

    def __init__(self, images: Images) -> None:
        images.read_whole()
        self._images = images
        self.avoid = images.avoid

    def place(self, record: Record, objective: ObjectiveTable) -> tuple[Record, int]:
        if record.media is None:
            raise Rejected("missing value")
        return put_before(record, self._images.text(0, 0) * FRAMES), FRAMES

    def check(self, ids: list[int], tiles: int) -> None:
        self._images.check(ids, tiles)

    def tensor(self, media: Media) -> torch.Tensor:
        """Return a clip as the tensor that the tower (the base's image encoder) reads, fp32
        (FRAMES, 4, height, width): three colours, and a mask that is 0 on padding."""
        return torch.cat([self._images.prepare(frame) for frame in clip(media)])

    def generated(self, draw: np.random.Generator, like: Media | None = None) -> Media | None:
        """Generate a clip of random pixels, with the width and height of the clip `like`; 24 by 24
        pixels if `like` is None. draw: the source of the noise."""
        from PIL import Image as pillow

        width, height = (24, 24) if like is None else clip(like)[0].size
        noise = draw.integers(0, 256, (FRAMES, height, width, 3), dtype=np.uint8)
        return Media.of("video", keep_frames([pillow.fromarray(frame) for frame in noise]))


@dataclass(frozen=True)
class VideoText(Modality):
    """Reads a clip and a text about it, for Idefics3, SmolVLM and LLaVA. Experimental.

    FRAMES frames, evenly spaced in time, are read as that many images, each by the tower (the
    base's image encoder). In a study with adapters the language model reads the tower's states of
    the frames in order; if only a head is trained, it reads the same states, projected to one
    vector. A study must name this modality in base.modality, else these bases read images."""

    kinds = ("image_text",)

    def reader(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> Clips:
        images = ImageText().reader(base, tokenizer)
        if isinstance(images, Square):
            raise ModelError(
                f"{base.name}: a base that gives each position two coordinates reads no clips",
                "Idefics3, SmolVLM or LLaVA",
            )
        return Clips(images)
