"""Close connections on which no request comes, before they use up the process's limit."""

from __future__ import annotations

from asyncio import Transport
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

SILENT = 64  # connections without a request, of whoever is on this machine
FIRST_SECONDS = 10.0  # until a request's head must be whole


class Prompt(H11Protocol):
    """Closes a connection whose first request does not come in time, or when SILENT newer ones
    wait.

    Anybody on this machine may connect, even without the token, and each connection uses a file
    descriptor of this process. A browser sends its request at once."""

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
