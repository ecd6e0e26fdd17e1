"""Pause between two checks for a result of another process."""

from __future__ import annotations

import time
from typing import Any

LOOK_SECONDS = (0.25, 1.0)  # between an idle SuperNode's polls for work; Flower's default is 3
REPLY_SECONDS = (0.02, 0.5)  # between its looks for an answer in its own memory; Flower's: 0.5


class Poll:
    """Pauses that grow with the wait: an early result is found soon, and a long wait costs
    little.

    Each is a tenth of the wait so far, but no less than `least` and no more than `most` seconds, so
    that polling makes a wait longer by a tenth, or by `most`."""

    def __init__(self, least: float, most: float) -> None:
        self._least, self._most = least, most
        self.again()

    def again(self) -> None:
        """Begin a new wait."""
        self._began = time.monotonic()

    def pause(self) -> None:
        """Sleep until the next check."""
        waited = time.monotonic() - self._began
        time.sleep(min(max(waited / 10, self._least), self._most))


class Impatient:
    """A replacement of the module `time` with other sleeps, since a round waits for the site that
    polls last.

    Flower sleeps 3 s if there is no work, and shorter if an answer is not there yet."""

    def __init__(self) -> None:
        self._last = 0.0
        self._poll = Poll(*LOOK_SECONDS)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        if seconds != self._last:  # another wait than before
            self._last = seconds
            self._poll = Poll(*(LOOK_SECONDS if seconds > 1 else REPLY_SECONDS))
        self._poll.pause()
