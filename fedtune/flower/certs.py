"""Make and read the keys and certificates of a consortium: its CA, the gateway's certificate, and
the sites' certificates.

There is one CA for the consortium's whole life. The other certificates (leaves) are short-lived and
renewed automatically. Every key here is P-384. A file with a private key is readable only by its
owner.

    ca(home)                        ca.pem: key and certificate; the first file of a new home, never
                                    replaced
    server_leaf(home, names)        server.pem: key and leaf; renewed at half of its life
    issue(home, key, name, ...)     a leaf for a public key, such as a site's
    node_key(path), tls_key(path)   a site's keys, made at the site
    loopback(folder)                a certificate for 127.0.0.1, made for one run where Flower
                                    requires TLS

Errors: ConfigError if a key or a CA cannot be read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.core.config.address import is_host
from fedtune.core.errors import ConfigError
from fedtune.core.files import reading
from fedtune.core.files.writing import create, replace

CA_DAYS, LEAF_DAYS = 3650, 30
SKEW = timedelta(minutes=5)  # certificates begin this long ago, as other clocks may be behind
EC = ec.EllipticCurvePrivateKey
PEM = serialization.Encoding.PEM
UNDER_CA = ("signing.key", "server.pem", "nodes")  # files of a home that are made after its CA


def read_clock() -> datetime:
    return datetime.now(UTC)


def ca(home: Path) -> tuple[EC, x509.Certificate]:
    """Return the consortium's CA, as its private key and its certificate, from home/ca.pem. Make it
    if the home is new. home: the coordinator's home.

    Errors: ConfigError if the CA cannot be read, or if it is missing from a home that has been
    used: a new CA would lock out every site that was admitted under the first one."""
    file, begun = home / "ca.pem", has_begun(home)
    if not os.path.lexists(file):
        if begun:
            raise ConfigError(
                f"{file}: missing, in the home of a consortium that exists",
                "the CA under which its sites were admitted",
                "restore it from a backup; without one, begin with a new home (--home DIR), and "
                "every site enrols again",
            )
        _make_ca(file)
    return read_key(file), certificate_in(file, "restore it from a backup")


def has_begun(home: Path) -> bool:
    """Return whether the home has been used, so that its CA must have existed: it holds files that
    are made only after the CA."""
    return any((home / name).exists() for name in UNDER_CA)


def server_leaf(home: Path, names: Sequence[str] = ()) -> Path:
    """Return the path home/server.pem, a file with the gateway's private key and certificate. The
    certificate holds `names`, by which sites reach the coordinator; "localhost" and "127.0.0.1";
    and all names of the certificate before it.

    A new key and certificate are made if there is no file, if its certificate lacks a name, or if
    half of its life is over. Errors: ConfigError if one of `names` is no host name or IP address,
    or a file cannot be read."""
    for name in names:
        if not is_host(name):
            raise ConfigError(
                f"{name[:80]!r}: not a host name",
                "a host name or an IP address",
                "give another --name",
            )
    file = home / "server.pem"
    had: list[str] = []
    fresh = False
    if os.path.lexists(file):
        leaf = certificate_in(file, "delete it: a new one is made, for the names given with --name")
        read_key(file)
        had, fresh = _names(leaf), not is_spent(leaf, 0.5)
    required = list(dict.fromkeys([*had, "localhost", "127.0.0.1", *names]))
    if fresh and had == required:
        return file
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = issue(home, key.public_key(), "fedtune coordinator", required)
    # Key and certificate share a file, so that a reader never gets a new key with an old
    # certificate.
    return replace(file, _pem(key) + leaf.public_bytes(PEM), private=True)


def issue(
    home: Path,
    key: ec.EllipticCurvePublicKey,
    name: str,
    hosts: Sequence[str] = (),
    start: datetime | None = None,
    end: datetime | None = None,
) -> x509.Certificate:
    """Issue a certificate (a leaf) that the consortium's CA signs, and return it. It is not stored.

    - home: the coordinator's home, with the CA in ca.pem
    - key: the public key for which the certificate is issued
    - name: the common name of its subject; for a client's certificate, the site's name
    - hosts: a server's host names and IP addresses. Without them the certificate is a client's.
    - start: from when it is valid; None for five minutes ago (SKEW)
    - end: until when it is valid; None for LEAF_DAYS from now

    Errors: ConfigError if the CA is missing or cannot be read."""
    ca_key, authority = ca(home)
    use = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = (
        _build_unsigned(
            name, authority.subject, key, start or read_clock() - SKEW, end or _days(LEAF_DAYS)
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(issuer, critical=False)
    )
    if hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(ca_key, hashes.SHA384())


def is_spent(leaf: x509.Certificate, share: float) -> bool:
    """Return whether at least the given share of a certificate's life is over. leaf: the
    certificate; share: from 0 to 1."""
    life = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    return read_clock() >= leaf.not_valid_before_utc + share * life


def common_name(subject: x509.Name) -> str:
    """Return a subject's common name; "" if it does not have exactly one."""
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def node_key(path: Path) -> EC:
    """Return the site's node key, which Flower uses, from the file `path` (OpenSSH format). If
    there is no file, make a key and write it there."""
    return _key_at(path, serialization.PrivateFormat.OpenSSH)


def tls_key(path: Path) -> EC:
    """Return the site's TLS key from the file `path` (PKCS 8). If there is no file, make a key and
    write it there."""
    return _key_at(path, serialization.PrivateFormat.PKCS8)


def read_key(path: Path) -> EC:
    """Read a P-384 private key in OpenSSH or PEM format. Errors: ConfigError if the file cannot be
    read, holds no such key, or can be read by other users."""
    todo = "restore it from a backup"
    data = reading.content(path, "a P-384 private key", todo, ConfigError)
    try:
        load = (
            serialization.load_ssh_private_key
            if b"OPENSSH" in data
            else serialization.load_pem_private_key
        )
        key = load(data, None)
        if not (isinstance(key, EC) and key.curve.name == "secp384r1"):
            raise ValueError
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: no readable key", "a P-384 private key", todo) from None
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            f"{path}: other users can read this private key",
            todo="treat the key as lost; if nobody else was on this machine, chmod 600 is enough",
        )
    return key


def certificate_in(path: Path, todo: str) -> x509.Certificate:
    """Read the first certificate in the PEM file `path`. todo: what the person should do, for an
    error's text. Errors: ConfigError if there is no readable certificate."""
    data = reading.content(path, "a certificate", todo, ConfigError)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise ConfigError(f"{path}: no readable certificate", "PEM", todo) from None


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Encode a public key in PEM. Flower sends and compares node keys in this form."""
    return key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def request(key: EC, name: str) -> bytes:
    """Make a certificate signing request (PEM). key: the private key whose public half is to be
    certified; name: the common name of the subject."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(name))
    return builder.sign(key, hashes.SHA384()).public_bytes(PEM)


def loopback(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 and its private key, and write both to `folder`. Return the
    paths of the certificate's file and of the key's file. Only processes that are given the
    certificate's file trust it."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedtune loopback")
    certificate = (
        _build_unsigned(
            "fedtune loopback", name, key.public_key(), read_clock() - SKEW, _days(CA_DAYS)
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general_name("127.0.0.1")]), critical=False)
        .sign(key, hashes.SHA384())
    )
    file = replace(folder / "loopback.crt", certificate.public_bytes(PEM), private=True)
    return file, replace(folder / "loopback.key", _pem(key), private=True)


def _make_ca(file: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = "fedtune consortium CA"
    certificate = (
        _build_unsigned(name, _name(name), key.public_key(), read_clock() - SKEW, _days(CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    create(file, _pem(key) + certificate.public_bytes(PEM), private=True)


def _key_at(path: Path, form: serialization.PrivateFormat) -> EC:
    if not os.path.lexists(path):
        key = ec.generate_private_key(ec.SECP384R1())
        create(path, key.private_bytes(PEM, form, serialization.NoEncryption()), private=True)
    return read_key(path)


def _build_unsigned(
    subject: str,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    start: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return []
    return [str(name.value) for name in names]


def _days(days: float) -> datetime:
    return read_clock() + timedelta(days=days)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: EC) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
