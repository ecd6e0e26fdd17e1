"""Mask the words of a site's sum, so that they look random and all sites' masks cancel in the sum.

Two sites of a set P derive a key by HKDF-SHA256 from their X25519 secret and the set's digest. The
key gives an AES-256-CTR keystream, which one of the two adds to its words and the other subtracts,
modulo 2ᵇ. The sum over all of P is the sum of the unmasked words. If one site's words are missing,
the sum looks uniform.

References: Bonawitz et al. 2017, "Practical secure aggregation", section 4 (pairwise masks, here
without recovery of dropouts); RFC 7748 (X25519), RFC 5869 (HKDF)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedtune.core.secagg.statement import Ready, set_digest

_CHUNK = 2**18  # words of a keystream that are made at once
Words = npt.NDArray[Any]  # uint32 or uint64


def dtype_of(bits: int) -> npt.DTypeLike:
    """Return the number format in which words are sent: unsigned, little-endian. bits: the width of
    a word, 32 or 64."""
    return {32: "<u4", 64: "<u8"}[bits]


def new_key() -> X25519PrivateKey:
    """Make the masking key of one draw (a site's noised sum for one attempt at a round)."""
    return X25519PrivateKey.generate()


def public_of(key: X25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def mask(
    total: npt.NDArray[np.int64],
    key: X25519PrivateKey,
    mine: Ready,
    statements: Sequence[Ready],
    bits: int,
) -> Words:
    """Mask an integer sum for a set of sites. Return d words of `bits` bits.

    - total: this site's noised sum, (d,)
    - key: the private half of the masking key in `mine`; it must be used for one set only
    - mine: this site's own statement
    - statements: the statements of all sites of the set, this site's included, in any order
    - bits: 32 or 64, the width of a word, which is the same at all sites

    Guarantee: without the words of every other site of the set, or their keys, the result is
    computationally indistinguishable from uniform words. The sum is reduced modulo 2ᵇ and never
    clamped, checked or rejected, since what a site tells about its own noised sum would be
    protected by the site's own noise only."""
    words = total.astype(np.uint64).astype(dtype_of(bits))  # modulo 2⁶⁴, then modulo 2ᵇ
    digest = set_digest(statements)
    for other in statements:
        if other == mine:
            continue
        secret = key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(other.masking)))
        add = np.add if mine.masking < other.masking else np.subtract
        info = b"fedtune mask\0" + "".join(sorted((mine.masking, other.masking))).encode()
        derived = HKDF(hashes.SHA256(), 32, salt=bytes.fromhex(digest), info=info).derive(secret)
        at = 0
        for stream in _keystream(derived, len(words), bits):
            part = words[at : at + len(stream)]
            add(part, stream, out=part)
            at += len(stream)
    return words


def _keystream(key: bytes, size: int, bits: int) -> Iterator[Words]:
    """Yield the AES-256-CTR keystream of `key` as `size` words of `bits` bits, in chunks: one array
    after another. Each key is used once, so the counter starts at 0."""
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    for start in range(0, size, _CHUNK):
        count = min(_CHUNK, size - start)
        stream = encryptor.update(bytes(count * bits // 8))
        yield np.frombuffer(stream, dtype=dtype_of(bits))


def centre_words(words: Words) -> npt.NDArray[np.int64]:
    """Return words of b bits as signed integers, int64, in [-2ᵇ⁻¹, 2ᵇ⁻¹): the upper half of a
    word's values stands for negative numbers."""
    signed = words.astype(words.dtype.newbyteorder("="))
    return signed.view(np.int32 if words.dtype.itemsize == 4 else np.int64).astype(np.int64)
