"""Send events from a site's halves to the person at its screen: progress of long work, and lines of
the log.

Each half has its own pipe to the process that started it. Events of the courier may be hostile, so
they are accepted only up to a length and with known names and types, and their text is made
printable."""

from __future__ import annotations

import json
import logging
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from fedtune.core.errors import FedtuneError, error_of, facts_of
from fedtune.core.progress import Step

MOST = 1 << 20  # bytes of one event
HEADER = struct.Struct("!i")  # the length of what follows, as multiprocessing.connection sends it


class Receives(Protocol):
    """The source of events: a multiprocessing Connection, or an object that reads one without
    waiting."""

    def recv_bytes(self, maxlength: int | None = None, /) -> bytes: ...


class Teller:
    """Sends events over a connection to the process that started this one. Call it with the event's
    name and its facts. If that process has ended, events are dropped.

    Guarantee: the sender never waits for an event to be read. If the process that started this one
    reads nothing, for example while its terminal is paused, events that do not fit into the
    connection are left out and counted. A vault that waited would stop answering after a number of
    events that depends on records, and the coordinator would see when. Only `fetch` and `error`
    wait: `fetch` for its result, `error` because this process answers nobody afterwards. An event
    of more than MOST bytes is left out as well, since its reader could read no later event."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._mutex = connection, threading.Lock()
        self._rest = b""  # the rest of an event that was sent in part
        self._left_out = 0
        os.set_blocking(connection.fileno(), False)

    def __call__(self, event: str, facts: dict[str, Any]) -> None:
        # OSError: the process that started this one has ended, and this one will end, too.
        with self._mutex, suppress(OSError):
            if self._left_out and self._send(_not_shown(self._left_out)):
                self._left_out = 0
            content = json.dumps([event, facts])
            if self._left_out or len(content) > MOST or not self._send(content):
                self._left_out += 1

    def fetch(self, base: str) -> None:
        """Have the process that started this one fetch a base, and wait until it has. base: the
        base's name, as site.base gives it. Errors: those with which the fetch fails."""
        with self._waiting():
            self("fetch", {"base": base})
            told = json.loads(self._connection.recv_bytes(MOST))
        if told:
            raise error_of(told)

    def step(self, step: Step) -> None:
        """Send the progress of a long step."""
        self("step", {"text": step.text, "done": step.done, "total": step.total})

    def error(self, error: FedtuneError) -> None:
        """Send the error with which this half ends."""
        with self._waiting():
            self("error", facts_of(error))

    def _send(self, event: str) -> bool:
        """Send an event, or as much of it as the connection has space for. Return False if nothing
        of it was sent."""
        if not self._send_rest():
            return False
        content = event.encode()
        whole = HEADER.pack(len(content)) + content
        self._rest = whole
        if self._send_rest() or len(self._rest) < len(whole):
            return True
        self._rest = b""
        return False

    def _send_rest(self) -> bool:
        """Send what is left of the event that was begun last. Return whether nothing of it is
        left."""
        try:
            while self._rest:
                self._rest = self._rest[os.write(self._connection.fileno(), self._rest) :]
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """A context manager: during the block, writes and reads on the connection wait until they
        can be done; before and after it they fail at once instead."""
        with suppress(OSError):
            os.set_blocking(self._connection.fileno(), True)
        try:
            yield
        finally:
            with suppress(OSError):
                os.set_blocking(self._connection.fileno(), False)


def _not_shown(events: int) -> str:
    text = f"{events} events were not shown: they were too long, or this screen stood still"
    return json.dumps(["log", {"level": "WARNING", "text": text}])


def pass_warnings_on(tell: Callable[[str, dict[str, Any]], None]) -> None:
    """Send each warning that fedtune itself logs to the process that started this one, which logs
    it there. Warnings of other libraries are not sent, since they may quote a record. tell: sends
    an event, given its name and its facts."""
    logging.getLogger("fedtune").addHandler(_ToTeller(tell))


class _ToTeller(logging.Handler):
    """A log handler that sends each warning as an event."""

    def __init__(self, tell: Callable[[str, dict[str, Any]], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell("log", {"level": record.levelname, "text": record.getMessage()})


def receive(connection: Receives) -> tuple[str, dict[str, Any]]:
    """Receive one event, and return its name and its facts. Errors: EOFError or OSError if the
    sender has ended, or sends more bytes than an event may have; ValueError if the bytes are not an
    event."""
    told = connection.recv_bytes(MOST)
    try:
        event, facts = json.loads(told)
    except (TypeError, RecursionError):
        raise ValueError("not an event") from None
    if not isinstance(event, str) or not isinstance(facts, dict):
        raise ValueError("not an event")
    return event, facts
