"""The interface by which a base reads a record with an image, audio or video file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fedtune.core.config import ObjectiveTable
    from fedtune.core.data.media import Kind, Media
    from fedtune.core.data.records import Record


class Reader(Protocol):
    """How one base reads a record with an image, audio or video file.

    - column: the kind of column, "image", "audio" or "video", that [data.columns] must name besides
      the text; None if there is none
    - starts: whether `place` puts the base's start tokens before the text, so that the tokenizer
      must add none
    - avoid: the ids of the special tokens that stand for a part of a file; no record's own text may
      hold them"""

    starts: bool
    avoid: frozenset[int]

    @property
    def column(self) -> Kind | None: ...

    def place(self, record: Record, objective: ObjectiveTable) -> tuple[Record, int]:
        """Return two values: a copy of the record whose text holds special tokens in the place of
        its file, and the number of tiles (parts) into which the base splits the file; 1 if it does
        not split the file, or reads none. Errors: Rejected if the base cannot read the record."""

    def check(self, ids: list[int], tiles: int) -> None:
        """Check that a tokenised text holds the special tokens of exactly `tiles` tiles of a file,
        no more and no fewer. ids: the token ids. Errors: Rejected."""

    def tensor(self, media: Media) -> torch.Tensor:
        """Compute the input of the base's image, audio or video encoder from one file alone:
        (tiles, …) fp32, one row for each part into which the base splits the file."""

    def generated(self, draw: np.random.Generator, like: Media | None = None) -> Media | None:
        """Generate an image, a recording or a clip of noise, for checks that must not read a real
        file. Return None if this base reads text alone.

        - draw: the generator of the noise
        - like: a file that has as many tiles as the result is to have; None: any number will do"""
