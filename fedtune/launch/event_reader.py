"""Read the events of a site's two processes, vault and courier, without blocking."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from fedtune.core.wire.events import HEADER, MOST


class EventReader:
    """The reading end of a connection on which vault or courier sends events. It has the methods of
    multiprocessing's Connection that are used here, so it can be passed in place of one, also to
    `multiprocessing.connection.wait`.

    Guarantee: `poll` and `recv_bytes` return at once. A Connection would wait for the rest of an
    incomplete event, and meanwhile the other half's events would not be shown."""

    def __init__(self, connection: Connection) -> None:
        """Read events from `connection`, which `close` closes."""
        self._connection = connection
        self._had, self._ended = bytearray(), False
        os.set_blocking(connection.fileno(), False)

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def poll(self, _timeout: float = 0.0) -> bool:
        """Read those bytes of the next event that have arrived, without waiting for more. Return
        whether the event is complete, or the connection has ended. Errors: OSError if the event is
        longer than allowed."""
        while not self._ended and (lacking := self._lacking()):
            try:
                read = os.read(self.fileno(), lacking)
            except BlockingIOError:
                return False
            self._had += read
            self._ended = not read
        return True

    def recv_bytes(self, _most: int | None = None) -> bytes:
        """Return the complete event after `poll` returned True. Errors: EOFError after the last
        event."""
        if self._ended:
            raise EOFError
        event = bytes(self._had[HEADER.size :])
        self._had.clear()
        return event

    def send_bytes(self, reply: bytes) -> None:
        """Send `reply`, a result for which the process at the other end waits. Errors: OSError if
        the process does not read it."""
        self._connection.send_bytes(reply)

    def _lacking(self) -> int:
        """Return how many bytes are still missing: those of the event's header or, once the header
        is complete, those of the event. Errors: OSError if the event is longer than allowed."""
        if len(self._had) < HEADER.size:
            return HEADER.size - len(self._had)
        (length,) = HEADER.unpack_from(self._had)
        if not 0 <= length <= MOST:
            self._ended = True
            raise OSError("an event is longer than any event may be")
        return HEADER.size + int(length) - len(self._had)
