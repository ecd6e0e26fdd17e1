"""Identify the sites that connect to the gateway by their certificates, and define the limits of
their connections and requests."""

from __future__ import annotations

import asyncio
import ssl
import time
from base64 import b64decode
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv4Address, ip_address, ip_network

import h11
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.flower import certs, enrol

HEAD = 16_384  # bytes of a request's line and headers


@dataclass(frozen=True)
class Limits:
    """The gateway's limits for one site, and for all connections together. Times are in seconds;
    the comment beside each limit says what it counts."""

    request_bytes: int = 16 << 20  # Flower's largest part of a message is 5 MiB
    words: int = 256 << 10  # bytes of any other request, such as a list of an answer's 3,000 parts
    response_bytes: int = 16 << 20
    rate: float = 100.0  # requests a second, per site, after a burst
    burst: int = 1000
    per_site: int = 32  # open connections
    connections: int = 2048
    handshakes: int = 128  # unfinished handshakes, of peers that have sent no certificate yet
    per_network: int = 16  # unfinished handshakes from one IPv4 address or IPv6 /64
    silent: float = 3.0  # from the connection to the peer's first byte
    handshake: float = 10.0
    renewal: float = 60.0  # from one certificate of a site to its next
    idle: float = 120.0  # between two requests of a connection
    stall: float = 60.0  # longest pause within a request or a response
    age: float = 3600.0  # life of a connection; the next one shows the site's newest certificate


@dataclass(eq=False)
class Peer:
    """One connection of a site.

    - name: the site's name, by its certificate
    - tls: the digest of the certificate's public key, as `enrol.tls_digest` returns it; "" if the
      key is of another kind than sites have
    - until: when the certificate expires
    - reader, writer: the two directions of the connection
    - http: the parser of its requests
    - since: when the connection began, as time.monotonic() gives it"""

    name: str
    tls: str
    until: datetime
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection
    since: float = field(default_factory=time.monotonic)


class Denied(Exception):
    """Raised to refuse a request, with an HTTP `status` and a one-line reason."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason


def peer_of(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Peer:
    """Describe a connection whose TLS handshake is over as a Peer, with the name and the key in the
    site's certificate, which the handshake has verified. reader, writer: the two directions of the
    connection."""
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    leaf = x509.load_der_x509_certificate(der)
    key = leaf.public_key()
    digest = enrol.tls_digest(key) if isinstance(key, ec.EllipticCurvePublicKey) else ""
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD)
    name = certs.common_name(leaf.subject)
    return Peer(name, digest, leaf.not_valid_after_utc, reader, writer, http)


def network_of(address: str) -> str:
    """Return the network to which an address belongs, as a text. All addresses of a network count
    as one host when handshakes are limited: an IPv4 address by itself, or all addresses in the /64
    of an IPv6 address."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))


def tls_reason(error: ssl.SSLError) -> str:
    """Return a text that says why a TLS handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    words = {
        "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no certificate",
        "UNSUPPORTED_PROTOCOL": "older than TLS 1.3",
        "HTTP_REQUEST": "plain HTTP",
    }
    reason = error.reason or "unknown"
    return words.get(reason, f"TLS: {reason.lower().replace('_', ' ')}")


def content_length(request: h11.Request) -> int | None:
    """Return the length of a request's body in bytes, as the content-length header states it (h11
    admits only digits there). None if there is no such header, or if there is a transfer-encoding
    header as well."""
    headers = dict(request.headers)
    length = headers.get(b"content-length")
    return int(length) if length is not None and b"transfer-encoding" not in headers else None


def decode_value(value: bytes) -> bytes:
    try:
        return b64decode(value, validate=True)
    except ValueError:
        return b""
