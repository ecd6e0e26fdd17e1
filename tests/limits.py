"""A limit on the processor's seconds that a test may take: no other process on the machine bears on
it, and what hangs fails alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise AssertionError in this thread after so many seconds of this process's own work."""

    def late(*_: Any) -> None:
        raise AssertionError(f"it works for more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
