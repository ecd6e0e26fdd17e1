"""What a build says about itself: an in-toto Statement with SLSA provenance, in a DSSE envelope.

    statement    {"_type": …/Statement/v1, "subject": files by SHA-256, "predicateType":
                 https://slsa.dev/provenance/v1, "predicate": {buildDefinition, runDetails}}
    envelope     {"payload": base64, "payloadType": application/vnd.in-toto+json, "signatures"},
                 signed with Ed25519 over "DSSEv1" and both with their lengths

References: in-toto attestation framework v1 (statement.md, resource_descriptor.md, bundle.md); SLSA
v1 (provenance.md); DSSE 1.0 (protocol.md, envelope.md)."""

from __future__ import annotations

import base64
import getpass
import hashlib
import json
import platform
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fedtune.core.errors import InputError

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
PAYLOAD = "application/vnd.in-toto+json"
# No address of this project's own resolves yet: docs/releasing.md says what both mean.
BUILD_TYPE = "x-fedtune:make-release:1"
BUILDER = "x-fedtune:machine-of-a-maintainer"
A_KEY = "an Ed25519 key as PEM, made by openssl genpkey -algorithm ed25519 -out FILE"


class NotAsReleased(InputError):
    """A file of a release that is not what its sums, its statement, its signature or the tree
    say."""


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def now() -> str:
    """This moment in UTC, as the statement writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def make(
    subjects: Mapping[str, str],
    *,
    commit: str,
    source: str,
    parameters: Mapping[str, str],
    materials: Mapping[str, bytes],
    packages: Mapping[str, str],
    builder: str,
    started: str,
) -> dict[str, Any]:
    """Build the statement. subjects: name -> SHA-256; source: the repository's address, "" while
    there is none; materials: files of the tree by which the build was held, such as locks;
    packages: name -> version of what built it."""
    tree: dict[str, Any] = {"name": "source", "digest": {"gitCommit": commit}}
    if source:
        tree["uri"] = f"git+{source}@{commit}"
    held = [
        {"name": name, "digest": {"sha256": sha256(body)}}
        for name, body in sorted(materials.items())
    ]
    built_by = [{"uri": f"pkg:pypi/{name}@{version}"} for name, version in sorted(packages.items())]
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": name, "digest": {"sha256": digest}}
            for name, digest in sorted(subjects.items())
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": dict(parameters),
                "internalParameters": {
                    "python": platform.python_version(),
                    "platform": f"{platform.system()} {platform.machine()}".lower(),
                },
                "resolvedDependencies": [tree, *held, *built_by],
            },
            "runDetails": {
                "builder": {"id": builder},
                "metadata": {
                    "invocationId": f"urn:uuid:{uuid.uuid4()}",
                    "startedOn": started,
                    "finishedOn": now(),
                },
            },
        },
    }


def subjects_of(statement: Mapping[str, Any]) -> dict[str, str]:
    """name -> SHA-256, of a statement of this form. Errors: NotAsReleased."""
    try:
        if (statement["_type"], statement["predicateType"]) != (STATEMENT, PREDICATE):
            raise KeyError
        return {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    except (KeyError, TypeError):
        raise NotAsReleased(
            "the statement is none of a build", f"{STATEMENT}, {PREDICATE}"
        ) from None


def origin(statement: Mapping[str, Any]) -> tuple[str, set[str]]:
    """The commit that was built, and the packages that built it, as addresses pkg:pypi/….

    Errors: NotAsReleased."""
    try:
        needed = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        return str(needed[0]["digest"]["gitCommit"]), {str(each.get("uri")) for each in needed}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise NotAsReleased("the statement names no commit", "the commit first") from None


def private_key(path: Path) -> Ed25519PrivateKey:
    """Read the key with which a person signs; asks for its passphrase where it has one.

    Errors: InputError where it cannot be read, is another kind of key, or others can read it."""
    try:
        if path.stat().st_mode & 0o077:
            raise InputError(f"{path}: other users can read this private key", todo="chmod 600")
        body = path.read_bytes()
        try:
            key = load_pem_private_key(body, None)
        except TypeError:  # it has a passphrase
            key = load_pem_private_key(body, getpass.getpass(f"{path}: passphrase: ").encode())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a key ({type(error).__name__})", A_KEY) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: another kind of key", A_KEY)
    return key


def public_key(body: bytes) -> Ed25519PublicKey:
    """Errors: NotAsReleased."""
    try:
        key = load_pem_public_key(body)
    except ValueError:
        raise NotAsReleased("the public key cannot be read", A_KEY) from None
    if not isinstance(key, Ed25519PublicKey):
        raise NotAsReleased("the public key is of another kind", A_KEY)
    return key


def as_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key as DER, as `openssl pkey -pubin -outform DER | sha256sum` prints it."""
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def to_be_signed(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    sent = kind.encode()
    return b"DSSEv1 %d %b %d %b" % (len(sent), sent, len(body), body)


def sealed(body: bytes, key: Ed25519PrivateKey) -> bytes:
    """The statement's bytes in an envelope, as the one line of a bundle (.intoto.jsonl)."""
    signature = key.sign(to_be_signed(PAYLOAD, body))
    envelope = {
        "payload": base64.b64encode(body).decode(),
        "payloadType": PAYLOAD,
        "signatures": [
            {"keyid": fingerprint(key.public_key()), "sig": base64.b64encode(signature).decode()}
        ],
    }
    return json.dumps(envelope).encode() + b"\n"


def opened(envelope: bytes, key: Ed25519PublicKey) -> bytes:
    """The statement's bytes, once a signature of `key` holds. Errors: NotAsReleased."""
    try:
        found = json.loads(envelope)
        body = base64.b64decode(found["payload"], validate=True)
        kind = found["payloadType"]
        signatures = [base64.b64decode(s["sig"], validate=True) for s in found["signatures"]]
    except (ValueError, KeyError, TypeError):
        raise NotAsReleased("the envelope cannot be read", "one line of DSSE") from None
    for signature in signatures:
        try:
            key.verify(signature, to_be_signed(str(kind), body))
        except InvalidSignature:
            continue
        if kind == PAYLOAD:
            return body
    raise NotAsReleased(
        "no signature of this key holds over the statement",
        f"a signature by {fingerprint(key)}",
        "take no file of this release",
    )
