"""Keys and certificates of a consortium: its CA, the coordinator's certificate, a site's node key.

Every key is P-384. A secret file is readable by its owner alone and is never replaced.

    make_ca(folder)                          ca.crt, ca.key
    make_server_certificate(folder, hosts)   server.crt, server.key, signed by the folder's CA
    make_node_key(path)                      path (OpenSSH private key), path.pub
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import ConfigError
from fedtune.flower.processes import private_folder

CA_DAYS, SERVER_DAYS = 3650, 397


@dataclass(frozen=True)
class Consortium:
    """Where make_consortium put things: the coordinator's home and one folder per site."""

    home: Path
    sites: dict[str, Path]  # each holds ca.crt, node_key, node_key.pub


def make_ca(folder: Path) -> Path:
    """Create the consortium's CA: folder/ca.key (secret) and folder/ca.crt, which is returned.

    Errors: ConfigError if either file exists."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("fedtune consortium CA")
    certificate = (
        _unsigned(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_new(folder / "ca.key", _pem(key), mode=0o600)
    return _write_new(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_server_certificate(folder: Path, hosts: Sequence[str]) -> Path:
    """Create folder/server.key (secret) and folder/server.crt, which is returned.

    hosts: the names and IP addresses that sites call the coordinator by; loopback is always added,
    because the coordinator calls itself. Errors: ConfigError without a CA, or if a file exists."""
    ca_key, ca = _read_ca(folder)
    key = ec.generate_private_key(ec.SECP384R1())
    names = [_general_name(host) for host in dict.fromkeys(["localhost", "127.0.0.1", *hosts])]
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    certificate = (
        _unsigned(_name("fedtune coordinator"), ca.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write_new(folder / "server.key", _pem(key), mode=0o600)
    return _write_new(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_node_key(path: Path) -> Path:
    """Create a site's key: `path` (secret, OpenSSH format) and `path`.pub, which is returned.

    Run it at the site: the private key never leaves the machine; the public one goes to the
    coordinator, into nodes/SITE.pub. Errors: ConfigError if either file exists."""
    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write_new(path, secret, mode=0o600)
    return _write_new(path.with_name(path.name + ".pub"), public + b"\n")


def read_public_key(path: Path) -> bytes:
    """A site's public key file as PEM. Errors: ConfigError if it is not an EC public key."""
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError
    except (OSError, ValueError):
        raise ConfigError(
            f"{path}: not a node key", "an EC public key in OpenSSH format", "ask the site for it"
        ) from None
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def make_consortium(folder: Path, sites: Sequence[str], hosts: Sequence[str] = ()) -> Consortium:
    """Lay out a whole consortium on one machine, FOR A TRIAL ONLY.

    In a real one each site runs make_node_key itself and hands over the .pub file alone; here one
    machine has held every private key. Layout: folder/coordinator (CA, server certificate,
    nodes/SITE.pub) and folder/sites/SITE (ca.crt, node_key). Errors: ConfigError if it exists."""
    for each in (folder, folder / "sites"):
        private_folder(each)
    home = folder / "coordinator"
    ca = make_ca(home)
    make_server_certificate(home, hosts)
    folders = {}
    for site in sites:
        folders[site] = folder / "sites" / site
        public = make_node_key(folders[site] / "node_key")
        _write_new(folders[site] / "ca.crt", ca.read_bytes())
        _write_new(home / "nodes" / f"{site}.pub", public.read_bytes())
    return Consortium(home, folders)


def _read_ca(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    except (OSError, ValueError, TypeError):
        raise ConfigError(
            f"{folder}: no readable CA", "ca.key and ca.crt", "make_ca writes them"
        ) from None
    return cast(ec.EllipticCurvePrivateKey, key), certificate


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    start = datetime.now(UTC) - timedelta(minutes=5)  # a site's clock may be a little behind
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_new(path: Path, content: bytes, mode: int = 0o644) -> Path:
    private_folder(path.parent)
    try:
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists and is not replaced", todo="move it away, or go on using it"
        ) from None
    return path
