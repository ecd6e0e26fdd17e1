"""Let the studies of one coordinator take turns, so that only one of them works at a time.

    turns = Turns()
    with turns.line_up(deadline) as turn:   # in the thread of each study
        turn.pass_on()                      # before each round: the waiting studies go first
        turn.pause(2.0)                     # the other studies work meanwhile

A turn is the work of a study between two of these calls: its start, one poll of the sites for
admission, or one round with its measurement. So no two threads change shared state at once, a
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
    """The turn of a study that runs alone and waits for no other. deadline: the time, in seconds
    since 1970, at which the study ends even if it is not finished."""

    def __init__(self, deadline: float = math.inf) -> None:
        self._deadline = deadline

    def pass_on(self) -> None:
        """Let the other studies that wait for their turn work first, then return. A study that runs
        alone goes on at once. Errors: DeadlinePassed if no time is left."""
        self.check()

    def check(self) -> None:
        """Check that the study has time left. Errors: DeadlinePassed."""
        if time.time() >= self._deadline:
            raise DeadlinePassed(
                f"the study's deadline, {format_utc(self._deadline)}, has passed",
                todo="to go on after the last complete round, give --resume and a later --deadline",
            )

    def pause(self, seconds: float) -> None:
        """Sleep for `seconds`, during which other studies may work. Errors: DeadlinePassed if no
        time is left afterwards."""
        time.sleep(seconds)
        self.pass_on()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context manager in whose block the study can be interrupted when a signal ends the
        server. Here it does nothing: a study that runs alone is in the main thread, where Python
        itself raises Stopped. SharedTurn overrides this method, since its thread receives no
        signal."""
        yield


class Turns:
    """The queue of the studies of one server. The first study in the queue has the turn: it works,
    and the others wait."""

    def __init__(self) -> None:
        self._line = deque[SharedTurn]()
        self._changed = threading.Condition()
        self.stop: Stopped | None = None  # the signal that ended the server

    def line_up(self, deadline: float = math.inf) -> SharedTurn:
        """Append a study to the queue and return its turn, which the study's thread enters as a
        context manager. deadline: the time, in seconds since 1970, at which the study ends even if
        it is not finished."""
        turn = SharedTurn(self, deadline)
        with self._changed:
            self._line.append(turn)
        return turn

    def wait_for(self, turn: SharedTurn) -> None:
        """Wait until the study of `turn` is the first in the queue. If the study is not in the
        queue, append it before waiting."""
        with self._changed:
            if turn not in self._line:
                self._line.append(turn)
            self._changed.wait_for(lambda: self._line[0] is turn)

    def leave(self, turn: SharedTurn) -> None:
        """Remove the study of `turn` from the queue, if it is there."""
        with self._changed:
            if turn in self._line:
                self._line.remove(turn)
            self._changed.notify_all()

    def sleep(self, seconds: float) -> None:
        """Sleep for `seconds`. If `end` is called meanwhile, the sleep ends with an exception."""
        end = time.monotonic() + seconds
        with self._changed:
            while (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def end(self, threads: list[threading.Thread], stop: Stopped) -> None:
        """Interrupt the threads of the studies, to which Python delivers no signal: in each thread,
        SharedTurn.interruptible raises `stop`. Return when the threads have ended."""
        self.stop = stop
        alive = [thread for thread in threads if thread.is_alive()]
        for thread in alive:
            ident, kind = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, kind)
        with self._changed:
            self._changed.notify_all()  # a waiting thread raises the exception when it wakes
        for thread in alive:
            thread.join()


class SharedTurn(Turn):
    """The turn of a study that shares the server with others. As a context manager it spans the
    whole study: it waits for the first turn, and leaves the queue at the end."""

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
