"""Hold a site's noised sums, each with its masking key, until the set of ready sites is known.

Sums and keys are only in the memory of the site's process, so no copy of its folder holds them: if
the folder is restored from a backup, a draw cannot be masked again for another set. When the
process ends its draws are lost, and their attempts are void."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedtune.core.files.writing import sync_folder
from fedtune.core.secagg.statement import Draw, Ready

FOLDER = "draws"  # folder in a state folder where earlier releases kept draws


@dataclass(frozen=True, repr=False)
class Waiting:
    """A draw (a site's noised sum) that is ready and not yet masked.

    - total: the noised integer sum, (d,)
    - key: the private masking key that was made for this draw
    - ready: the site's signed statement that the draw is complete
    - reservation: the number of the ledger entry that pays for the draw
    - events: the summary of the step log that is sent with the masked sum, as JSON"""

    total: npt.NDArray[np.int64]
    key: X25519PrivateKey
    ready: Ready
    reservation: int
    events: str


class Draws:
    """The draws (noised sums) of one site that wait until it is known which sites are ready. There
    are none when the site's process starts."""

    def __init__(self) -> None:
        self._waiting: dict[Draw, Waiting] = {}

    def keep(self, waiting: Waiting) -> None:
        """Keep a draw in memory until `destroy` removes it."""
        self._waiting[waiting.ready.draw] = waiting

    def find(self, draw: Draw) -> Waiting | None:
        """Return the noised sum that is kept for `draw`, with its masking key; None if this process
        keeps none. draw: the plan, round, attempt and adapter, all of which must be the same."""
        return self._waiting.get(draw)

    def destroy(self, plan: str, before: tuple[float, float] = (math.inf, 0)) -> None:
        """Remove a plan's draws up to a round and attempt, with their keys, because they were
        masked or the coordinator gave up their attempts.

        - plan: the plan's digest
        - before: (round, attempt) of the last draw that is removed; by default all of the plan's
          are removed"""
        for draw in [*self._waiting]:
            if draw.plan == plan and (draw.round, draw.attempt) <= before:
                del self._waiting[draw]


def remove_stored(folder: Path) -> None:
    """Remove the draws that earlier releases stored, with their keys, in a site's state folder.
    Errors: OSError."""
    places = folder / FOLDER
    if places.is_dir():
        for path in places.glob("*-*-*-*.bin*"):  # drafts that a crash left, too
            path.unlink(missing_ok=True)
        sync_folder(places)
