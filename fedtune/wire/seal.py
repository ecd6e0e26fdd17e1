"""Seals of updates, orders of rounds, receipts: what binds bytes to who sent them, for what.

coordinator ── order: plan, round, nonce ──> site
coordinator <── seal over header + body ──── site     header names the site's ledger head
coordinator ── receipt: that head, countersigned, with the next order ──> site
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.errors import InputError
from fedtune.wire.keys import SigningKey, canonical, verifies

LONGEST = 100_000  # characters of any text in a sealed message
LONGEST_HEADER = 10_000
OUTSIDE = ("header", "signature")


class SealError(InputError):
    """A message that is not what its signature says, or is signed by someone else."""


@dataclass(frozen=True)
class Header:
    """What a site's signature binds an update to. Every field is public.

    plan, base: digests; receiver: the coordinator's public key; nonce: as in the order; body:
    sha256 of the arrays (body_digest); ledger: the site's signed statement of its ledger's head."""

    plan: str
    round: int
    base: str
    site: str
    receiver: str
    nonce: str
    body: str
    ledger: dict[str, Any]


def body_digest(arrays: Mapping[str, bytes], said: Mapping[str, Any] | None = None) -> str:
    """sha256 over every array's name, length and bytes, sorted by name, and over all that the
    message says beside them (`said`, without the header and the signature themselves).

    Errors: SealError where `said` holds anything but short text."""
    total = hashlib.sha256()
    for name, body in sorted(arrays.items()):
        total.update(f"{len(name.encode())}:{name}:{len(body)}:".encode())
        total.update(body)
    if said is not None:
        words = {name: text for name, text in said.items() if name not in OUTSIDE}
        if not all(isinstance(text, str) and len(text) <= LONGEST for text in words.values()):
            raise SealError("what its answer says beside its arrays is malformed")
        try:
            total.update(b"said:" + canonical(words))
        except UnicodeEncodeError:
            raise SealError("what its answer says beside its arrays is malformed") from None
    return total.hexdigest()


def seal(key: SigningKey, header: Header) -> dict[str, str]:
    """The header as JSON, and its signature."""
    body = canonical(asdict(header))
    return {"header": body.decode(), "signature": key.sign(b"fedtune update\0" + body)}


def opened(sealed: Mapping[str, Any], public: str, expected: Header) -> dict[str, Any]:
    """The site's ledger statement, where the seal is by `public` and says what was expected.

    `expected.ledger` is ignored. Nothing of the body is parsed. Errors: SealError."""
    text, signature = sealed.get("header"), sealed.get("signature")
    if not isinstance(text, str) or not isinstance(signature, str):
        raise SealError("its update is not sealed")
    if len(text) > LONGEST_HEADER:
        raise SealError("the header of its update is too long")
    try:
        signed = b"fedtune update\0" + text.encode()
    except UnicodeEncodeError:
        raise SealError("the header of its update is malformed") from None
    if not verifies(public, signed, signature):
        raise SealError("its update is not signed by the key that it was admitted with")
    try:
        said = json.loads(text)
        if canonical(said).decode() != text:  # a name given twice, or another spelling
            raise ValueError
        ledger = said.pop("ledger")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise SealError("the header of its update is malformed") from None
    wanted = asdict(expected)
    del wanted["ledger"]
    for name, value in wanted.items():
        if type(said.get(name)) is not type(value) or said[name] != value:
            raise SealError(f"its update is sealed for another {name}")
    if set(said) != set(wanted) or not isinstance(ledger, dict):
        raise SealError("the header of its update is malformed")
    return ledger


def order(key: SigningKey, plan: str, round_: int, nonce: str, receipt: str) -> dict[str, Any]:
    """The coordinator's signed demand for one round."""
    body = {"plan": plan, "round": round_, "nonce": nonce, "receipt": receipt}
    return body | {"signature": key.sign(b"fedtune order\0" + canonical(body))}


def check_order(said: Mapping[str, Any], public: str) -> None:
    """Errors: SealError where the order is not by the coordinator that sent the plan."""
    body = {name: said.get(name) for name in ("plan", "round", "nonce", "receipt")}
    signed = b"fedtune order\0" + canonical(body)
    if not verifies(public, signed, str(said.get("signature"))):
        raise SealError("the order is not signed by the coordinator that sent the plan")


def sign_plan(key: SigningKey, digest: str) -> dict[str, str]:
    """The coordinator's public key, and its signature over a plan's digest."""
    return {"coordinator": key.public, "signature": key.sign(b"fedtune plan\0" + digest.encode())}


def check_plan(said: Mapping[str, Any], digest: str) -> str:
    """The public key of the coordinator that signed the plan. Errors: SealError."""
    public, signature = str(said.get("coordinator")), str(said.get("signature"))
    if not verifies(public, b"fedtune plan\0" + digest.encode(), signature):
        raise SealError("the plan is not signed by the coordinator that it names")
    return public


def receipt(key: SigningKey, statement: Mapping[str, Any]) -> dict[str, Any]:
    """A site's ledger statement {token}, countersigned by the coordinator, which cannot read it."""
    body = {"token": statement.get("token")}
    return body | {
        "coordinator": key.public,
        "countersignature": key.sign(b"fedtune receipt\0" + canonical(body)),
    }
