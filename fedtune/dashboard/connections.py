"""Connections to a page of which no request comes: they end, before they are all there are."""

from __future__ import annotations

from asyncio import Transport
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

SILENT = 64  # connections without a request, of whoever is on this machine
FIRST_SECONDS = 10.0  # until a request's head must be whole


class Prompt(H11Protocol):
    """Closes a connection whose first request is not there in time, or when SILENT newer ones wait.

    Anybody on this machine may connect, also who has no token; each connection is a file that this
    process may have open. A browser sends its request at once."""

    _silent: ClassVar[dict[Prompt, None]] = {}  # oldest first; of all connections of this process

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._silent[self] = None
        if len(self._silent) > SILENT:
            next(iter(self._silent))._end()
        self._timer = self.loop.call_later(FIRST_SECONDS, self._end)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None:  # its head is whole
            self._end_silence()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_silence()
        super().connection_lost(exc)

    def _end_silence(self) -> None:
        self._silent.pop(self, None)
        self._timer.cancel()

    def _end(self) -> None:
        self._silent.pop(self, None)
        self.transport.close()
