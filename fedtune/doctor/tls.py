"""Check the network for `fedtune doctor`: a certificate, its names, and the clocks of both ends.

Each check returns its finding as text, or raises a FedtuneError that says what is wrong and what to
do. Dates are in UTC."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from ipaddress import ip_address

import h11
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.flower import api, certs

SECONDS = 20.0  # how long to wait for an answer
LONGEST = 65_536  # the most bytes of an answer's body that are kept; the rest is dropped
LEAF_LEFT = timedelta(days=3)  # a running client or server renews it earlier
CA_LEFT = timedelta(days=180)  # the CA's certificate is valid for ten years
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Dial = Callable[[ssl.SSLContext], Awaitable[Streams]]


def fetch_certificate(dial: Dial, address: str) -> x509.Certificate:
    """Connect to a server, and return the certificate that it presents, without verifying it.

    - dial: a function that connects to the server; it is called with the TLS context to use
    - address: the server's HOST:PORT, for the errors' texts

    Errors: InfrastructureError if nothing answers, or something answers without TLS 1.3."""

    async def fetch() -> bytes | None:
        async with asyncio.timeout(SECONDS):
            _, writer = await dial(_build_trusting_context())
            try:
                der: bytes | None = writer.get_extra_info("ssl_object").getpeercert(True)
                return der
            finally:
                writer.transport.abort()
                await asyncio.sleep(0.01)  # the aborted transport closes in the loop's next turns

    try:
        return x509.load_der_x509_certificate(asyncio.run(fetch()) or b"")
    except (ssl.SSLError, ValueError):
        raise InfrastructureError(
            f"{address}: answers, but not as a gateway does", "TLS 1.3 with a certificate",
            "see whether another program uses that port, or a proxy stands in between",
        ) from None  # fmt: skip
    except (OSError, EOFError):
        raise InfrastructureError(
            f"{address}: does not answer",
            todo="check the address, the proxy and the firewall, and whether the server runs",
        ) from None


def get(dial: Dial, context: ssl.SSLContext, address: str, path: str) -> tuple[int, bytes]:
    """Send a GET request to the coordinator's gateway, whose certificate is verified; return the
    HTTP status and the body.

    - dial: a function that connects to the gateway, through the site's proxy if it has one; it is
      called with the TLS context to use
    - context: trusts only the consortium's CA, and holds the site's certificate
    - address: the gateway's HOST:PORT, for the request's header and the errors' texts
    - path: the path in the URL, such as "/fedtune/status"

    Errors: InfrastructureError if the gateway does not answer, is not trusted, or closes the
    connection."""

    async def ask() -> tuple[int, bytes]:
        async with asyncio.timeout(SECONDS):
            reader, writer = await dial(context)
            try:
                return await _http(reader, writer, path, address)
            finally:
                writer.transport.abort()
                await asyncio.sleep(0.01)

    try:
        return asyncio.run(ask())
    except ssl.SSLCertVerificationError:
        raise InfrastructureError(
            f"{address}: its certificate does not verify",
            todo="see the checks `names` and `its certificate` above",
        ) from None
    except (OSError, EOFError, h11.ProtocolError):
        raise InfrastructureError(
            f"{address}: closes the connection to this site",
            "a certificate of this site that the gateway accepts",
            "see the check `certificate` above; the coordinator's flower/gateway.log has the "
            "reason",
        ) from None


async def _http(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, host: str
) -> tuple[int, bytes]:
    """Send a GET request over an open connection; return the HTTP status and the body. Of a longer
    body only the first LONGEST bytes are returned.

    - reader, writer: the two directions of the connection
    - path: the path in the URL
    - host: the value of the request's Host header"""
    http = h11.Connection(h11.CLIENT)
    status = 0
    body = b""
    headers = [("host", host), ("connection", "close")]
    for event in (h11.Request(method="GET", target=path, headers=headers), h11.EndOfMessage()):
        writer.write(http.send(event) or b"")
    while not isinstance(received := http.next_event(), h11.EndOfMessage):
        if received is h11.NEED_DATA:
            http.receive_data(await reader.read(65_536))
        elif isinstance(received, h11.Response):
            status = received.status_code
        elif isinstance(received, h11.Data):
            body += bytes(received.data)[: LONGEST - len(body)]
    return status, body


def _build_trusting_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def certificate(
    leaf: x509.Certificate, authority: x509.Certificate, least: timedelta, todo: str
) -> str:
    """Check that `authority` signed the certificate and that it is valid now and for at least
    `least`. Return, as text, from when to when it is valid.

    - leaf: the certificate to check: a site's, the gateway's or the CA's own
    - authority: the certificate of the consortium's CA
    - least: how long the certificate must still be valid; if this is zero, a certificate passes
      that has not expired yet
    - todo: what a person should do if the check fails, for the error's text

    Errors: ConfigError. Its advice is `todo` or, if the certificate is not valid yet, to set the
    clocks."""
    start = leaf.not_valid_before_utc
    end = leaf.not_valid_after_utc
    now = certs.read_clock()
    span = f"valid from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}"
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(
            "it is not signed by this consortium's CA", "a certificate that this CA signed", todo
        ) from None
    if now < start:
        raise ConfigError(
            f"{span}: not valid yet", f"a correct clock; this machine's shows {now:%Y-%m-%d %H:%M}",
            "set the clocks of both ends (NTP)",
        )  # fmt: skip
    if now > end:
        raise ConfigError(f"{span}: expired", todo=todo)
    if end - now < least:
        raise ConfigError(f"{span}: about to expire", f"{least.days} days at least", todo)
    return span


def names(leaf: x509.Certificate, host: str) -> str:
    """Check that a certificate was issued for `host`, and return a text with the names in it. leaf:
    the gateway's certificate; host: the name or IP address by which sites reach the gateway.
    Errors: ConfigError if it was issued for other names only."""
    try:
        held = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        held = x509.SubjectAlternativeName([])
    listed = ", ".join(str(name.value) for name in held) or "nobody"
    try:
        good = ip_address(host) in held.get_values_for_type(x509.IPAddress)
    except ValueError:
        dns_names = held.get_values_for_type(x509.DNSName)
        good = host.lower() in (name.lower() for name in dns_names)
    if not good:
        raise ConfigError(
            f"the coordinator's certificate is for {listed}",
            f"{host} among them, since sites reach the coordinator by this name",
            f"`fedtune server --name {host}`, or use one of these names in the address",
        )
    return f"{host} is among {listed}"


def clock(ahead: float) -> str:
    """Check that this site's clock agrees closely enough with the coordinator's, and return a text
    with the difference. ahead: by how many seconds the site's clock is ahead; negative if it is
    behind.

    Errors: ConfigError if the difference is so large that Flower would refuse the site's signed
    requests."""
    early, late = api.CLOCK_WINDOW
    offset = f"{abs(ahead):.1f} s {'ahead of' if ahead >= 0 else 'behind'} the coordinator's"
    if not -late < ahead < -early:
        raise ConfigError(
            f"this site's clock is {offset}",
            f"less than {-early} s ahead and less than {late} s behind; otherwise Flower refuses "
            "this node",
            "set the clock of this machine and the coordinator's (NTP), then start again",
        )
    return offset


def ahead_of(sent: datetime, other_time: str, received: datetime) -> float:
    """Compute by how many seconds this machine's clock is ahead of another one's; a negative result
    means that it is behind. It is assumed that the other clock was read halfway between `sent` and
    `received`.

    - sent, received: the times on this machine's clock at which the question was sent and the
      answer received
    - other_time: the time on the other clock, as it stands in the answer (ISO 8601)"""
    half = (received - sent) / 2
    return (sent + half - datetime.fromisoformat(other_time)).total_seconds()
