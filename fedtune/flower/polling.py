"""Pause between two checks for a result of another process."""

from __future__ import annotations

import time
from typing import Any

# Shortest and longest pause of a SuperNode: between polls for work (Flower's own: 3 s), and between
# checks for an answer in its own memory (Flower's own: 0.5 s).
LOOK_SECONDS = (0.25, 1.0)
REPLY_SECONDS = (0.02, 0.5)


class Poll:
    """Makes the pauses between checks for a result. They grow with the wait, so that an early
    result is found soon and a long wait needs few checks.

    A pause is a tenth of the wait so far, but at least `least` and at most `most` seconds. So
    polling prolongs a wait by at most a tenth of it, or by `least` if that is more, and never by
    more than `most`."""

    def __init__(self, least: float, most: float) -> None:
        self._least, self._most = least, most
        self.again()

    def again(self) -> None:
        """Begin a new wait, so that the pauses are short again."""
        self._began = time.monotonic()

    def pause(self) -> None:
        """Sleep until the next check."""
        waited = time.monotonic() - self._began
        time.sleep(min(max(waited / 10, self._least), self._most))


class Impatient:
    """Replaces the module `time` in Flower's code, so that Flower sleeps less between two checks.
    This matters since a round waits for the site that checks last.

    Flower asks for 3 s if there is no work, and for 0.5 s if an answer has not arrived yet. In
    place of these, `sleep` makes the growing pauses of a Poll: between LOOK_SECONDS for the longer,
    between REPLY_SECONDS for the shorter. If Flower asks for another length than the last time, it
    has begun to wait for something else, and the pauses start short again."""

    def __init__(self) -> None:
        self._last = 0.0
        self._poll = Poll(*LOOK_SECONDS)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        if seconds != self._last:  # Flower waits for something else now
            self._last = seconds
            self._poll = Poll(*(LOOK_SECONDS if seconds > 1 else REPLY_SECONDS))
        self._poll.pause()
