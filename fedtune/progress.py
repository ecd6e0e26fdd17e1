"""Where a long step says how far it is, and whoever draws it listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

OnEvent = Callable[[str, dict[str, Any]], None]  # what happened, and its public facts
Listener = Callable[[str, int, int], None]  # what, done, total

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def report(text: str, done: int, total: int) -> None:
    """Tell the listener, if there is one. Only counts of work are ever told, never content, and
    they go to this machine's screen alone."""
    if listener := _listener.get():
        listener(text, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """`listener` hears every report made inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def told(on_event: OnEvent | None) -> Iterator[None]:
    """Reports made inside reach `on_event` as "step" events; without one, who listened before."""
    if on_event is None:
        yield
        return
    tell = on_event

    def listener(text: str, done: int, total: int) -> None:
        tell("step", {"text": text, "done": done, "total": total})

    with listening(listener):
        yield
