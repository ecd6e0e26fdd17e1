"""What test_gateway.py and test_gateway_handshake.py share."""

from __future__ import annotations

import http.client
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedtune.flower import certs
from fedtune.flower import gateway as module
from fedtune.flower.link import Link
from fedtune.flower.peers import Limits
from tests.flower import kit

PART, MIB = "/v1/fleet/push-object", 1 << 20


BROKEN = (ssl.SSLError, OSError, http.client.HTTPException)


class Upstream(ThreadingHTTPServer):
    """Stands for the SuperLink: counts what arrives, says `says`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.got: list[tuple[str, int, dict[str, str]]] = []
        self.says = b"fine"
        super().__init__(("127.0.0.1", 0), Counter)
        self.trust, key = certs.loopback(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.trust, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        pass  # a peer that leaves in the middle is part of the tests


class Counter(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: Upstream

    def do_POST(self) -> None:
        left = size = int(self.headers["content-length"])
        while left:
            if not (chunk := self.rfile.read(min(left, MIB))):
                raise ConnectionError  # cut off: does not count
            left -= len(chunk)
        self.server.got.append((self.path, size, {k.lower(): v for k, v in self.headers.items()}))
        self.send_response(200)
        self.send_header("content-length", str(len(self.server.says)))
        self.end_headers()
        self.wfile.write(self.server.says)

    def log_message(self, *_: object) -> None:
        pass


class World:
    def __init__(self, root: Path, upstream: Upstream) -> None:
        self.home, self.upstream = root / "home", upstream
        self.sites = {n: kit.join_up(self.home, kit.site_file(root / n, n, 1), 1) for n in "ab"}

    @property
    def a(self) -> Link:
        return self.sites["a"]

    def gateway(self, limits: Limits | None = None) -> Any:
        return kit.gateway(self.home, self.upstream.url, self.upstream.trust, limits)


def context(found: Link, *, certificate: bool = True) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(cadata=found.answer.ca)
    if certificate:
        made.load_cert_chain(found.certificate, found.keys / "tls.key")
    return made


def node_key(found: Link) -> str:
    key = certs.read_key(found.keys / "node.key").public_key()
    return b64encode(certs.public_pem(key)).decode()


@contextmanager
def connected(
    port: int, found: Link, made: ssl.SSLContext | None = None
) -> Iterator[http.client.HTTPSConnection]:
    connection = http.client.HTTPSConnection(
        "127.0.0.1", port, timeout=10, context=made or context(found)
    )
    with closing(connection):
        yield connection


def ask(
    connection: http.client.HTTPConnection,
    key: str,
    path: str = PART,
    body: Any = b"body",
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> tuple[int, str]:
    connection.request(method, path, body, {module.NODE_KEY.decode(): key} | (headers or {}))
    response = connection.getresponse()
    return response.status, response.read().decode()


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
