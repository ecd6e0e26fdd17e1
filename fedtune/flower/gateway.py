"""Run the gateway, the coordinator's only exposed port. Through it admitted sites reach Flower's
Fleet API.

    site's forwarder ── TLS 1.3, client certificate ──> gateway ── loopback ──> SuperLink

A connection needs a client certificate that the consortium's CA signed and that is valid now;
without one it is refused before a byte of HTTP is read. Then each request is refused unless it
meets all of these conditions:

| call      | it is a POST to one of FLEET, the ten calls of an authenticated SuperNode          |
| site      | the certificate's name is admitted with the certificate's key at this moment; the |
|           | record is read from disk for each request                                          |
| node key  | it is the one admitted under this name                                             |
| size      | it is announced, and at most Limits.request_bytes for a part of a message, and     |
|           | Limits.words for any other request                                                 |
| pushes    | the site has pushed no more than its allowance (allowance.py)                      |
| rate      | the site is within Limits.rate                                                     |

The gateway itself answers two calls: GET STATUS (the answer holds its clock and protocol, for
`fedtune doctor`), and POST RENEW (with a certificate signing request for the same key; the answer
is a new certificate). A second renewal within Limits.renewal seconds is answered with 429.
Guarantee: bodies are streamed and never held whole. So memory grows only with the number of open
connections, which is bounded in total and per site. Revocation closes a site's open connections
within a second. Peers without a certificate cannot keep others out: if a newcomer's network has too
many unfinished handshakes, the oldest of that network is dropped; if there are too many in all, the
oldest of all is. Only the head of a request is parsed, by h11. Errors: refusals are counted by
reason in Gateway.refused. If a request is refused, the site gets the reason in one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import h11
import httpx

from fedtune.core.errors import FedtuneError
from fedtune.core.wire.protocol import version_fields
from fedtune.flower import allowance, certs, enrol
from fedtune.flower.peers import (
    HEAD,
    Denied,
    Limits,
    Peer,
    content_length,
    decode_value,
    network_of,
    peer_of,
    tls_reason,
)

FLEET = frozenset(
    "/v1/fleet/" + call
    for call in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab"),
        *("pull-messages", "push-messages", "pull-object", "push-object"),
        "confirm-message-received",
    )
)
PUSHES = frozenset({"/v1/fleet/push-messages", PART := "/v1/fleet/push-object"})
STATUS, RENEW = "/fedtune/status", "/fedtune/renew"
NODE_KEY = b"flwr-public-key"  # base64 of the key in PEM; the SuperLink checks its signature
PASSED = (b"content-type", b"accept", b"content-length")  # headers passed on, besides flwr-...
CHUNK = 65_536
RENEWAL_SECONDS = 3600.0  # pause between two checks of the server's own certificate


class Gateway:
    """A coordinator's server that checks sites' requests and passes them to Flower's SuperLink.

    - home: the coordinator's home, with CA, registry and allowances
    - upstream: the SuperLink's URL, without a path
    - trust: the file of the SuperLink's certificate, the only one that is trusted
    - limits: the limits on connections and requests; None for the defaults of Limits"""

    def __init__(
        self, home: Path, upstream: str, trust: Path, limits: Limits | None = None
    ) -> None:
        self.home, self.limits = home, limits or Limits()
        self.refused: Counter[str] = Counter()
        self._peers: set[Peer] = set()
        self._quota = allowance.Quota(home, self.limits.burst, self.limits.rate)
        self._renewed: dict[str, float] = {}  # site -> time of its last renewal (monotonic)
        self._tasks: set[asyncio.Task[None]] = set()
        self._shaking: dict[asyncio.Task[None], str] = {}  # unfinished handshake -> its network
        self._upstream = upstream
        self._client = httpx.AsyncClient(
            verify=ssl.create_default_context(cafile=str(trust)),
            trust_env=False,
            timeout=httpx.Timeout(self.limits.stall, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_3
        self._tls.verify_mode = ssl.CERT_REQUIRED
        self._tls.num_tickets = 0  # a client that resumes a session sends no certificate
        authority = certs.ca(home)[1].public_bytes(certs.PEM)
        self._tls.load_verify_locations(cadata=authority.decode())
        self._load_leaf()

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections on `listener`, and serve each in a task of its own, until this task is
        cancelled."""
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        watch = loop.create_task(self._watch())
        try:
            while True:
                try:
                    accepted, address = await loop.sock_accept(listener)
                except OSError:  # no file descriptor is free: wait for one
                    await asyncio.sleep(0.1)
                    continue
                self._make_room(network := network_of(address[0]))
                task = loop.create_task(self._welcome(accepted))
                self._shaking[task] = network
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                await asyncio.sleep(0)  # let the task begin: until then it cannot close its socket
        finally:
            for task in (watch, *self._tasks):
                task.cancel()
            await asyncio.gather(watch, *self._tasks, return_exceptions=True)
            await self._client.aclose()
            await asyncio.sleep(0.01)  # sockets of failed handshakes close in the loop's next turn

    def _make_room(self, network: str) -> None:
        """Make room for a new handshake. If `network` has too many unfinished handshakes, cancel
        the oldest of that network; otherwise, if there are too many in all, cancel the oldest of
        all."""
        same = [task for task, its in self._shaking.items() if its == network]
        if len(same) >= self.limits.per_network or len(self._shaking) >= self.limits.handshakes:
            oldest = same[0] if len(same) >= self.limits.per_network else next(iter(self._shaking))
            del self._shaking[oldest]
            oldest.cancel()

    async def _welcome(self, accepted: socket.socket) -> None:
        """Run the TLS handshake of a new connection, then serve its requests until one side closes
        it."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        reader = asyncio.StreamReader(limit=CHUNK)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # saves 40 ms an answer
            await self._first_byte(accepted)
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=self.limits.handshake,
                ssl_shutdown_timeout=2.0,
            )
        except ssl.SSLError as error:
            return self._count(tls_reason(error))
        except OSError:  # the peer has left, or was too slow
            return self._count("handshake not finished")
        except asyncio.CancelledError:
            if task in self._shaking:  # the gateway ends
                raise
            return self._count("handshake not finished")  # _make_room cancelled it
        finally:
            self._shaking.pop(task, None)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        peer = peer_of(reader, writer)
        self._peers.add(peer)
        try:
            # Above Limits.per_site a site's requests are refused with a reason (_admit); above
            # twice as many its connections are closed without one.
            if self._open(peer.name) > 2 * self.limits.per_site:
                return self._count("too many connections of this site", peer.name)
            if len(self._peers) > self.limits.connections:
                return self._count("too many connections", peer.name)
            await self._converse(peer)
            writer.close()
            await writer.wait_closed()
        except (OSError, EOFError, h11.ProtocolError, httpx.HTTPError):
            pass  # the connection is broken, so no reason can be sent
        except Exception as error:  # an error in this code ends only this connection
            self._count(f"internal error ({type(error).__name__})", peer.name)
        finally:
            self._peers.discard(peer)
            transport.abort()  # does nothing where it is closed

    async def _first_byte(self, accepted: socket.socket) -> None:
        """Wait for the peer's first byte, for at most Limits.silent seconds. Errors: TimeoutError
        if none came; the connection is then closed."""
        loop, heard = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(accepted, heard.set)
        try:
            async with asyncio.timeout(self.limits.silent):
                await heard.wait()
        except BaseException:
            loop.remove_reader(accepted)
            accepted.close()
            raise
        loop.remove_reader(accepted)

    async def _converse(self, peer: Peer) -> None:
        while True:
            event = await self._next(peer, self.limits.idle)
            if not isinstance(event, h11.Request):
                return
            try:
                record = self._admit(peer)
                await self._answer(peer, record, event)
            except Denied as denied:
                self._count(denied.reason, peer.name)
                await self._deny(peer, denied)
                return
            if peer.http.our_state is not h11.DONE or peer.http.their_state is not h11.DONE:
                return
            peer.http.start_next_cycle()

    async def _answer(self, peer: Peer, record: enrol.Record, request: h11.Request) -> None:
        """Serve one request of an admitted site: answer it here, or pass it to the SuperLink. peer:
        the connection; record: the site's record. Errors: Denied if the request is refused."""
        call = (request.method, request.target.decode("ascii", "replace"))
        size = content_length(request)
        if call == (b"GET", STATUS):
            about: dict[str, Any] = {"name": record.name, "until": peer.until.isoformat()}
            about |= {"now": certs.read_clock().isoformat(), **version_fields()}
            return await self._say(peer, 200, json.dumps(about).encode())
        if call == (b"POST", RENEW):
            if size is None or size > HEAD:
                raise Denied(413, f"a signing request must state its length: {HEAD} bytes at most")
            signing_request = b"".join([chunk async for chunk in self._body(peer)])
            before, now = self._renewed.get(record.name), time.monotonic()
            if before is not None and now - before < self.limits.renewal:
                raise Denied(429, "this site's certificate was renewed just now")
            self._renewed[record.name] = now
            try:  # in a thread, so that other peers do not wait for the signature and the disk
                leaf = await asyncio.to_thread(enrol.renew, self.home, record, signing_request)
                return await self._say(peer, 200, leaf)
            except FedtuneError as error:  # a request that is refused uses up no renewal
                self._renewed.pop(record.name, None)
                raise Denied(403, str(error)) from None
        if request.method != b"POST" or call[1] not in FLEET:
            raise Denied(403, "not a path of the Fleet API")
        keys = [value for name, value in request.headers if name == NODE_KEY]
        if len(keys) != 1 or decode_value(keys[0]) != record.node.encode():
            raise Denied(403, "the node key is not the one admitted with this certificate")
        if size is None:
            raise Denied(411, "a request must state its length")
        most = self.limits.request_bytes if call[1] == PART else self.limits.words
        if size > most:
            raise Denied(413, f"a request has at most {most} bytes")
        if call[1] in PUSHES and not self._quota.push(record.name, size):
            raise Denied(413, "the site sends more than the coordinator asked for")
        await self._forward(peer, request, call[1])

    def _admit(self, peer: Peer) -> enrol.Record:
        """Read the record of a peer's site from disk, and check that this site may send a request
        now. Return the record. Errors: Denied if it may not."""
        record = self._record(peer.name)
        if record is None or record.tls != peer.tls:
            revoked = enrol.was_revoked(self.home, peer.tls)
            raise Denied(403, "revoked" if revoked else "not admitted")
        if peer.until < certs.read_clock():
            raise Denied(403, "the certificate has expired")
        if self._open(peer.name) > self.limits.per_site:
            raise Denied(503, "too many connections from this site")
        if not self._quota.request(peer.name):
            raise Denied(429, "too many requests from this site")
        return record

    def _open(self, name: str) -> int:
        return sum(peer.name == name for peer in self._peers)

    async def _forward(self, peer: Peer, request: h11.Request, path: str) -> None:
        """Stream a request to the SuperLink, and the SuperLink's response to the peer. path: the
        path of the call at the SuperLink. Errors: Denied if the SuperLink does not answer, or
        announces too long a response; ConnectionError if a response proves too long while it is
        passed on."""
        headers = [
            (name, value)
            for name, value in request.headers
            if name in PASSED or name.startswith(b"flwr-")
        ]
        url = self._upstream + path
        sent = self._client.build_request("POST", url, headers=headers, content=self._body(peer))
        try:
            response = await self._client.send(sent, stream=True)
        except httpx.HTTPError:
            raise Denied(502, "the SuperLink does not answer") from None
        try:
            remaining = self.limits.response_bytes
            if int(response.headers.get("content-length", "0")) > remaining:
                raise Denied(502, "the SuperLink's answer is too long")
            await self._send(peer, self._head(peer, response.status_code, response.headers.raw))
            async for chunk in response.aiter_raw(CHUNK):
                remaining -= len(chunk)
                if remaining < 0:
                    self._count("the SuperLink's answer is too long", peer.name)
                    raise ConnectionError
                await self._send(peer, h11.Data(data=chunk))
            await self._send(peer, h11.EndOfMessage())
        finally:
            await response.aclose()

    async def _next(self, peer: Peer, seconds: float) -> Any:
        """Read from the peer until h11 has parsed the next event (such as a request's head), and
        return it. seconds: how long to wait for it at most. Errors: TimeoutError,
        h11.RemoteProtocolError, OSError."""
        async with asyncio.timeout(seconds):
            while (event := peer.http.next_event()) is h11.NEED_DATA:
                peer.http.receive_data(await peer.reader.read(CHUNK))
        return event

    async def _body(self, peer: Peer) -> AsyncIterator[bytes]:
        while True:
            event = await self._next(peer, self.limits.stall)
            if isinstance(event, h11.EndOfMessage):
                return
            if not isinstance(event, h11.Data):
                raise ConnectionError
            yield bytes(event.data)

    async def _send(self, peer: Peer, event: Any) -> None:
        if data := peer.http.send(event):
            peer.writer.write(data)
            async with asyncio.timeout(self.limits.stall):
                await peer.writer.drain()

    def _head(self, peer: Peer, status: int, headers: list[tuple[bytes, bytes]]) -> h11.Response:
        names = (b"content-type", b"content-length", b"content-encoding")
        passed = [
            (name, value)
            for name, value in ((name.lower(), value) for name, value in headers)
            if name in names or name.startswith(b"flwr-")
        ]
        if b"content-length" not in dict(passed):
            passed.append((b"transfer-encoding", b"chunked"))
        old = time.monotonic() - peer.since > self.limits.age
        if old or peer.until - certs.read_clock() < timedelta(minutes=5):
            passed.append((b"connection", b"close"))
        return h11.Response(status_code=status, headers=passed)

    async def _say(self, peer: Peer, status: int, body: bytes) -> None:
        """Send a response that the gateway itself makes. The rest of the request is read before.

        - peer: the connection
        - status: the HTTP status
        - body: the content of the response"""
        if peer.http.their_state is h11.SEND_BODY:
            async for _ in self._body(peer):
                pass
        headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"text/plain")]
        await self._send(peer, self._head(peer, status, headers))
        await self._send(peer, h11.Data(data=body))
        await self._send(peer, h11.EndOfMessage())

    async def _deny(self, peer: Peer, denied: Denied) -> None:
        """Send the peer the HTTP status and the reason with which its request is refused
        (`denied`). Then read and drop arriving bytes for up to 2 s: if the connection were closed
        with unread bytes, the response would be lost."""
        if peer.http.our_state is not h11.SEND_RESPONSE:
            raise ConnectionError
        body = denied.reason.encode()
        headers = [("content-length", str(len(body))), ("connection", "close")]
        await self._send(peer, h11.Response(status_code=denied.status, headers=headers))
        await self._send(peer, h11.Data(data=body))
        await self._send(peer, h11.EndOfMessage())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                while await peer.reader.read(CHUNK):
                    pass

    async def _watch(self) -> None:
        """Close the connections of sites that were revoked, and renew the gateway's own certificate
        in time. Runs until this task is cancelled."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            for name in {peer.name for peer in self._peers}:
                record = self._record(name)
                for peer in list(self._peers):
                    if peer.name == name and (record is None or record.tls != peer.tls):
                        self._count("revoked", name)
                        peer.writer.transport.abort()
            if time.monotonic() - looked > RENEWAL_SECONDS:
                looked = time.monotonic()
                try:
                    self._load_leaf()
                except (FedtuneError, OSError) as error:  # as on a full disk: keep the present one
                    self._count(f"own certificate not renewed ({type(error).__name__})")

    def _record(self, name: str) -> enrol.Record | None:
        """Read a site's record from disk; None if the site is not admitted, or its record cannot be
        read."""
        try:
            return enrol.lookup(self.home, name)
        except FedtuneError:
            self._count("a record cannot be read", name)
            return None

    def _load_leaf(self) -> None:
        self._tls.load_cert_chain(certs.server_leaf(self.home))

    def _count(self, reason: str, site: str = "") -> None:
        """Count a refusal by its reason. Only the 1st, 2nd, 4th, 8th … refusal for a reason is
        printed, so that nobody can fill the disk with log lines. site: the name of the site that it
        concerns; "" if this is not known, or if it concerns the gateway itself."""
        count = self.refused[reason] = self.refused[reason] + 1
        if count & (count - 1) == 0:
            line = {
                "at": certs.read_clock().isoformat(),
                "refused": reason,
                "site": site,
                "count": count,
            }
            print(json.dumps(line), flush=True)


def main(arguments: list[str]) -> None:
    """Run the gateway until SIGTERM. arguments: the coordinator's HOME, the HOST and PORT where it
    listens, the SuperLink's URL, and the file of the SuperLink's certificate."""
    home, host, port, upstream, trust = arguments
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, int(port)), family=family, backlog=256)
    gateway = Gateway(Path(home), upstream, Path(trust))

    async def run() -> None:
        task = asyncio.ensure_future(gateway.serve(listener))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
