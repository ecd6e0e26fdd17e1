"""Sign a dossier's weights also in OpenSSF's format, for readers who have its tools and not
fedtune.

    model.sig   a Sigstore bundle over run/adapter, signed by a local key without a network
    model.pub   that key's public half (P-256, PEM), which the signature in release.json covers

OpenSSF's tool accepts only keys on NIST's curves, so the coordinator's Ed25519 key cannot be used.
This needs the package model-signing, of the extra `openssf`."""

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
    """Return whether model-signing and the packages that it imports are installed."""
    return all(importlib.util.find_spec(name) for name in ("model_signing", "OpenSSL"))


def sign_weights(weights: Path, folder: Path, key: Path) -> None:
    """Sign a model's weights in OpenSSF's format.

    - weights: the folder whose files are signed
    - folder: the dossier's folder, into which model.sig and model.pub are written
    - key: the file of the private key; if it does not exist, it is made, readable by this user only

    Errors: InputError, InfrastructureError; ModuleNotFoundError without model-signing."""
    from model_signing import signing

    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    create(key, pem, private=True)
    private_key = load_pem_private_key(reading.content(key, WHAT), password=None)
    public = private_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    config = signing.Config().use_elliptic_key_signer(private_key=key)
    config.sign(weights.resolve(), folder / SIGNATURE)
    replace(folder / PUBLIC, public)
