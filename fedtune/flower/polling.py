"""Pauses between two looks for something that another process brings."""

from __future__ import annotations

import time


class Poll:
    """Pauses that grow with the wait: what came soon is seen soon, and a long wait costs little.

    Each is a tenth of the wait so far, but no less than `least` and no more than `most` seconds, so
    that polling makes a wait longer by a tenth, or by `most`."""

    def __init__(self, least: float, most: float) -> None:
        self._least, self._most = least, most
        self.again()

    def again(self) -> None:
        """A new wait begins."""
        self._began = time.monotonic()

    def pause(self) -> None:
        """Sleep until the next look."""
        waited = time.monotonic() - self._began
        time.sleep(min(max(waited / 10, self._least), self._most))
