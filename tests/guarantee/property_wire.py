"""What an observer of the wire sees of a site; and the peers of one that shares noise, played here.

Nobody's words can be opened without those of the others, so two peers mask zeros: what is opened
then is the site's own noised sum."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedtune.core.secagg.masks import mask, public_of
from fedtune.core.secagg.statement import Ready, parse
from fedtune.core.wire.arrays import bodies
from fedtune.officer.withdraw import Withdrawal
from fedtune.server.masked_sum import MaskedSum
from tests import chance
from tests.guarantee.property_plans import PEERS, SIZE

ELSEWHERE = ("key", "signature", "set")  # of keys that are other ones in either world
UNIFORM = chance.deviations(10**7)  # of a count of fair bits, in each answer of a long search


def facts(reply: Message) -> dict[str, Any]:
    """All that an observer of the wire sees, but for keys, signatures, the ledger's token and
    masked words, which are other ones each time: of these the size."""
    if reply.has_error():
        return {"error": f"{reply.error.code} {reply.error.reason}"}
    found: dict[str, Any] = {"type": reply.metadata.message_type}
    masked = found["type"] == "train.masked"
    for name, record in reply.content.items():
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                found[f"{name}/{key}"] = f"{array.dtype} {tuple(array.shape)}"
            for key, body in bodies(record).items():
                found[f"{name}/{key} bytes"] = len(body) if masked else body
        elif isinstance(record, ConfigRecord):
            for key, value in record.items():
                found[f"{name}.{key}"] = value if key not in ELSEWHERE else len(str(value))
        else:
            found[name] = type(record).__name__
    if header := found.get("site.header"):
        header = json.loads(header)
        header["ledger"]["token"] = len(header["ledger"]["token"])
        if found["type"] in ("train.ready", "train.masked"):
            header["body"] = len(header["body"])
        found["site.header"] = header
    if text := found.get("site.ready"):
        ready = parse(text)
        found["site.ready"] = (ready.draw, ready.site, ready.size, ready.noise, len(text))
    return found


def receipt_facts(withdrawal: Withdrawal) -> dict[str, Any]:
    """What a patient takes away, file name and all, but for the time and for whose it is; of keys,
    hashes and signatures, which are other ones each time, the size."""

    def sized(text: str) -> str:
        return re.sub(r"[0-9a-f]{16,}", lambda found: f"<{len(found[0])}>", text)

    own = {key: value for key, value in withdrawal.receipt.items() if key != "time"}
    return {"receipt": sized(json.dumps(own)), "file": sized(withdrawal.receipt_file.name)}


def set_with(mine: Ready, other: int = 0) -> dict[Ready, X25519PrivateKey]:
    """The peers' statements about the draw of `mine`, whenever they are asked, and their keys;
    other: those of another set."""
    found = {}
    for number, peer in enumerate(PEERS):
        seed = hashlib.sha256(f"{number} {mine.draw} {other}".encode()).digest()
        key = X25519PrivateKey.from_private_bytes(seed)
        own = (SIZE, peer.public, public_of(key), mine.noise)
        stated = Ready(mine.draw, f"peer-{number}", *own)
        found[stated.signed(peer)] = key
    return found


def opened(reply: Message, mine: Ready, peers: dict[Ready, X25519PrivateKey]) -> np.ndarray:
    """What the words of `reply` open to. Errors: AssertionError where they are not uniform."""
    words = reply.content["update"]["values"].numpy()
    bits = 8 * words.dtype.itemsize
    changes = words ^ (words << words.dtype.type(1))  # of neighbouring bits: a small number has few
    ones, fair = int(np.unpackbits(changes.view(np.uint8)).sum()), words.size * bits
    assert abs(ones - fair / 2) <= UNIFORM * fair**0.5 / 2, "words that are not masked"
    total = MaskedSum(statements := [mine, *peers], words.size, bits)
    total.add(mine.site, words)
    for peer, key in peers.items():
        zeros = np.zeros(words.size, np.int64)
        total.add(peer.site, mask(zeros, key, peer, statements, bits))
    return total.open()
