"""What `fedtune doctor` looks at on the wire: a certificate, its names, and the clocks of two ends.

As in fedtune/doctor/machine.py: words, or a FedtuneError. Dates are in UTC.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from ipaddress import ip_address

import h11
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedtune.errors import ConfigError, InfrastructureError
from fedtune.flower import api, certs

SECONDS = 20.0  # for an answer
LONGEST = 65_536  # bytes of one, at most; the rest is dropped
LEAF_LEFT = timedelta(days=3)  # of 30; whoever runs has renewed it long before
CA_LEFT = timedelta(days=180)  # of ten years
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Dial = Callable[[ssl.SSLContext], Awaitable[Streams]]


def presented(dial: Dial, address: str) -> x509.Certificate:
    """The certificate that whoever answers `dial` shows; nothing is believed of it yet.

    Errors: InfrastructureError where nobody answers, or nobody who speaks TLS 1.3."""

    async def look() -> bytes | None:
        async with asyncio.timeout(SECONDS):
            _, writer = await dial(_trusting())
            try:
                body: bytes | None = writer.get_extra_info("ssl_object").getpeercert(True)
                return body
            finally:
                writer.transport.abort()
                await asyncio.sleep(0.01)  # what was cut closes in the next turns

    try:
        return x509.load_der_x509_certificate(asyncio.run(look()) or b"")
    except (ssl.SSLError, ValueError):
        raise InfrastructureError(
            f"{address}: answers, but not as a gateway does", "TLS 1.3 with a certificate",
            "another program has that port, or a proxy stands before it",
        ) from None  # fmt: skip
    except (OSError, EOFError):
        raise InfrastructureError(
            f"{address}: does not answer", todo="check address, proxy and firewall, or start it"
        ) from None


def got(dial: Dial, context: ssl.SSLContext, address: str, path: str) -> tuple[int, bytes]:
    """Status and body of GET `path` from the gateway, once `context` has verified it.

    Errors: InfrastructureError where it does not answer, is not to be trusted, or hangs up."""

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
            todo="see `names` and `its certificate` above",
        ) from None
    except (OSError, EOFError, h11.ProtocolError):
        raise InfrastructureError(
            f"{address}: hangs up on this site",
            "a certificate of this site that it takes",
            "see `certificate` above; the coordinator's flower/gateway.log has the reason",
        ) from None


async def _http(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, host: str
) -> tuple[int, bytes]:
    http, status, body = h11.Connection(h11.CLIENT), 0, b""
    headers = [("host", host), ("connection", "close")]
    for said in (h11.Request(method="GET", target=path, headers=headers), h11.EndOfMessage()):
        writer.write(http.send(said) or b"")
    while not isinstance(event := http.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(65_536))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data) and len(body) < LONGEST:
            body += bytes(event.data)
    return status, body


def _trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def certificate(
    leaf: x509.Certificate, authority: x509.Certificate, least: timedelta, todo: str
) -> str:
    """Errors: ConfigError where `authority` did not sign it, or it is not valid now, or has less
    than `least` to go; then `todo` is to be done."""
    start, end, now = leaf.not_valid_before_utc, leaf.not_valid_after_utc, certs.now()
    span = f"valid from {start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M}"
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(
            "not signed by this consortium's CA", "one that it signed", todo
        ) from None
    if now < start:
        raise ConfigError(
            f"{span}: not yet", f"a clock that is right; here it is {now:%Y-%m-%d %H:%M}",
            "set the clocks of both ends (NTP)",
        )  # fmt: skip
    if now > end:
        raise ConfigError(f"{span}: expired", todo=todo)
    if end - now < least:
        raise ConfigError(f"{span}: about to expire", f"{least.days} days at least", todo)
    return span


def names(leaf: x509.Certificate, host: str) -> str:
    """Errors: ConfigError where the certificate is not for `host`, a name or an address."""
    try:
        held = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        held = x509.SubjectAlternativeName([])
    said = ", ".join(str(name.value) for name in held) or "nobody"
    try:
        good = ip_address(host) in held.get_values_for_type(x509.IPAddress)
    except ValueError:
        known = held.get_values_for_type(x509.DNSName)
        good = host.lower() in (name.lower() for name in known)
    if not good:
        raise ConfigError(
            f"the coordinator's certificate is for {said}",
            f"{host} among them, as sites call it",
            f"`fedtune server --name {host}`, or use one of these names in the address",
        )
    return f"{host} is among {said}"


def clock(ahead: float) -> str:
    """ahead: seconds that this site's clock is before the coordinator's.

    Errors: ConfigError outside the window in which Flower takes a site's signed requests."""
    early, late = api.CLOCK_WINDOW
    said = f"{abs(ahead):.1f} s {'ahead of' if ahead >= 0 else 'behind'} the coordinator's"
    if not -late < ahead < -early:
        raise ConfigError(
            f"this site's clock is {said}",
            f"less than {-early} s ahead and less than {late} s behind: Flower refuses other nodes",
            "set the clock of this machine and the coordinator's (NTP), then start again",
        )
    return said


def ahead_of(sent: datetime, there: str, received: datetime) -> float:
    """Seconds that the clock here is before the one that said `there` (ISO 8601) in between."""
    half = (received - sent) / 2
    return (sent + half - datetime.fromisoformat(there)).total_seconds()
