"""Sign a dossier's weights once more in OpenSSF's format, for whoever has its tools and not ours.

    model.sig   a Sigstore bundle over run/adapter, by a key that needs no network
    model.pub   that key's public half (P-256, PEM); release.json vouches for it

Its tool takes keys on NIST's curves alone, so that the coordinator's Ed25519 key cannot sign it.
Needs model-signing, of the extra `openssf`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedtune.core.files import reading
from fedtune.core.files.writing import create, replace

KEY = "model-signing.key"  # in the coordinator's home
SIGNATURE, PUBLIC = "model.sig", "model.pub"
WHAT = "a P-256 key that fedtune made (PEM)"


def can_sign() -> bool:
    """Return whether model-signing and what it imports are installed."""
    return all(importlib.util.find_spec(name) for name in ("model_signing", "OpenSSL"))


def sign_weights(weights: Path, folder: Path, key: Path) -> None:
    """Write model.sig and model.pub of a folder of weights into a dossier's folder.

    key: the private half, made there for this user alone where there is none.
    Errors: InputError, InfrastructureError, ModuleNotFoundError without model-signing."""
    from model_signing import signing

    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    create(key, pem, private=True)
    private_key = load_pem_private_key(reading.content(key, WHAT), password=None)
    public = private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.sign(weights.resolve(), folder / SIGNATURE)
    replace(folder / PUBLIC, public)
