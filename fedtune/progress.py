"""Report the progress of long steps to a listener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

OnEvent = Callable[[str, dict[str, Any]], None]  # what happened, and its public facts
Listener = Callable[[str, int, int], None]  # what, done, total

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(text: str, done: int, total: int) -> None:
    """Notify the listener, if there is one, of counts of work, never of content; they go to this
    machine's screen alone."""
    if listener := _listener.get():
        listener(text, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` for every report made in the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def told(on_event: OnEvent | None) -> Iterator[None]:
    """Send reports made in the block to `on_event` as "step" events; None: the outer listener."""
    if on_event is None:
        yield
        return
    notify = on_event

    def listener(text: str, done: int, total: int) -> None:
        notify("step", {"text": text, "done": done, "total": total})

    with listening(listener):
        yield
