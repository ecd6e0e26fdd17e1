"""Run a command until a signal stops it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedtune.core.errors import Stopped
from fedtune.core.processes import interruptible
from fedtune.core.progress import OnEvent


@contextmanager
def until_stopped(notify: OnEvent) -> Iterator[None]:
    """A context manager that ends its block when a signal arrives. At SIGTERM it calls `notify`
    with the event "stopped", and the command goes on after the block without an error. At SIGINT it
    raises KeyboardInterrupt, as in every command."""
    try:
        with interruptible():
            yield
    except Stopped as stop:
        if stop.name == "SIGINT":
            raise KeyboardInterrupt from None
        reason = f"stopped by {stop.name}"
        notify("stopped", {"reason": reason, "text": reason})
