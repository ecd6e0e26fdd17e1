"""Sign and check the statements of ready sites, and check the set of sites whose sum is opened."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedtune.core.errors import InputError
from fedtune.core.wire.keys import SigningKey, canonical, verifies

PURPOSE, SET = b"fedtune ready\0", b"fedtune set\0"
LONGEST = 2_000  # characters of one statement
MOST = 10_000  # sites of one set
# The most numbers that a site masks for all sites together that it has not pinned: 20 s of work on
# one core (32-bit words, an Intel Xeon with AES). A coordinator can make up any number of sites.
MOST_NUMBERS = 10**10
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY, _DIGEST = re.compile(r"[0-9a-f]{64}"), re.compile(r"sha256:[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_MOST_UNITS = 10**10
_ANY = X25519PrivateKey.from_private_bytes(bytes(32))


class StatementError(InputError):
    """The statement of a ready site, or a set of such statements, is malformed, or does not fit the
    attempt at a round that a site takes part in."""


@dataclass(frozen=True)
class Draw:
    """Which draw (a site's noised sum for one attempt at a round) a statement is about.

    - plan: digest of the plan
    - round, attempt: number of the round, and of the attempt at it, both from 1
    - adapter: digest of the adapter that the coordinator sent"""

    plan: str
    round: int
    attempt: int
    adapter: str

    @property
    def label(self) -> str:
        """The adapter's digest and the attempt's number as one text, "DIGEST:ATTEMPT". The ledger
        charges each such text separately."""
        return f"{self.adapter}:{self.attempt}"


@dataclass(frozen=True)
class Ready:
    """A site's signed statement that its noised sum for `draw` is complete.

    - draw: the plan, round, attempt and adapter of the sum
    - site, size: the site's name and declared size
    - signing: the site's public signing key (hexadecimal)
    - masking: the public X25519 key (hexadecimal) that the site made for this draw only
    - noise: σ of the noise that the site added, in multiples of the clipping norm C; 0 without
      privacy
    - signature: by the signing key, over all other fields; "" until the statement is signed

    All of it is public: σ follows from the plan, and the grid of the sum from σ."""

    draw: Draw
    site: str
    size: int
    signing: str
    masking: str
    noise: float = 0.0
    signature: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        return {
            **asdict(self.draw),
            "site": self.site,
            "size": self.size,
            "noise": self.noise,
            "signing": self.signing,
            "masking": self.masking,
        }

    def signed(self, key: SigningKey) -> Ready:
        """Return a copy of this statement that `key` has signed."""
        return replace(self, signature=key.sign(PURPOSE + canonical(self.fields)))

    def text(self) -> str:
        """Return the statement as canonical JSON, with its signature."""
        return canonical({**self.fields, "signature": self.signature}).decode()


def parse(text: Any) -> Ready:
    """Parse a statement, and verify its signature. Errors: StatementError if the statement is
    malformed, not in canonical form, or not signed by the key that it names, or if no secret can be
    shared with its masking key."""
    try:
        if not isinstance(text, str) or len(text) > LONGEST:
            raise ValueError
        fields = json.loads(text)
        if canonical(fields).decode() != text:
            raise ValueError
        signature = fields.pop("signature")
        draw = Draw(**{name: fields.pop(name) for name in ("plan", "round", "attempt", "adapter")})
        ready = Ready(draw, signature=signature, **fields)
        _check_fields(ready)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise StatementError("a statement of a ready site is malformed") from None
    if not verifies(ready.signing, PURPOSE + canonical(ready.fields), ready.signature):
        raise StatementError("a statement of a ready site is not signed by the key that it names")
    if not _gives_a_secret(ready.masking):
        raise StatementError("no secret can be shared with a ready site's masking key")
    return ready


def _gives_a_secret(masking: str) -> bool:
    """Return whether a masking key can be used to share a secret. A point of low order cannot: with
    any other key it gives the secret zero, which everybody knows."""
    try:
        _ANY.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(masking)))
    except ValueError:
        return False
    return True


def _check_fields(ready: Ready) -> None:
    """Check the types of a statement's fields. Errors: ValueError, TypeError."""
    texts = (
        (ready.site, _NAME),
        (ready.signing, _KEY),
        (ready.masking, _KEY),
        (ready.draw.plan, _DIGEST),
        (ready.draw.adapter, _DIGEST),
        (ready.signature, _SIGNATURE),
    )
    if not all(pattern.fullmatch(text) for text, pattern in texts):
        raise ValueError
    numbers = (ready.draw.round, ready.draw.attempt, ready.size)
    if not all(type(number) is int and 1 <= number <= _MOST_UNITS for number in numbers):
        raise ValueError
    if type(ready.noise) is not float or not 0 <= ready.noise < math.inf:
        raise ValueError


def parse_set(text: Any) -> list[Ready]:
    """Parse the statements of a set, and verify their signatures. text: a JSON list, whose items
    are the statements' JSON texts. Errors: StatementError."""
    try:
        if not isinstance(text, str) or len(text) > MOST * (LONGEST + 4):
            raise ValueError
        listed = json.loads(text)
        if not isinstance(listed, list) or not 1 <= len(listed) <= MOST:
            raise ValueError
    except (ValueError, RecursionError):
        raise StatementError("the set of ready sites is malformed") from None
    return [parse(item) for item in listed]


def set_text(statements: Sequence[Ready]) -> str:
    """Return a set of statements as a JSON list of the statements' JSON texts, ordered by the
    sites' names."""
    return json.dumps([ready.text() for ready in sorted(statements, key=lambda r: r.site)])


def set_digest(statements: Sequence[Ready]) -> str:
    """Return one digest for a set of signed statements: a sha256 (hexadecimal) that does not depend
    on their order."""
    total = hashlib.sha256(SET)
    for text in sorted(ready.text() for ready in statements):
        total.update(f"{len(text)}:{text}".encode())
    return total.hexdigest()


def check_set(
    statements: Sequence[Ready],
    mine: Ready,
    pinned: Collection[str],
    at_least: int,
    numbers: int,
) -> None:
    """Check that a site may mask its sum for a set of ready sites.

    - statements: the statements of the set, each with a signature that `parse` verified
    - mine: the statement that this site signed for its draw
    - pinned: signing keys (hexadecimal) of the other sites that this site trusts: policy.peers
    - at_least: the plan's strategy.min_sites
    - numbers: how many numbers the sum has

    The rules are:

    - The set holds this site's statement `mine`, as it was signed.
    - Plan, round, attempt and adapter of every statement are those of `mine`.
    - The noise of every statement is that of `mine`: ε relies on it, and sums on grids for
      different noise cannot be added.
    - Each name, signing key and masking key occurs once.
    - At least `at_least` signing keys are this site's own or `pinned`.
    - The other keys are few enough (`check_work`).

    Errors: StatementError, which names the rule."""
    if mine not in statements:
        raise StatementError("the set of ready sites does not hold this site's own statement")
    if any(ready.draw != mine.draw for ready in statements):
        raise StatementError("the set of ready sites holds a statement about another draw")
    if any(ready.noise != mine.noise for ready in statements):
        raise StatementError(
            "a site of the set states another noise than this site adds",
            "the same noise at every site, since it follows from the plan",
            "compare the releases of fedtune that the sites run",
        )
    for field, what in (("site", "name"), ("signing", "signing key"), ("masking", "masking key")):
        if len({getattr(ready, field) for ready in statements}) < len(statements):
            raise StatementError(f"two of the ready sites have the same {what}")
    signing = [ready.signing for ready in statements]
    check_pinned(signing, mine.signing, pinned, at_least)
    check_work(signing, mine.signing, pinned, numbers)


def check_pinned(
    signing: Collection[str], own: str, pinned: Collection[str], at_least: int
) -> None:
    """Check that this site pins enough of the sites of a set, itself included.

    - signing: the public signing keys (hexadecimal) of all sites of the set; a key that is listed
      twice counts once
    - own: this site's public signing key, which counts only if `signing` has it
    - pinned: the keys of the other sites that this site trusts: policy.peers
    - at_least: how many of `signing` must be `own` or `pinned`: the plan's strategy.min_sites

    Errors: StatementError."""
    known = len({*signing} & {*pinned, own})
    if known < at_least:
        raise StatementError(
            f"{known} of the {len({*signing})} sites are pinned here, this site included",
            f"at least strategy.min_sites = {at_least}",
            "compare the peers' fingerprints, then list their keys in policy.peers",
        )


def check_work(signing: Collection[str], own: str, pinned: Collection[str], numbers: int) -> None:
    """Check that the sites of a set that this site has not pinned cost it at most MOST_NUMBERS
    numbers of masks together. Sites that it has pinned are not counted.

    - signing: the public signing keys (hexadecimal) of all sites of the set
    - own: this site's public signing key
    - pinned: the keys of the other sites that this site trusts: policy.peers
    - numbers: how many numbers the sum has, for each of which each site costs one number of a mask

    Errors: StatementError."""
    others = len({*signing} - {*pinned, own})
    if others * numbers > MOST_NUMBERS:
        raise StatementError(
            f"{others} of the sites are not among those that are pinned here: too many, since this "
            f"site would have to mask {numbers:,} numbers for each of them",
            f"at most {MOST_NUMBERS // max(1, numbers):,} such sites",
            "compare the peers' fingerprints, then list their keys in policy.peers",
        )
