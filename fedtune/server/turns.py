"""Let the studies of one coordinator take turns: one of them works at a time, a round long.

    turns = Turns()
    with turns.line_up(deadline) as turn:   # in the thread of each study
        turn.pass_on()                      # before each round: whoever waits comes first
        turn.pause(2.0)                     # the others work meanwhile

What a study does between two of these calls is one turn: its start, the wait for one answer to the
plan, or one round with its measurement. So the studies share no state that two threads change, a
site never has orders of two studies at once, and a round has its whole strategy.round_timeout.
Guarantee: first come, first served. Between two turns of a study each other study has at most one.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from fedtune.core.errors import InfrastructureError, Stopped
from fedtune.server.schedule import format_utc


class DeadlinePassed(InfrastructureError):
    """A study is not finished at its deadline."""


class Turn:
    """The turn of a study that runs alone, and waits for no other. deadline: when the study ends
    if it is not finished, in seconds since 1970."""

    def __init__(self, deadline: float = math.inf) -> None:
        self._deadline = deadline

    def pass_on(self) -> None:
        """Let the studies that wait for their turn go first. Errors: DeadlinePassed."""
        self.check()

    def check(self) -> None:
        """Check that the study has time left. Errors: DeadlinePassed."""
        if time.time() >= self._deadline:
            raise DeadlinePassed(
                f"its deadline, {format_utc(self._deadline)}, has passed",
                todo="a later --deadline, and --resume, goes on after the last complete round",
            )

    def pause(self, seconds: float) -> None:
        """Sleep; other studies work meanwhile. Errors: DeadlinePassed."""
        time.sleep(seconds)
        self.pass_on()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise in the block the signal that ends the server, whatever the thread. Errors:
        Stopped."""
        yield


class Turns:
    """The line in which the studies of one server wait; its first has the turn."""

    def __init__(self) -> None:
        self._line = deque[SharedTurn]()
        self._changed = threading.Condition()
        self.stop: Stopped | None = None  # the signal that ended the server

    def line_up(self, deadline: float = math.inf) -> SharedTurn:
        """Give a study its place, the last, and return its turn: the study's thread enters it."""
        turn = SharedTurn(self, deadline)
        with self._changed:
            self._line.append(turn)
        return turn

    def wait_for(self, turn: SharedTurn) -> None:
        """Return as soon as a study is the first in the line."""
        with self._changed:
            if turn not in self._line:
                self._line.append(turn)
            self._changed.wait_for(lambda: self._line[0] is turn)

    def leave(self, turn: SharedTurn) -> None:
        """Take a study out of the line, if it is in it."""
        with self._changed:
            if turn in self._line:
                self._line.remove(turn)
            self._changed.notify_all()

    def sleep(self, seconds: float) -> None:
        """Sleep until `seconds` have passed, or `end` is called."""
        end = time.monotonic() + seconds
        with self._changed:
            while (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def end(self, threads: list[threading.Thread], stop: Stopped) -> None:
        """Raise `stop` in the studies' threads, where Python itself raises no signal, and return
        when they have ended."""
        self.stop = stop
        alive = [thread for thread in threads if thread.is_alive()]
        for thread in alive:
            ident, kind = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, kind)
        with self._changed:
            self._changed.notify_all()  # who waits raises it when it wakes
        for thread in alive:
            thread.join()


class SharedTurn(Turn):
    """A turn among others; a context manager for the whole of a study."""

    def __init__(self, turns: Turns, deadline: float) -> None:
        super().__init__(deadline)
        self._turns = turns

    def __enter__(self) -> SharedTurn:
        self._turns.wait_for(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._turns.leave(self)

    def pass_on(self) -> None:
        self._turns.leave(self)
        self._turns.wait_for(self)
        self.check()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        try:
            yield
        except SystemExit:
            raise self._turns.stop or SystemExit from None

    def pause(self, seconds: float) -> None:
        self._turns.leave(self)
        self._turns.sleep(seconds)
        self.pass_on()
