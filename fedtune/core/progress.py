"""Report the progress of long steps to a listener."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

OnEvent = Callable[[str, dict[str, Any]], None]  # what happened, and its public facts
OnWork = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Step:
    """The progress of a long step.

    - text: what is done, in words for people
    - done, total: how many parts of the step are done, and how many there are. Parts take equally
      long, so the time left follows from the time taken; total is 0 if it is not known
    - once: whether the step is done in one round only, and not repeated in later ones"""

    text: str
    done: int = 0
    total: int = 0
    once: bool = False

    @property
    def share(self) -> float | None:
        """The share that is done, from 0 to 1; None if the total is not known."""
        return self.done / self.total if self.total else None


Listener = Callable[[Step], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_stages: ContextVar[tuple[str, ...]] = ContextVar("stages", default=())


def report(text: str, done: int = 0, total: int = 0, *, once: bool = False) -> None:
    """Report the progress of a step to the listener, if there is one. Only counts of work are
    reported, never content. Progress is shown on this machine's screen only.

    - text: what is done, in words for people
    - done, total: how many parts of the step are done, and how many there are, parts that take
      equally long; total is 0 if it is not known
    - once: whether the step is done in one round only, and not repeated in later ones"""
    if listener := _listener.get():
        stages = ", ".join(_stages.get())
        listener(Step(f"{stages}: {text}" if stages else text, done, total, once))


def reporter(text: str, before: int = 0, passes: int = 1) -> OnWork:
    """Return a function that reports the progress of a step that makes several equal passes. Call
    it with how much of the present pass is done, and how much the pass is in all.

    - text: what is done, in words for people
    - before: how many passes are finished
    - passes: how many passes there are"""

    def on_work(done: int, total: int) -> None:
        report(text, before * total + done, passes * total)

    return on_work


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A context manager: put `name` before the text of every report made in the block. Names of
    stages around it come first."""
    token = _stages.set((*_stages.get(), name))
    try:
        yield
    finally:
        _stages.reset(token)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """A context manager: call `listener` with every report made in the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def told(on_event: OnEvent | None) -> Iterator[None]:
    """A context manager: send every report made in the block to `on_event`, as an event "step" with
    text, done and total. None: the listener that was set before gets the reports."""
    if on_event is None:
        yield
        return
    notify = on_event

    def listener(step: Step) -> None:
        notify("step", {"text": step.text, "done": step.done, "total": step.total})

    with listening(listener):
        yield
