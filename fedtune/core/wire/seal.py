"""Sign updates, orders of rounds and receipts. A signature binds bytes to sender and purpose.

coordinator ── order: plan, round, nonce ──> site
coordinator <── seal over header + body ──── site     header names the site's ledger head
coordinator ── receipt: that head, countersigned, with the next order ──> site
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from fedtune.core.errors import InputError
from fedtune.core.wire.keys import SigningKey, canonical, verifies

LONGEST = 100_000  # characters of any text in a sealed message
LONGEST_HEADER = 10_000
OUTSIDE = ("header", "signature")
# A ledger's token: 3,008 digits today. It is stored and sent back unread, so its type is checked.
TOKEN = re.compile(r"[0-9a-f]{1,4096}")


class SealError(InputError):
    """A message does not match its signature, or is signed by another key."""


@dataclass(frozen=True)
class Header:
    """The context to which a site's signature binds an update. Every field is public.

    - plan, base: the digests of plan and base
    - round: the number of the round
    - site: the site's name
    - receiver: the coordinator's public key
    - nonce: the random text of the order that the update answers
    - body: the message's `body_digest`
    - ledger: {"token": text}, the head of the site's ledger, encrypted so that only the site can
      read it"""

    plan: str
    round: int
    base: str
    site: str
    receiver: str
    nonce: str
    body: str
    ledger: dict[str, Any]


def body_digest(arrays: Mapping[str, bytes], fields: Mapping[str, Any] | None = None) -> str:
    """Return the digest of a message: the sha256, in hexadecimal, over the digest of its arrays and
    its text fields, except "header" and "signature". Whoever knows the digest of the arrays can
    check the text without having the arrays.

    - arrays: each array's unparsed bytes, by name
    - fields: the text fields by name; None if the message has none, which gives another digest than
      an empty table

    Errors: SealError if `fields` holds anything but short text."""
    return digest_of(arrays_digest(arrays), fields)


def arrays_digest(arrays: Mapping[str, bytes]) -> str:
    """Return the sha256, in hexadecimal, over every array's name, length and bytes, sorted by name.
    arrays: each array's unparsed bytes, by name."""
    total = hashlib.sha256()
    for name, content in sorted(arrays.items()):
        total.update(f"{len(name.encode())}:{name}:{len(content)}:".encode())
        total.update(content)
    return total.hexdigest()


def digest_of(arrays: str, fields: Mapping[str, Any] | None) -> str:
    """Return the digest of a message, as `body_digest` does, if only the digest of its arrays is
    known.

    - arrays: the digest of the arrays, as `arrays_digest` returned it
    - fields: the text fields by name; None if the message has none, which gives another digest than
      an empty table

    Errors: SealError if `fields` holds anything but short text."""
    said = None if fields is None else texts_of(fields)
    try:
        return hashlib.sha256(canonical({"arrays": arrays, "said": said})).hexdigest()
    except UnicodeEncodeError:
        raise SealError("what its answer says beside its arrays is malformed") from None


def texts_of(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return those text fields of a message that its seal covers, by name: all except "header" and
    "signature". Errors: SealError if one is not short text."""
    texts = {name: text for name, text in fields.items() if name not in OUTSIDE}
    if not all(isinstance(text, str) and len(text) <= LONGEST for text in texts.values()):
        raise SealError("what its answer says beside its arrays is malformed")
    return texts


def seal(key: SigningKey, header: Header) -> dict[str, str]:
    """Encode the header as JSON and sign it with the site's key. Return {"header": the JSON text,
    "signature": the signature in hexadecimal}."""
    signed = canonical(asdict(header))
    return {"header": signed.decode(), "signature": key.sign(b"fedtune update\0" + signed)}


def open_seal(sealed: Mapping[str, Any], public: str, expected: Header) -> dict[str, Any]:
    """Verify that the site with the key `public` sealed a message, and that the seal's header is
    `expected`. Return the header's statement about the site's ledger, {"token": text}, which only
    the site can read.

    - sealed: the message's fields, with "header" and "signature" as `seal` made them
    - public: the site's public signing key, with which it was admitted
    - expected: the context in which the site was asked; its `ledger` is ignored

    Nothing of the body is parsed. Errors: SealError, also if the statement has another form."""
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
        raise SealError("its update is not signed by the key with which the site was admitted")
    try:
        header = json.loads(text)
        if canonical(header).decode() != text:  # a name given twice, or another spelling
            raise ValueError
        ledger = header.pop("ledger")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise SealError("the header of its update is malformed") from None
    required = asdict(expected)
    del required["ledger"]
    for name, value in required.items():
        if type(header.get(name)) is not type(value) or header[name] != value:
            raise SealError(f"its update is sealed for another {name}")
    if set(header) != set(required) or not _is_statement(ledger):
        raise SealError("the header of its update is malformed")
    return ledger


def _is_statement(ledger: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether a site's statement about its ledger has the agreed form {"token": text} and
    nothing else. The text must be lower-case hexadecimal of bounded length."""
    if not isinstance(ledger, dict) or set(ledger) != {"token"}:
        return False
    token = ledger["token"]
    return isinstance(token, str) and TOKEN.fullmatch(token) is not None


def digest_beside(arrays: Mapping[str, bytes], table: Mapping[str, Any] | None = None) -> str:
    """Return the sha256, in hexadecimal, over what is sent beside the coordinator's signed order:
    the adapter's arrays and a table of texts. arrays: each array's unparsed bytes, by name; table:
    None if none is sent."""
    content = {"arrays": arrays_digest(arrays), "table": dict(table or {})}
    return hashlib.sha256(canonical(content)).hexdigest()


def order(
    key: SigningKey,
    plan: str,
    round_: int,
    nonce: str,
    receipt: str,
    attempt: int = 0,
    *,
    beside: str,
) -> dict[str, Any]:
    """Return the coordinator's signed order for one round, as fields of the message.

    - key: the coordinator's signing key
    - plan: the plan's digest, followed by the suffix of the order's kind (vault.answers.ORDERS)
    - round_: number of the round, or of the round that a query follows
    - nonce: random text, which the site's seal of its answer repeats
    - receipt: the coordinator's newest receipt for this site's ledger, as JSON; "" if it has none
    - attempt: number of the attempt at the round, from 1; 0, which is left out of the fields, if
      the round has no attempts
    - beside: `digest_beside` of the arrays and the table that are sent with the order"""
    fields = {"plan": plan, "round": round_, "nonce": nonce, "receipt": receipt, "beside": beside}
    fields |= {"attempt": attempt} if attempt else {}
    return fields | {"signature": key.sign(b"fedtune order\0" + canonical(fields))}


def check_order(
    message: Mapping[str, Any],
    public: str,
    arrays: Mapping[str, bytes],
    table: Mapping[str, Any] | None = None,
) -> None:
    """Verify an order, then the arrays and the table that came with it.

    - message: the order's fields as they were received (`order`)
    - public: the public key of the coordinator that signed the plan
    - arrays: the unparsed bytes of each array that came with the order, by name
    - table: the table of texts that came with it, such as the set of sites; None if there was none

    Errors: SealError if order, arrays or table are not from the coordinator `public`."""
    fields = {name: message.get(name) for name in ("plan", "round", "nonce", "receipt", "beside")}
    fields |= {"attempt": message["attempt"]} if "attempt" in message else {}
    signed = b"fedtune order\0" + canonical(fields)
    if not verifies(public, signed, str(message.get("signature"))):
        raise SealError("the order is not signed by the coordinator that sent the plan")
    if fields["beside"] != digest_beside(arrays, table):
        raise SealError("the arrays or the table beside the order are not those that were signed")


def sign_plan(key: SigningKey, digest: str) -> dict[str, str]:
    """Sign a plan's digest. Return {"coordinator": the coordinator's public key, "signature"},
    which are sent with the plan."""
    return {"coordinator": key.public, "signature": key.sign(b"fedtune plan\0" + digest.encode())}


def check_plan(message: Mapping[str, Any], digest: str) -> str:
    """Verify the signature under a plan, and return the public key of the coordinator that signed
    it. message: the fields as they were received; digest: the plan's digest. Errors: SealError."""
    public, signature = str(message.get("coordinator")), str(message.get("signature"))
    if not verifies(public, b"fedtune plan\0" + digest.encode(), signature):
        raise SealError("the plan is not signed by the coordinator that it names")
    return public


def sign_end(key: SigningKey, digest: str) -> dict[str, Any]:
    """Sign, with the coordinator's key, that the study of a plan has ended. Return the fields that
    say so, "finished" and "finished_signature", which are sent with the plan. digest: the plan's
    digest."""
    return {"finished": True, "finished_signature": key.sign(_end(digest))}


def check_end(message: Mapping[str, Any], digest: str, public: str) -> None:
    """Verify that the coordinator `public` signed that the study of this plan has ended. message:
    the fields as they were received, with "finished_signature"; digest: the plan's digest.

    Errors: SealError."""
    if not verifies(public, _end(digest), str(message.get("finished_signature"))):
        raise SealError(
            "the message that the study has ended is not signed by the coordinator of its plan"
        )


def _end(digest: str) -> bytes:
    return b"fedtune end\0" + digest.encode()


def receipt(key: SigningKey, statement: Mapping[str, Any]) -> dict[str, Any]:
    """Countersign a site's statement about its ledger. statement: {"token": text}, which the
    coordinator cannot read. Return the receipt: "token", "coordinator" (the public key) and
    "countersignature"."""
    fields = {"token": statement.get("token")}
    return fields | {
        "coordinator": key.public,
        "countersignature": key.sign(b"fedtune receipt\0" + canonical(fields)),
    }
