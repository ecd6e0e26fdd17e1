"""Sign with a site's or a coordinator's key (Ed25519), and define the canonical bytes to sign."""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedtune.core.errors import InfrastructureError
from fedtune.core.files import reading
from fedtune.core.files.writing import create

_PUBLIC, _SIGNATURE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{128}")

KEY, RESTORE = "32 bytes, made by fedtune", "restore it from a backup"


class SigningKey:
    """An Ed25519 key. Guarantee: the private half is only in one 0600 file and in this object;
    repr shows the public half."""

    def __init__(self, private: Ed25519PrivateKey | None = None) -> None:
        self._private = private or Ed25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw().hex()

    def __repr__(self) -> str:
        return f"SigningKey(public={self.public!r})"

    @classmethod
    def at(cls, path: Path) -> SigningKey:
        """Read the key in `path` (32 raw bytes); if it does not exist, make it, readable by this
        user only.

        Errors: InfrastructureError if the file cannot be read or written, is not a key, or can be
        read by others."""
        try:
            if not os.path.lexists(path):
                create(path, cls()._private.private_bytes_raw(), private=True)
            key_bytes = reading.content(path, KEY, RESTORE, InfrastructureError)
            if path.stat().st_mode & 0o077:
                raise InfrastructureError(
                    f"{path}: other users can read this private key",
                    todo="treat it as lost, or chmod 600 if nobody else was on this machine",
                )
            return cls(Ed25519PrivateKey.from_private_bytes(key_bytes))
        except (OSError, ValueError) as error:
            raise InfrastructureError(
                f"{path}: cannot be used as a signing key ({type(error).__name__})", KEY, RESTORE
            ) from None

    def sign(self, message: bytes) -> str:
        """Return the hexadecimal signature of `message`."""
        return self._private.sign(message).hex()

    def derive(self, purpose: str) -> bytes:
        """Derive a 32-byte secret for one purpose from the private half (HKDF-SHA256, RFC 5869)."""
        derivation = HKDF(hashes.SHA256(), 32, salt=None, info=b"fedtune " + purpose.encode())
        return derivation.derive(self._private.private_bytes_raw())


@lru_cache(maxsize=256)  # a ledger's head and receipts are read again at every transaction
def verifies(public: str, message: bytes, signature: str) -> bool:
    """Return whether `signature` over `message` is by the key `public`, both in lower-case
    hexadecimal. If either is malformed, return False. Upper case and spaces count as malformed, so
    that each signature has only one form."""
    if not (_PUBLIC.fullmatch(public) and _SIGNATURE.fullmatch(signature)):
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def canonical(value: dict[str, Any]) -> bytes:
    """Encode a JSON object as the bytes that are signed. Equal objects give equal bytes: keys are
    sorted, there are no spaces, and text is UTF-8. Errors: ValueError for a number that is not
    finite."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()
