"""The processes of test_upload.py beside the coordinator's.

upload_roles.py site SITE.toml [N [zeros]]   answers each message with the same array, of N numbers
upload_roles.py proxy PORT [AT ...]          HTTP CONNECT; whenever the bytes from the site pass the
                                             next AT, breaks every connection without a word
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict

from fedtune.flower.records import to_record
from tests.flower.own_app import join_with

PART = 5 * 2**20  # Flower's largest
SIZE = 8 * PART


def update(size: int = SIZE) -> np.ndarray:
    """Numbers of one byte; no part is like another."""
    return np.random.default_rng(0).integers(-128, 128, size, dtype=np.int8)


def app_of(array: np.ndarray) -> Callable[[Message, Context], Message]:
    def app(message: Message, _context: Context) -> Message:
        return Message(RecordDict({"update": to_record({"a": array})}), reply_to=message)

    return app


class Proxy:
    """Prints "up N" at each cut and at the end: the bytes that came from the site by then."""

    def __init__(self, at: list[int]) -> None:
        self.at, self.up = at, 0
        self.open: set[asyncio.StreamWriter] = set()

    async def pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: bool
    ) -> None:
        with suppress(OSError):
            while chunk := await reader.read(65_536):
                self.up += len(chunk) * count
                if self.at and self.up >= self.at[0]:
                    self.at.pop(0)
                    print("up", self.up, flush=True)
                    for each in self.open:
                        each.transport.abort()
                    return
                writer.write(chunk)
                await writer.drain()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            host, _, port = head.split()[1].decode().rpartition(":")
            near, far = await asyncio.open_connection(host, int(port))
            self.open |= {writer, far}
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            pumps = [self.pump(reader, far, True), self.pump(near, writer, False)]
            tasks = [asyncio.create_task(each) for each in pumps]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for each in tasks:
                each.cancel()
        except (OSError, EOFError):
            pass
        finally:
            for each in filter(None, (writer, far)):
                self.open.discard(each)
                each.transport.abort()

    async def run(self, port: int) -> None:
        await asyncio.start_server(self.serve, "127.0.0.1", port)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        await ended.wait()
        print("up", self.up, flush=True)


if __name__ == "__main__":
    role, first, *rest = sys.argv[1:]
    if role == "site":
        size = int(rest[0]) if rest else SIZE
        array = np.zeros(size, np.int8) if "zeros" in rest else update(size)
        join_with(app_of(array), Path(first), patience=90.0)
    else:
        asyncio.run(Proxy([int(word) for word in rest]).run(int(first)))
