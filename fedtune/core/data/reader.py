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
    """One base's way of reading records.

    - column: the column that [data].columns must name besides the text; None if there is none
    - starts: whether `place` puts the base's start tokens before the text, so that the tokenizer
      adds none
    - avoid: token ids that no text may hold except as place-holders
    """

    starts: bool
    avoid: frozenset[int]

    @property
    def column(self) -> Kind | None: ...

    def place(self, record: Record, objective: ObjectiveTable) -> tuple[Record, int]:
        """Return a copy of the record with place-holders for its file in its text, and the number
        of tiles (parts) into which the base splits the file; 1 if it splits none. Errors: Rejected
        if the base cannot read the record."""

    def check(self, ids: list[int], tiles: int) -> None:
        """Check that the token ids `ids` hold the place-holders of exactly `tiles` tiles. Errors:
        Rejected."""

    def tensor(self, media: Media) -> torch.Tensor:
        """Compute the input of the base's image or audio encoder from this file alone: fp32,
        (tiles, …)."""

    def generated(self, draw: np.random.Generator, like: Media | None = None) -> Media | None:
        """Generate a file of noise, with as many tiles as `like` if given, for checks that must not
        read a real file. Return None if this base reads text alone. draw: the generator of the
        noise."""
