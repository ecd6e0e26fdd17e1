"""Report the progress of long steps to a listener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

OnEvent = Callable[[str, dict[str, Any]], None]  # what happened, and its public facts
Listener = Callable[[str, int, int], None]  # what, done, total

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_stages: ContextVar[tuple[str, ...]] = ContextVar("stages", default=())


def report(text: str, done: int, total: int) -> None:
    """Notify the listener, if there is one, of counts of work, never of content; they go to this
    machine's screen alone."""
    if listener := _listener.get():
        stages = ", ".join(_stages.get())
        listener(f"{stages}: {text}" if stages else text, done, total)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Begin what is reported in the block with `name`, after the stages around it."""
    token = _stages.set((*_stages.get(), name))
    try:
        yield
    finally:
        _stages.reset(token)


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
