"""Where a long step says how far it is, and whoever draws it listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
