"""Hold a site's noised sums until their set of sites is known, with the masking keys of their
draws.

They are only in the memory of the site's process, so that no copy of its folder holds one: a
folder that is put back to an earlier moment cannot mask a draw a second time, for another set.
When a process ends its draws are lost, and their attempts are void at this site."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedtune.core.files.writing import sync_folder
from fedtune.core.secagg.statement import Draw, Ready

FOLDER = "draws"  # in a state folder, where earlier releases kept them


@dataclass(frozen=True, repr=False)
class Waiting:
    """A draw that is ready and not yet masked.

    total: the noised integer sum, (d,); reservation: the ledger's entry that pays for it; events:
    the step log's summary, as it is sent."""

    total: npt.NDArray[np.int64]
    key: X25519PrivateKey
    ready: Ready
    reservation: int
    events: str


class Draws:
    """The draws of one site that wait for their set of sites; empty when its process starts."""

    def __init__(self) -> None:
        self._waiting: dict[Draw, Waiting] = {}

    def keep(self, waiting: Waiting) -> None:
        """Keep a draw until it is destroyed."""
        self._waiting[waiting.ready.draw] = waiting

    def find(self, draw: Draw) -> Waiting | None:
        """Return the draw that waits for its set of sites; None if this process has none:
        another attempt is a new draw."""
        return self._waiting.get(draw)

    def destroy(self, plan: str, before: tuple[float, float] = (math.inf, 0)) -> None:
        """Drop the plan's draws of (round, attempt) up to `before`, with their keys: those that
        were masked, and those of attempts that the coordinator gave up. Without a round, drop
        all draws of the plan."""
        for draw in [*self._waiting]:
            if draw.plan == plan and (draw.round, draw.attempt) <= before:
                del self._waiting[draw]


def remove_stored(folder: Path) -> None:
    """Remove the draws, and their keys, that earlier releases stored in a site's folder. Errors:
    OSError."""
    places = folder / FOLDER
    if places.is_dir():
        for path in places.glob("*-*-*-*.bin*"):  # drafts that a crash left, too
            path.unlink(missing_ok=True)
        sync_folder(places)
