"""Run a command until a signal stops it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedtune.core.errors import Stopped
from fedtune.core.processes import interruptible
from fedtune.core.progress import OnEvent


@contextmanager
def until_stopped(notify: OnEvent) -> Iterator[None]:
    """Run a command's block until a signal arrives. SIGTERM sends the event "stopped" and ends the
    block without an error; SIGINT raises KeyboardInterrupt, as in every command."""
    try:
        with interruptible():
            yield
    except Stopped as stop:
        if stop.name == "SIGINT":
            raise KeyboardInterrupt from None
        reason = f"stopped by {stop.name}"
        notify("stopped", {"reason": reason, "text": reason})
