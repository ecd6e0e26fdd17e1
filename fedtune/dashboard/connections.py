"""Close connections on which no request arrives, before they use up the file descriptors of the
process."""

from __future__ import annotations

from asyncio import Transport
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

SILENT = 64  # the largest number of open connections without a request
FIRST_SECONDS = 10.0  # time until a connection's first request head must be complete


class Prompt(H11Protocol):
    """A connection that is closed if its first request does not arrive within FIRST_SECONDS, or if
    SILENT newer connections also wait for a first request.

    Anybody on this machine may connect, even without the token, and each connection uses a file
    descriptor of this process. A browser sends its request at once."""

    _silent: ClassVar[dict[Prompt, None]] = {}  # all connections without a request, oldest first

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._silent[self] = None
        if len(self._silent) > SILENT:
            next(iter(self._silent))._end()
        self._timer = self.loop.call_later(FIRST_SECONDS, self._end)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None:  # the head of a request is complete
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
