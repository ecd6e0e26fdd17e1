"""Enrol sites: tie a site's name to its keys, after people compared a fingerprint by phone. Private
keys never leave their machine.

    site          enroll(site.toml)         makes keys, and a request file with their public halves
    phone         fingerprint(request)      is read out by the site, compared by the coordinator
    coordinator   admit(home, request)      writes nodes/NAME.json, and an answer file
    site          membership.py             checks and stores the answer, with which clients connect
    coordinator   revoke(home, name)        refuses the site's next request, closes its connections

A record ties a name to three keys: the node key (Flower), the TLS key (the gateway) and the signing
key (seals). Each key signs the request, so nobody can enrol a key that they do not hold.

| what comes or happens                             | what follows                               |
| a request under an admitted name, with other keys | refused: revoke the name first             |
| the same keys again                               | the same record, and a new certificate     |
| a node or TLS key that was revoked                | refused for good, under any name           |
| a signing key that another name had before        | refused: the key is that of one ledger     |
| a certificate near its end                        | the running client renews it: forwarder.py |
| a certificate past its end                        | enroll and admit again, with the same keys |

A record holds the FORMAT in which it was written; a record of a newer format is refused.
leaves/NAME.pem is a site's newest certificate, which is read only to check its dates.

Guarantee: a fingerprint is 80 bits of SHA-256 over the name and keys of a request, and nobody can
find other keys or another name with the same fingerprint (second preimage). The same name and keys
always have the same fingerprint.
Errors: ConfigError for a file that is missing, unreadable or malformed; Refused for a request that
a rule above refuses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.core.config.address import host_and_port
from fedtune.core.errors import ConfigError, InfrastructureError, Refused
from fedtune.core.files import reading, writing
from fedtune.core.wire.keys import SigningKey, canonical, verifies
from fedtune.evidence import fingerprints
from fedtune.evidence.fingerprints import PURPOSE
from fedtune.flower import certs

EC = ec.EllipticCurvePublicKey
FORMAT = 1  # of a record in nodes/; raised when an older release could misread one
MAX_BYTES = 65_536  # largest size of a request or a record
MAX_PLAN = 500_000  # most characters of a plan in an answer
PLAN = "plan.json"  # in the coordinator's home: the plan as it is sent
RENEWED = "renewed"  # in the folder of a site's keys: the certificate of its last renewal
FIELDS = {"name", "node", "csr", "signing"}
SIGNATURES = {"node_signature", "signature"}
REQUEST = FIELDS | SIGNATURES
ANSWER = {"name", "address", "ca", "certificate", "coordinator"}  # if the answer has no plan


class Member(NamedTuple):
    """The site to which a node of the grid belongs.

    - name: the site's name
    - key: the site's public signing key in hexadecimal; "" if it is not known"""

    name: str
    key: str = ""


@dataclass(frozen=True)
class Record:
    """The record of an admitted site.

    - name: the site's name
    - node: the site's node key in the form in which Flower sends it (PEM)
    - tls: the digest of its public TLS key, as `tls_digest` returns it
    - signing: its public Ed25519 key, in hexadecimal
    - admitted, revoked: when the site was admitted, and when it was revoked; `revoked` is "" while
      the site may take part"""

    name: str
    node: str
    tls: str
    signing: str
    admitted: str
    revoked: str = ""


@dataclass(frozen=True)
class Request:
    """A site's request to take part, whose signatures were verified.

    - name: the site's name
    - node: its public node key (PEM)
    - signing: its public signing key, in hexadecimal
    - tls: its public TLS key
    - fingerprint: the text that people compare by phone"""

    name: str
    node: str
    signing: str
    tls: EC
    fingerprint: str


@dataclass(frozen=True)
class Answer:
    """The coordinator's answer to a site's request.

    - name: the name of the site for which it is made
    - address: HOST:PORT to which the site connects
    - ca, certificate: the consortium's CA and the site's certificate, in PEM
    - coordinator: the coordinator's public signing key, in hexadecimal
    - plan, signature: the study's plan as JSON, for a person at the site to review, and the
      coordinator's signature of the plan's digest; both are "" if the coordinator had no plan
      yet"""

    name: str
    address: str
    ca: str
    certificate: str
    coordinator: str
    plan: str = ""
    signature: str = ""

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the consortium, which is the same for every site. The site compares it
        by phone with the fingerprint that the coordinator reads out."""
        return fingerprints.of_consortium(self.ca, self.coordinator)


def enroll(name: str, keys: Path, signing: SigningKey, out: Path) -> str:
    """Write a site's request to take part, with the public halves of its keys. Network keys that
    the site lacks are made first.

    - name: the site's name, as in its site.toml
    - keys: the folder of node.key and tls.key; it is made if it is missing. A folder `renewed` is
      made in it, where a courier in another container finds renewed certificates.
    - signing: the key with which the site signs its updates
    - out: the file of the request; an existing file is replaced

    Returns the request's fingerprint, which the site reads out by phone. Errors: ConfigError if a
    key cannot be read; InfrastructureError if a file cannot be written."""
    for folder in (keys, keys / RENEWED):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    node, tls = certs.node_key(keys / "node.key"), certs.tls_key(keys / "tls.key")
    fields: dict[str, Any] = {
        "name": name,
        "node": certs.public_pem(node.public_key()).decode(),
        "csr": certs.request(tls, name).decode(),
        "signing": signing.public,
    }
    signed = PURPOSE + canonical(fields)
    node_signature = node.sign(signed, ec.ECDSA(hashes.SHA384())).hex()
    signatures = {"node_signature": node_signature, "signature": signing.sign(signed)}
    writing.replace(out, json.dumps(fields | signatures, indent=1).encode() + b"\n")
    return _of_keys(name, fields["node"], tls.public_key(), signing.public)


def check_out(out: Path, fields: Set[str], what: str) -> None:
    """Check that an output file may be written: it does not exist, or it is an earlier file of the
    same kind, which is then replaced.

    - out: the file
    - fields: the fields by which a file of this kind is recognised
    - what: the name of the kind, for the error's text

    Errors: ConfigError if there is a file of another kind."""
    if not os.path.lexists(out):
        return
    try:
        same = not out.is_symlink() and fields <= set(texts_in(out, reading.SMALL))
    except ConfigError:
        same = False
    if not same:
        raise ConfigError(
            f"{out}: exists, but holds no {what}",
            f"a new file, or an earlier {what}, which is replaced",
            "choose another file with --out",
        )


def read_request(path: Path) -> Request:
    """Read and verify a request. Errors: ConfigError if the file is not a request, or a signature,
    a key or the name is not valid."""
    fields = texts_in(path)
    if set(fields) != REQUEST:
        raise ConfigError(f"{path}: not a request", "the file that `fedtune enroll` wrote")
    payload = {key: fields[key] for key in sorted(FIELDS)}
    try:
        signed = PURPOSE + canonical(payload)
        node = _p384(serialization.load_pem_public_key(fields["node"].encode()))
        csr = x509.load_pem_x509_csr(fields["csr"].encode())
        tls = _p384(csr.public_key())
        node.verify(bytes.fromhex(fields["node_signature"]), signed, ec.ECDSA(hashes.SHA384()))
        valid = csr.is_signature_valid and certs.common_name(csr.subject) == fields["name"]
        valid = valid and verifies(fields["signing"], signed, fields["signature"])
        valid = valid and certs.public_pem(node).decode() == fields["node"] and node != tls
    except (InvalidSignature, ValueError, TypeError):
        valid = False
    if not valid:
        raise ConfigError(
            f"{path}: the request was altered, or is incomplete",
            "a request that each of its keys signed",
            "ask the site for it again",
        )
    if not _is_name(fields["name"]):
        raise ConfigError(
            f"{path}: the name in this request cannot be a site's",
            "1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter or "
            "digit",
            "ask the site to correct site.name and send a new request",
        )
    fingerprint = _of_keys(fields["name"], fields["node"], tls, fields["signing"])
    return Request(fields["name"], fields["node"], fields["signing"], tls, fingerprint)


def compare(request: Request, fingerprint: str) -> None:
    """Compare a request's fingerprint with the one that the site read out. Errors: Refused if they
    differ."""
    if not fingerprints.match_fingerprints(fingerprint, request.fingerprint):
        raise Refused(
            f"the request's fingerprint is {request.fingerprint}",
            fingerprint,
            "somebody may have replaced the file: ask the site to send it another way",
        )


def admit(home: Path, request: Request, address: str) -> Answer:
    """Admit a site to the consortium: store its record in nodes/NAME.json and sign its certificate.
    Return the answer that the site gets.

    - home: the coordinator's home
    - request: the site's request, whose fingerprint a person has compared
    - address: HOST:PORT to which sites connect

    Errors: Refused by the rules at the top of this file, for instance if another site has one of
    the keys; ConfigError if `address` is not an address, or the consortium's CA is missing."""
    try:
        host_and_port(address)
    except ValueError as error:
        raise ConfigError(
            f"{address[:80]!r}: sites cannot connect there: it {error}",
            todo="give --address HOST:PORT",
        ) from None
    pem = certs.ca(home)[1].public_bytes(certs.PEM).decode()
    tls = tls_digest(request.tls)
    present = lookup(home, request.name)
    new = Record(request.name, request.node, tls, request.signing, certs.read_clock().isoformat())
    if present is None:
        for other in (*registry(home).values(), *_read_revoked(home)):
            _require_distinct(new, other)
        writing.replace(_file(home, request.name), _record_json(new), private=True)
    elif (present.node, present.tls, present.signing) != (new.node, new.tls, new.signing):
        raise Refused(
            f"a site named {request.name} is admitted already, with other keys",
            todo=f"if the site lost or changed its keys: fedtune revoke {request.name} first",
        )
    leaf = _issue_certificate(home, request.tls, request.name)
    signing = SigningKey.at(home / "signing.key").public
    return Answer(request.name, address, pem, leaf.decode(), signing, **_plan(home))


def _plan(home: Path) -> dict[str, str]:
    """Return the plan for review as fields of an answer: "plan" (JSON) and "signature". Return {}
    if no plan is stored in the coordinator's home, or if it is too long for an answer."""
    if not (home / PLAN).exists():
        return {}
    kept = texts_in(home / PLAN, 2 * MAX_PLAN)
    plan, signature = kept.get("study", ""), kept.get("signature", "")
    return {"plan": plan, "signature": signature} if 0 < len(plan) <= MAX_PLAN else {}


def revoke(home: Path, name: str) -> Record:
    """Revoke a site: move its record to nodes/revoked/, and return the record with the time of
    revocation. home: the coordinator's home; name: the site's name. Errors: ConfigError if no such
    site is admitted."""
    record = lookup(home, name)
    if record is None:
        names = ", ".join(registry(home)) or "nobody"
        raise ConfigError(f"no site named {name} is admitted", f"one of: {names}")
    ended = replace(record, revoked=certs.read_clock().isoformat())
    file = home / "nodes" / "revoked" / f"{name}-{record.tls[:16]}.json"
    writing.replace(file, _record_json(ended), private=True)
    _file(home, name).unlink()
    return ended


def registry(home: Path) -> dict[str, Record]:
    """Return the records of all sites that may take part now: site's name -> record. home: the
    coordinator's home."""
    return {
        record.name: record
        for file in sorted((home / "nodes").glob("*.json"))
        if (record := lookup(home, file.stem))
    }


def lookup(home: Path, name: str) -> Record | None:
    """Read the record of one site from disk and return it; None if the site is not admitted, or is
    revoked. home: the coordinator's home; name: the site's name."""
    if not _is_name(name):
        return None
    try:
        return _record(_file(home, name))
    except FileNotFoundError:
        return None


def list_revoked(home: Path) -> list[Record]:
    """List the records of all revoked sites. A name may occur more than once, since a site can be
    admitted again with new keys."""
    return list(_read_revoked(home))


def leaf_of(home: Path, record: Record) -> x509.Certificate | None:
    """Return the newest certificate that was issued to a site, if it is for the TLS key in the
    record; None if it is not, or no certificate is stored. home: the coordinator's home; record:
    the site's record."""
    try:
        leaf = x509.load_pem_x509_certificate(_leaf(home, record.name).read_bytes())
    except (OSError, ValueError):
        return None
    key = leaf.public_key()
    return leaf if isinstance(key, EC) and tls_digest(key) == record.tls else None


def was_revoked(home: Path, tls: str) -> bool:
    """Return whether a TLS key was admitted and then revoked. home: the coordinator's home; tls:
    the key's digest, as `tls_digest` returns it."""
    return any(record.tls == tls for record in _read_revoked(home))


def renew(home: Path, record: Record, csr: bytes) -> bytes:
    """Issue a new certificate to an admitted site and return it (PEM).

    - home: the coordinator's home
    - record: the site's record
    - csr: the site's certificate signing request (PEM)

    Errors: Refused if the request is malformed, or is for another key or name than the record's."""
    try:
        asked = x509.load_pem_x509_csr(csr)
        key = asked.public_key()
        if not (asked.is_signature_valid and isinstance(key, EC)):
            raise ValueError
    except (ValueError, TypeError):
        raise Refused("not a request for a certificate") from None
    if tls_digest(key) != record.tls or certs.common_name(asked.subject) != record.name:
        raise Refused(
            "the request is for another key or name than the site was admitted with",
            todo="run `fedtune enroll` at the site, and admit its new request",
        )
    return _issue_certificate(home, key, record.name)


def check_clock(home: Path) -> datetime:
    """Check that no date recorded in the coordinator's home is later than the present time, and
    return the present time.

    Errors: ConfigError if a date is later by more than certs.SKEW. Then the clock was set back, and
    certificates and signed requests would be refused as not yet valid."""
    now, past = certs.read_clock(), dict[str, datetime]()
    for name in ("ca.pem", "server.pem"):
        with suppress(ConfigError):  # a missing or damaged file is reported by other checks
            past[name] = certs.certificate_in(home / name, "").not_valid_before_utc
    for record in (*registry(home).values(), *list_revoked(home)):
        leaf, admitted = leaf_of(home, record), datetime.fromisoformat(record.admitted)
        past[record.name] = max(admitted, leaf.not_valid_before_utc) if leaf else admitted
    name, latest = max(past.items(), key=lambda entry: entry[1], default=("", now))
    if now < latest - certs.SKEW:
        raise ConfigError(
            f"the clock here shows {now:%Y-%m-%d %H:%M} UTC, but {name} was written "
            f"at {latest:%Y-%m-%d %H:%M}",
            "a clock that never goes back",
            "set this machine's clock (NTP)",
        )
    return now


def tls_digest(key: EC) -> str:
    """Return the digest by which records hold a public TLS key: the sha256 of its DER form, in
    hexadecimal."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def _require_distinct(new: Record, other: Record) -> None:
    """Check that the record of a new site shares no key with the record `other`. Only the signing
    key may be the same, if both have the same name. Errors: Refused if another key is shared."""
    taken = {"node": new.node == other.node, "TLS": new.tls == other.tls}
    if other.name != new.name:
        taken["signing"] = new.signing == other.signing
    for kind, same in taken.items():
        if same:
            was = "was revoked" if other.revoked else f"is that of the site {other.name}"
            raise Refused(
                f"the {kind} key of this request {was}",
                "keys that were never admitted",
                "`fedtune enroll --new-keys` makes new ones",
            )


def _read_revoked(home: Path) -> Iterator[Record]:
    for file in (home / "nodes" / "revoked").glob("*.json"):
        yield _record(file)


def _record(file: Path) -> Record:
    """Read a site's record. Errors: FileNotFoundError if there is none; ConfigError if the file is
    damaged, or of a newer format."""
    expected, todo = "a record of `fedtune admit`", "restore a backup"
    try:
        fields = reading.json_in(file, expected, todo, ConfigError, MAX_BYTES)
    except ConfigError:
        if os.path.lexists(file):
            raise
        raise FileNotFoundError from None  # the site was revoked, perhaps at this moment
    try:
        version = fields.pop("format", 1)
        if type(version) is int and version > FORMAT:
            raise ConfigError(
                f"{file}: written by a newer fedtune (format {version})",
                f"format {FORMAT} at most",
                "upgrade fedtune again; nothing was changed",
            )
        record = Record(**fields)
        if not all(isinstance(value, str) for value in fields.values()) or not _is_name(
            record.name
        ):
            raise TypeError
        return record
    except TypeError:
        raise ConfigError(f"{file}: not readable", expected, todo) from None


def _record_json(record: Record) -> bytes:
    return _json({"format": FORMAT, **asdict(record)})


def _issue_certificate(home: Path, key: EC, name: str) -> bytes:
    """Issue a new certificate to a site and return it (PEM). It is also stored as leaves/NAME.pem;
    if that fails, for instance on a full disk, the failure is ignored.

    - home: the coordinator's home, with the CA
    - key: the site's public TLS key
    - name: the site's name"""
    leaf = certs.issue(home, key, name).public_bytes(certs.PEM)
    with suppress(InfrastructureError):  # a renewal does not fail because the disk is full
        writing.replace(_leaf(home, name), leaf, private=True)
    return leaf


def _leaf(home: Path, name: str) -> Path:
    return home / "leaves" / f"{name}.pem"


def texts_in(path: Path, most: int = MAX_BYTES) -> dict[str, str]:
    """Read a file with a small JSON object whose values are all strings. path: the file; most: how
    many bytes the file may have at most. Errors: ConfigError if the file is larger, cannot be read,
    or holds another value."""
    expected, todo = "a file of `fedtune enroll` or `fedtune admit`", "ask for it again"
    fields = reading.json_in(path, expected, todo, ConfigError, most)
    if not all(isinstance(value, str) for value in fields.values()):
        raise ConfigError(f"{path}: holds a value that is not a text", expected, todo)
    return fields


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=1).encode() + b"\n"


def _file(home: Path, name: str) -> Path:
    return home / "nodes" / f"{name}.json"


def _is_name(name: str) -> bool:
    letters = name.replace("-", "").replace("_", "").replace(".", "")
    return 0 < len(name) <= 64 and letters.isalnum() and name.isascii() and name[0].isalnum()


def _p384(key: object) -> EC:
    if not (isinstance(key, EC) and key.curve.name == "secp384r1"):
        raise ValueError
    return key


def _of_keys(name: str, node: str, tls: EC, signing: str) -> str:
    """Compute a site's fingerprint from its name and its three keys. Nothing else in an enrolment
    request changes it.

    - name: the site's name
    - node: its public node key (PEM)
    - tls: its public TLS key
    - signing: its public signing key, in hexadecimal

    Returns the fingerprint as the text that people read to each other."""
    return fingerprints.of_site(name, node, tls_digest(tls), signing)
