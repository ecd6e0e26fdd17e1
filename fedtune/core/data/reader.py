"""Interface with which a base reads a record that has an image, audio or video file."""

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

    column: the column that [data].columns must name besides the text; starts: whether the text
    begins with the place-holders, so that the tokenizer adds no start tokens; avoid: token ids
    that no other text may hold.
    """

    starts: bool
    avoid: frozenset[int]

    @property
    def column(self) -> Kind | None: ...

    def place(self, record: Record, objective: ObjectiveTable) -> tuple[Record, int]:
        """Return the record with place-holders in its text, and its number of tiles (1 if a base
        has none).
        Errors: Rejected."""

    def check(self, ids: list[int], tiles: int) -> None:
        """Check token ids. Errors: Rejected unless `ids` hold the place-holders of exactly this
        many tiles."""

    def tensor(self, media: Media) -> torch.Tensor:
        """Compute the tower's input, fp32, (tiles, ...), from this file alone."""

    def generated(self, draw: np.random.Generator, like: Media | None = None) -> Media | None:
        """Generate a file of noise, with as many tiles as `like`, for checks that must not read a
        real file. Return None if this base reads text alone."""
