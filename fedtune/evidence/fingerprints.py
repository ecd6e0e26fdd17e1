"""Compute the fingerprints that people read to each other by phone: of a site, a site's peer, an
approver and a consortium.

Guarantee: a fingerprint is 80 bits of SHA-256 over keys and, for a site, over the site's name too.
So nobody can find other keys or another name with the same fingerprint (second preimage).
"""

from __future__ import annotations

import hashlib
from typing import Any

from fedtune.core.wire.keys import canonical

PURPOSE = b"fedtune enrolment\0"


def of_consortium(ca: str, coordinator: str) -> str:
    """Compute a consortium's fingerprint.

    - ca: the certificate of its CA (PEM); "" in a simulation
    - coordinator: the public key with which its coordinator signs, in hexadecimal"""
    return _fingerprint({"ca": ca, "coordinator": coordinator})


def of_site(name: str, node: str, tls: str, signing: str) -> str:
    """Compute a site's fingerprint from its name and three keys. The same name and keys always give
    the same fingerprint.

    - name: the site's name, as it enrols
    - node: the public key of its Flower node (PEM)
    - tls: sha256 of its public TLS key in DER form, in hexadecimal (flower.enrol.tls_digest)
    - signing: the public key that signs its updates, in hexadecimal"""
    return _fingerprint({"name": name, "node": node, "tls": tls, "signing": signing})


def of_peer(signing: str) -> str:
    """Compute the fingerprint by which a site is known to the sites that share noise with it. It
    depends on the site's key alone and not on its name, since those sites need to know only the
    key. signing: the site's public signing key, in hexadecimal.

    >>> of_peer("00" * 32)
    '88d8 ab30 924b 8a69 eae4'
    """
    return _fingerprint({"peer": signing})


def of_approver(signing: str) -> str:
    """Compute the fingerprint of a person or site that approves a dossier. signing: the public key
    that signs the approval, in hexadecimal."""
    return _fingerprint({"approver": signing})


def match_fingerprints(first: str, second: str) -> bool:
    """Return whether two fingerprints are equal, however people wrote them: in groups with spaces
    or dashes, in small letters or capitals."""
    return _digits(first) == _digits(second)


def _digits(fingerprint: str) -> str:
    return "".join(fingerprint.split()).replace("-", "").lower()


def _fingerprint(fields: dict[str, Any]) -> str:
    digits = hashlib.sha256(PURPOSE + canonical(fields)).hexdigest()[:20]
    return " ".join(digits[i : i + 4] for i in range(0, 20, 4))
