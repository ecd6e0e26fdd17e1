"""Read what a courier tells without ever waiting for it."""

from __future__ import annotations

import os
import struct
from multiprocessing.connection import Connection

HEADER = struct.Struct("!i")  # the length of what follows, as multiprocessing.connection sends it


class CourierEvents:
    """Our end of a connection on which a courier sends events; `multiprocessing.connection.wait`
    takes it, and whoever reads a Connection.

    Guarantee: `poll` and `recv_bytes` return at once. A Connection would wait for the rest of an
    event of which a courier sends half: who shows the vault's events would stand still, and so, as
    soon as these fill their pipe, would the vault; after how many orders follows from how many
    events its records make."""

    def __init__(self, connection: Connection, most: int) -> None:
        """connection: is closed with this; most: bytes of one event."""
        self._connection, self._most = connection, most
        self._had, self._ended = bytearray(), False
        os.set_blocking(connection.fileno(), False)

    def fileno(self) -> int:
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def poll(self, _timeout: float = 0.0) -> bool:
        """Read what has arrived of one event; return whether it is whole, or none comes any more.
        Errors: OSError where it is longer than one may be."""
        while not self._ended and (lacking := self._lacking()):
            try:
                read = os.read(self.fileno(), lacking)
            except BlockingIOError:
                return False
            self._had += read
            self._ended = not read
        return True

    def recv_bytes(self, _most: int | None = None) -> bytes:
        """Return an event after `poll` said that it is whole. Errors: EOFError after the last."""
        if self._ended:
            raise EOFError
        event = bytes(self._had[HEADER.size :])
        self._had.clear()
        return event

    def _lacking(self) -> int:
        """Count the bytes of the header, or of the event, that have not arrived."""
        if len(self._had) < HEADER.size:
            return HEADER.size - len(self._had)
        (length,) = HEADER.unpack_from(self._had)
        if not 0 <= length <= self._most:
            self._ended = True
            raise OSError("an event of a length that none has")
        return HEADER.size + int(length) - len(self._had)
