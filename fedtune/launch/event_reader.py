"""Read the events of a site's halves without ever waiting for them."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from fedtune.core.wire.events import HEADER, MOST


class EventReader:
    """Our end of a connection on which a half of a site sends events;
    `multiprocessing.connection.wait` takes it, and whoever reads a Connection.

    Guarantee: `poll` and `recv_bytes` return at once. A Connection would wait for the rest of an
    event of which a courier sends half, and the vault's events would no longer be shown."""

    def __init__(self, connection: Connection) -> None:
        """Read events from `connection`, which is closed with this object."""
        self._connection = connection
        self._had, self._ended = bytearray(), False
        os.set_blocking(connection.fileno(), False)

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def poll(self, _timeout: float = 0.0) -> bool:
        """Read what has arrived of one event; return whether it is complete, or no more can
        arrive. Errors: OSError if it is longer than an event may be."""
        while not self._ended and (lacking := self._lacking()):
            try:
                read = os.read(self.fileno(), lacking)
            except BlockingIOError:
                return False
            self._had += read
            self._ended = not read
        return True

    def recv_bytes(self, _most: int | None = None) -> bytes:
        """Return an event after `poll` returned that it is complete. Errors: EOFError after the
        last."""
        if self._ended:
            raise EOFError
        event = bytes(self._had[HEADER.size :])
        self._had.clear()
        return event

    def send_bytes(self, reply: bytes) -> None:
        """Send a half the result that it waits for. Errors: OSError if it does not wait."""
        self._connection.send_bytes(reply)

    def _lacking(self) -> int:
        """Count the bytes of the header, or of the event, that have not arrived."""
        if len(self._had) < HEADER.size:
            return HEADER.size - len(self._had)
        (length,) = HEADER.unpack_from(self._had)
        if not 0 <= length <= MOST:
            self._ended = True
            raise OSError("an event is longer than any event may be")
        return HEADER.size + int(length) - len(self._had)
