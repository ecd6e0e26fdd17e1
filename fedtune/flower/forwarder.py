"""Forward the connections of a site's SuperNode from loopback to the coordinator's gateway, with
the site's certificate.

    SuperNode ── TLS, loopback ──> forwarder ── [HTTP CONNECT proxy] ── TLS 1.3, mTLS ──> gateway

Flower's SuperNode cannot send a client certificate, and requires TLS. So the forwarder accepts TLS
on loopback, with a certificate that is made for this one run, and sends the site's certificate to
the gateway. It listens on 127.0.0.1 only. Another user of this machine could connect to it, but
would need the node key for every request. It passes bytes on unchanged, at most 64 KiB at a time.

Trust: the gateway's certificate must come from the consortium's CA and name the coordinator's host;
the system's CAs are not trusted for it. The certificate of a proxy (https://) is checked against
proxy_ca or the system's CAs. A proxy that decrypts TLS fails this check, and has to exempt the
coordinator's address.

Upkeep: the forwarder asks the gateway for its status every WATCH_SECONDS (every second while the
gateway does not answer), and renews the site's certificate when two thirds of its life are over.

Errors: if the gateway cannot be reached, the SuperNode receives a 503, and tries again whenever it
likes. The Forwarder's attributes `away`, `refusal`, `distrust`, `clock` and `ahead` say what is
wrong.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import httpx
from cryptography import x509

from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError
from fedtune.core.files.writing import replace
from fedtune.flower import certs
from fedtune.flower.enrol import RENEWED
from fedtune.flower.link import Link

STATUS, RENEW = "/fedtune/status", "/fedtune/renew"  # as in gateway.py
CHUNK = 65_536
WATCH_SECONDS = 15.0
CONNECT_SECONDS = 20.0
ENDING_SECONDS = 5.0  # longest wait for a status request whose connection was cut
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Forwarder:
    """Forwards a SuperNode's connections to the gateway, in a thread that runs until the `with`
    block ends. The SuperNode connects to `port` on loopback and trusts the file `certificate`.

    - link: the settings by which the site reaches its coordinator, with the answer and the keys
    - state: the folder into which the certificate for loopback and its key are written
    - watch: seconds between two status requests while the gateway answers
    - on_renewed: a function that is called with each renewed certificate (PEM), after it was
      stored; None: nothing is called

    Errors: ConfigError if the proxy's address is not usable; InfrastructureError if no port is
    free."""

    def __init__(
        self,
        link: Link,
        state: Path,
        watch: float = WATCH_SECONDS,
        on_renewed: Callable[[bytes], None] | None = None,
    ) -> None:
        self.link, self._watch_seconds = link, watch
        self._on_renewed = on_renewed
        self.refusal: str | None = None  # why the gateway turns this site away
        self.distrust = False  # whether the gateway's certificate does not verify
        self.clock = False  # whether the refusal is due to dates, so that a clock may be wrong
        # Seconds by which this machine's clock was ahead of the gateway's at the last status reply.
        self.ahead = 0.0
        self.port = 0
        self._since: float | None = None  # the time of the first failure since the last answer
        self.certificate, key = certs.loopback(state)
        self._near = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._near.minimum_version = ssl.TLSVersion.TLSv1_3
        self._near.load_cert_chain(self.certificate, key)
        self._trust = ssl.create_default_context(cafile=str(self.certificate))
        self._leaf = find_newest_certificate(link)
        self._far = far_context(link)
        self._proxy = proxy_of(link)
        self._ready = threading.Event()
        self._relays: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def away(self) -> float:
        """For how many seconds the gateway has not answered, counted from the first connection that
        failed; 0 while it answers."""
        return time.monotonic() - self._since if self._since is not None else 0.0

    def __enter__(self) -> Forwarder:
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        self._ready.wait()
        if not self.port:
            raise InfrastructureError("no port of 127.0.0.1 is free to listen on")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
            self._loop.run_until_complete(_cut(asyncio.all_tasks(self._loop)))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._ready.set()
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._near)
        self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        watch = self._loop.create_task(self._watch())
        ended = self._loop.create_task(self._ended.wait())
        await asyncio.wait([watch, ended], return_when=asyncio.FIRST_COMPLETED)
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)
        # A status request ends when its relay is cancelled. It is not cancelled itself, since httpx
        # leaves a connection open if its handshake is cancelled. The server closes afterwards,
        # since asyncio leaves a connection open that is accepted in the turn in which its server
        # closes.
        await asyncio.wait([watch], timeout=ENDING_SECONDS)
        server.close()
        if watch.done():
            watch.result()

    # ------------------------------------------------------------------------- bytes

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._ended.is_set():
            writer.transport.abort()
            return
        task = self._loop.create_task(self._relay(reader, writer))
        self._relays.add(task)
        task.add_done_callback(self._relays.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            try:
                far_reader, far_writer = await self._open()
            except (OSError, EOFError, ValueError) as error:
                self._note_failure(error)
                writer.write(UNAVAILABLE)
                return await _close(writer)
            writers.append(far_writer)
            pumps = [
                self._loop.create_task(self._pump(reader, far_writer)),
                self._loop.create_task(self._pump(far_reader, writer, heard=True)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
            await _close(writer, far_writer)
        finally:
            for open_writer in writers:
                open_writer.close()
                open_writer.transport.abort()  # does nothing where it is closed

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK):
                if heard:
                    self._since, self.distrust = None, False
                writer.write(chunk)
                await writer.drain()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a TLS connection to the gateway, and return its two directions. Errors: OSError,
        EOFError, ValueError, TimeoutError."""
        async with asyncio.timeout(CONNECT_SECONDS):
            return await dial(self.link, self._proxy, self._far)

    def _note_failure(self, error: Exception) -> None:
        self._since = self._since if self._since is not None else time.monotonic()
        untimely = _describe_untimely(error, self._leaf)
        self.distrust = isinstance(error, ssl.SSLCertVerificationError) and not untimely
        if untimely:
            self.refusal, self.clock = untimely, True

    # ------------------------------------------------------------------------ upkeep

    async def _watch(self) -> None:
        async with httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{self.port}",
            verify=self._trust,
            trust_env=False,
            timeout=CONNECT_SECONDS + 5,
            limits=httpx.Limits(max_keepalive_connections=0),  # each request uses the newest leaf
        ) as client:
            while not self._ended.is_set():
                try:
                    await self._poll_status(client)
                except httpx.HTTPError as error:  # the connection was closed without a reply
                    self._note_failure(error)
                except (FedtuneError, OSError):  # no renewal, as on a full disk: keep the leaf
                    pass
                pause = 1.0 if self._since is not None else self._watch_seconds
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(pause, self._watch_seconds)):
                        await self._ended.wait()

    async def _poll_status(self, client: httpx.AsyncClient) -> None:
        sent = certs.read_clock()
        reply = await client.get(STATUS)
        if reply.status_code == 503:
            return  # this forwarder's own reply: the gateway cannot be reached
        self._since = None
        if reply.status_code == 200:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a reply of another release
                half = (certs.read_clock() - sent) / 2
                said = datetime.fromisoformat(reply.json()["now"])
                self.ahead = (sent + half - said).total_seconds()
        self.refusal = reply.text if reply.status_code == 403 else None
        self.clock = False
        if self.refusal is None and certs.is_spent(self._leaf, 2 / 3):
            await self._renew(client)

    async def _renew(self, client: httpx.AsyncClient) -> None:
        key = certs.read_key(self.link.keys / "tls.key")
        reply = await client.post(RENEW, content=certs.request(key, self.link.name))
        with contextlib.suppress(ValueError):
            if reply.status_code == 200:
                leaf = x509.load_pem_x509_certificate(reply.content)
                if leaf.public_key() == key.public_key():
                    replace(self.link.certificate, leaf.public_bytes(certs.PEM), private=True)
                    if self._on_renewed:
                        self._on_renewed(leaf.public_bytes(certs.PEM))
                    self._leaf = leaf
                    self._far = far_context(self.link)


async def _cut(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel the tasks that began while the forwarder was shut down (handshakes, and relays after a
    handshake), and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.01)  # their connections close in the event loop's next turn


async def dial(
    far: Link, proxy: urllib.parse.SplitResult | None, context: ssl.SSLContext
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the gateway over TLS, and return the two directions of the connection.

    - far: the settings by which the site reaches the gateway
    - proxy: the address of the hospital's HTTP proxy, as `proxy_of` returns it; None to connect
      directly
    - context: the TLS settings, by which the gateway's certificate is checked

    Errors: OSError, EOFError, ValueError."""
    if proxy is None:
        return await asyncio.open_connection(
            far.host, far.port, ssl=context, server_hostname=far.host, limit=CHUNK
        )
    secure = proxy.scheme == "https"
    proxy_context = ssl.create_default_context(cafile=far.proxy_ca) if secure else None
    reader, writer = await asyncio.open_connection(
        proxy.hostname, proxy.port or (443 if secure else 80), ssl=proxy_context, limit=CHUNK
    )
    try:
        writer.write(_connect(far, proxy))
        head = await reader.readuntil(b"\r\n\r\n")
        if head.split(b" ", 2)[1:2] != [b"200"]:
            raise ConnectionError("the proxy refuses to connect")
        await writer.start_tls(context, server_hostname=far.host)
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer


async def _close(*writers: asyncio.StreamWriter) -> None:
    """Close each connection after its data was sent. A connection that is broken, or for which this
    takes longer than 2 s, is aborted."""
    for writer in writers:
        writer.close()
        try:
            async with asyncio.timeout(2.0):
                await writer.wait_closed()
        except OSError:
            writer.transport.abort()


def find_newest_certificate(link: Link) -> x509.Certificate:
    """Choose the newest certificate of a site, return it, and write it to the file
    link.certificate. The certificate in the coordinator's answer is compared with the stored
    renewals for the same key; the newest is the one that expires last."""
    best = x509.load_pem_x509_certificate(link.answer.certificate.encode())
    authority = x509.load_pem_x509_certificate(link.answer.ca.encode())
    before = link.keys / link.certificate.name  # earlier releases stored renewals there
    for kept in (link.certificate, link.keys / RENEWED / link.certificate.name, before):
        with contextlib.suppress(OSError, ValueError):
            stored = x509.load_pem_x509_certificate(kept.read_bytes())
            newer = stored.not_valid_after_utc > best.not_valid_after_utc
            same_key = stored.public_key() == best.public_key()
            if newer and same_key and stored.issuer == authority.subject:
                best = stored
    replace(link.certificate, best.public_bytes(certs.PEM), private=True)
    return best


# OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED.
UNTIMELY = {9: "not valid yet", 10: "expired"}


def _describe_untimely(error: Exception, leaf: x509.Certificate) -> str | None:
    """Explain a failed connection by a certificate that is out of date by this machine's clock.
    Return a text that says which certificate this is; None if no date explains the failure.

    - error: the error of the connection, which may be about the gateway's certificate
    - leaf: the site's certificate, which a gateway refuses without stating a reason"""
    if isinstance(error, ssl.SSLCertVerificationError):
        problem = UNTIMELY.get(error.verify_code)
        return problem and f"its certificate is {problem} by the clock here: compare the clocks"
    if leaf.not_valid_after_utc < certs.read_clock():
        return "this site's certificate has expired, or the clock here is wrong"
    if leaf.not_valid_before_utc > certs.read_clock():
        return "this site's certificate is not valid yet: compare the clocks"
    return None


def far_context(link: Link) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=link.answer.ca)
    context.load_cert_chain(link.certificate, link.keys / "tls.key")
    return context


def proxy_of(link: Link) -> urllib.parse.SplitResult | None:
    """Return the address of the HTTP proxy through which a site connects. This is the proxy in
    site.toml or, if there is none, that of the environment (HTTPS_PROXY), unless NO_PROXY names the
    coordinator's host. None if there is no proxy. Errors: ConfigError if the address is not
    usable."""
    url = link.proxy
    if url is None and not urllib.request.proxy_bypass(link.host):
        url = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    if not url:
        return None
    parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
    try:
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise ConfigError("the proxy's address is not usable", "http://host:port") from None
    return parts


def _connect(link: Link, proxy: urllib.parse.SplitResult) -> bytes:
    lines = [f"CONNECT {link.address} HTTP/1.1", f"Host: {link.address}"]
    if proxy.username:
        user = urllib.parse.unquote(f"{proxy.username}:{proxy.password or ''}")
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(user.encode()).decode()}")
    return "\r\n".join([*lines, "", ""]).encode()
