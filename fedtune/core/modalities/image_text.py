"""Read an image and a text about it, for Idefics3, SmolVLM, LLaVA and Qwen2-VL."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedtune.core.bases.architecture import SIDE
from fedtune.core.bases.digest import unchanged
from fedtune.core.bases.find import Base, load_config
from fedtune.core.config import ObjectiveTable
from fedtune.core.data.files import Rejected
from fedtune.core.data.media import EXTRA, Media, keep_frames, picture
from fedtune.core.data.records import Record
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.modalities._interface import Modality

if TYPE_CHECKING:
    from PIL.Image import Image

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"


class Images:
    """Reads an image as LLaVA does, as one tile. The text gets place-holders for the image in front
    of the prompt or, in a conversation, of the first user message. They stand inside
    objective.template."""

    column: Literal["image"] = "image"
    starts = False

    def __init__(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
        config = _config(base)
        self._processor: Any = _processor(base)
        self._id, self._run = int(config.image_token_id), self._run_of(config)
        self._token: str = tokenizer.convert_ids_to_tokens(self._id)  # type: ignore[assignment]
        if tokenizer.encode(self._token, add_special_tokens=False) != [self._id]:
            raise ModelError(
                f"{base.name}: its tokenizer divides the image token",
                "a tokenizer in which it is one token",
            )
        self.avoid = frozenset([self._id])

    def place(self, record: Record, objective: ObjectiveTable) -> tuple[Record, int]:
        if record.media is None:
            raise Rejected("missing value")
        rows, columns = self._layout(record.media)
        return put_before(record, self.text(rows, columns)), rows * columns + 1

    def check(self, ids: list[int], tiles: int) -> None:
        actual, expected = ids.count(self._id), tiles * self._run
        if actual != expected:
            raise Rejected("too long" if actual < expected else "image token in the text")

    def tensor(self, media: Media) -> torch.Tensor:
        return self.prepare(picture(media))

    def prepare(self, image: Image) -> torch.Tensor:
        """Return an image as the tensor that the tower (the base's image encoder) reads, fp32
        (tiles, 4, height, width): three colours, and a mask that is 0 on padding."""
        pixels = self._processor(images=[image], return_tensors="pt")["pixel_values"]
        return torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1).float()

    def read_whole(self) -> None:
        """From now on, do not split an image into tiles. This class never splits one, so it does
        nothing; subclasses that do split override it."""

    def generated(self, draw: np.random.Generator, like: Media | None = None) -> Media | None:
        """Generate an image of random pixels, of the size of the image `like`. If `like` is None,
        the image is square, wide or high at random, so that generated images differ in their number
        of tiles. draw: the source of the noise and of the shape."""
        from PIL import Image as pillow

        shapes = ((24, 24), (24, 72), (72, 24))
        shape = shapes[int(draw.integers(3))] if like is None else picture(like).size[::-1]
        noise = draw.integers(0, 256, (*shape, 3), dtype=np.uint8)
        return Media.of("image", keep_frames([pillow.fromarray(noise)]))

    def _run_of(self, config: Any) -> int:
        """Return how many image tokens in the text stand for one tile. config: the base's
        transformers config."""
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return int(patches) + int(config.vision_feature_select_strategy == "full")

    def _layout(self, media: Media) -> tuple[int, int]:
        """Return into how many rows and columns of tiles the image is split, besides the whole
        image; (0, 0) if it is not split."""
        return 0, 0

    def text(self, rows: int, columns: int) -> str:
        """Return the place-holders that stand for one image in the text: for the whole image and
        for its tiles. rows, columns: how many rows and columns of tiles the image is split into; 0
        if it is not split."""
        return self._token * self._run


class Tiled(Images):
    """Reads an image as Idefics3 and SmolVLM do: the whole image, and its tiles if it is large."""

    def __init__(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(base, tokenizer)
        self._layouts: dict[bytes, tuple[int, int]] = {}

    def read_whole(self) -> None:
        self._processor.do_image_splitting = False

    def prepare(self, image: Image) -> torch.Tensor:
        processed = self._processor(images=[[image]], return_tensors="pt")
        pixels, mask = processed["pixel_values"][0], processed["pixel_attention_mask"][0]
        return torch.cat([pixels, mask[:, None].to(pixels)], dim=1).float()

    def _run_of(self, config: Any) -> int:
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return int(patches // config.scale_factor**2)

    def _layout(self, media: Media) -> tuple[int, int]:
        if media.digest not in self._layouts:
            processed = self._processor(images=[[picture(media)]], return_row_col_info=True)
            rows, columns = int(processed["rows"][0][0]), int(processed["cols"][0][0])
            self._layouts[media.digest] = rows, columns
        return self._layouts[media.digest]

    def text(self, rows: int, columns: int) -> str:
        """Return the place-holders for an image, with the marks of rows and columns that
        Idefics3Processor.replace_image_token puts around those of each tile."""
        run = self._token * self._run
        whole_image = f"{_FAKE}{_GLOBAL}{run}{_FAKE}"
        lines = (
            "".join(f"{_FAKE}<row_{row + 1}_col_{column + 1}>{run}" for column in range(columns))
            for row in range(rows)
        )
        return "".join(line + "\n" for line in lines) + ("\n" if rows else "") + whole_image


class Square(Images):
    """Reads an image for Qwen2-VL. Every image is scaled and padded to the same square, the largest
    with sides of at most SIDE pixels that the base's processor does not resize. The image is
    centred; the padding has the processor's mean colour."""

    def __init__(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(base, tokenizer)
        marks = [_config(base).vision_start_token_id, _config(base).vision_end_token_id]
        self._marks: list[str] = list(tokenizer.convert_ids_to_tokens(marks))

    def prepare(self, image: Image) -> torch.Tensor:
        """Return an image's P patches as the tensor that the tower (the base's image encoder)
        reads, fp32 (1, P, values of a patch)."""
        from PIL import ImageOps

        prepare = self._processor
        side = math.isqrt(self._run) * prepare.patch_size * prepare.merge_size
        mean_colour = tuple(round(255 * mean) for mean in prepare.image_mean)
        padded = ImageOps.pad(image, (side, side), color=mean_colour)
        patches: torch.Tensor = prepare(images=[padded], return_tensors="pt")["pixel_values"]
        return patches[None].float()

    def _run_of(self, config: Any) -> int:
        vision, size = config.vision_config, self._processor.size
        unit = int(vision.patch_size * vision.spatial_merge_size)
        tokens = max(min(math.isqrt(int(size["longest_edge"])), SIDE) // unit, 1)
        if (tokens * unit) ** 2 < int(size["shortest_edge"]):
            raise ModelError(
                f"the base's image processor takes no square of {tokens * unit} pixels a side",
                f"a shortest_edge of at most {(tokens * unit) ** 2} in preprocessor_config.json",
            )
        return tokens**2

    def text(self, rows: int, columns: int) -> str:
        return self._marks[0] + self._token * self._run + self._marks[1]


@dataclass(frozen=True)
class ImageText(Modality):
    """Reads an image and a text about it, for Idefics3, SmolVLM, LLaVA and Qwen2-VL.

    The image processor in the base's folder resizes and normalises an image and, if configured so,
    splits it into tiles. For each tile the text holds a run of image tokens. In their place the
    network puts the tile's states from the tower (the base's image encoder), projected. For
    Qwen2-VL, which takes images of any size, every image is scaled and padded to one square, so
    that the positions of the text's tokens do not depend on the image."""

    kinds = ("image_text",)

    def reader(self, base: Base, tokenizer: PreTrainedTokenizerBase) -> Images:
        config = _config(base)
        if hasattr(config, "vision_start_token_id"):
            return Square(base, tokenizer)
        return (Tiled if hasattr(config, "scale_factor") else Images)(base, tokenizer)


def put_before(record: Record, placeholders: str) -> Record:
    """Return the record with place-holders put before its prompt or, in a conversation, before the
    text of the first user message."""
    if not record.messages:
        return replace(record, prompt=placeholders + record.prompt)
    messages = list(record.messages)
    first = [role for role, _ in messages].index("user")
    messages[first] = ("user", placeholders + messages[first][1])
    return replace(record, messages=tuple(messages))


@lru_cache(maxsize=4)
def _config(base: Base) -> Any:
    return load_config(base)


def _processor(base: Base) -> Any:
    import transformers

    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{base.name} reads images, and Pillow is not installed", todo=EXTRA
        ) from None
    try:
        auto: Any = transformers.AutoImageProcessor
        with unchanged(base.path, base.digest):
            return auto.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{base.name}: transformers cannot load its image processor ({type(error).__name__})",
            "preprocessor_config.json in the base's folder",
        ) from error
