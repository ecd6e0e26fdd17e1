"""Messages that lie: each is refused with its own reason, nothing is counted, memory stays flat.

All of it in each encoding that a plan can ask for: `wire` says in which one messages travel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, RecordDict

from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire import seal
from fedtune.core.wire.codec import SCALES
from fedtune.core.wire.keys import SigningKey, canonical, verifies
from tests.server.fakes import zeros
from tests.wire.hostile_kit import (
    EVENTS,
    KEY,
    LIES,
    body_of,
    changed,
    honest,
    judge,
    message,
    npy,
    scaled,
    wire,
)

pytestmark = pytest.mark.usefixtures("_encoded")


def test_the_honest_message_is_taken():
    got = judge(honest())
    assert got.status == "trained"
    assert all((a == np.float32(0.5)).all() and a.dtype == np.float32 for a in got.update.values())


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_dropped_with_its_own_reason(lie: str):
    made, reason = LIES[lie]
    got = judge(made())
    assert got.status == "dropped" and reason in got.reason
    assert got.update == {} and got.events == [] and got.ledger == {}


def test_every_lie_has_a_reason_of_its_own():
    reasons = [judge(made()).reason for made, _ in LIES.values()]
    same = {r for r in reasons if reasons.count(r) > 1}
    # Array too many or few; a bad header; no number; two other shapes; two other types.
    assert len(same) <= 5


BLOCKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "a scale too many": lambda s: np.append(s, np.float32(1)),
    "a scale too few": lambda s: s[1:],
    "a scale of zero": lambda s: s * 0,
    "a scale below zero": lambda s: -s,
    "a million scales": lambda s: np.ones(10**6, np.float32),
}


@pytest.mark.parametrize("how", BLOCKS)
def test_a_message_does_not_say_how_many_blocks_it_has(how: str):
    if wire.encoding != "float32":
        assert judge(scaled(BLOCKS[how])).status == "dropped"


def test_scales_that_say_another_shape_inside_are_dropped():
    if wire.encoding != "float32":
        inside = npy(np.ones((1, 2), np.float32))
        assert "scale" in judge(changed(SCALES, body_of(inside))).reason


def test_rounding_is_no_reason_to_drop_an_honest_update():
    """A norm at the bound is beyond it once rounded; by more than rounding, it is too long."""
    arrays = {n: np.full_like(a, 0.6 / 127) for n, a in zeros().items()}  # int8 rounds these up,
    for array in arrays.values():
        array.flat[0] = 1 + 0.6 / 1024  # and fp16 this

    def length(found: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in found.values())))

    sent, exact = message(wire.record(arrays)), length(arrays)
    got = judge(sent, longest=exact)
    assert got.status == "trained"
    assert wire.encoding == "float32" or length(got.update) > exact
    assert "is longer" in judge(sent, longest=exact / 1.07).reason


def test_a_swapped_body_is_dropped():
    one, other = honest(), message(wire.record(zeros()))
    swapped = RecordDict({"update": other["update"], "site": one["site"]})
    assert "sealed for another body" in judge(swapped).reason
    renamed = ArrayRecord({name + "2": array for name, array in one["update"].items()})
    assert judge(RecordDict({"update": renamed, "site": one["site"]})).status == "dropped"


def test_the_log_beside_the_arrays_is_sealed_too():
    """A step more, or more noise than ran, would change the ε that the report states."""
    content = honest()
    content["site"]["events"] = EVENTS.replace('"steps":1', '"steps":2')
    assert "sealed for another body" in judge(content).reason


def test_one_signature_has_one_spelling():
    body = b"said"
    signature = KEY.sign(body)
    assert verifies(KEY.public, body, signature)
    for other in (signature.upper(), signature[:64] + " " + signature[64:], signature + " "):
        assert not verifies(KEY.public, body, other)
    assert not verifies(KEY.public.upper(), body, signature)


@pytest.mark.parametrize(
    "header",
    ['{"a":1,"a":2}', "[1]", "{}", "1e999", "NaN", "[" * 5000, '"\\ud800"', '{"ledger":[]}', ""],
)
def test_a_signed_header_that_is_no_header_is_dropped(header: str):
    """The site itself may be hostile: what it signed is no better than what it sent."""
    content = honest()
    content["site"]["header"] = header
    content["site"]["signature"] = KEY.sign(b"fedtune update\0" + header.encode())
    assert judge(content).status == "dropped"


def test_a_name_given_twice_in_a_header_is_dropped():
    content = honest()
    text = str(content["site"]["header"]).replace('"round":3', '"round":2,"round":3')
    content["site"]["header"] = text
    content["site"]["signature"] = KEY.sign(b"fedtune update\0" + text.encode())
    assert "malformed" in judge(content).reason


TOKENS: dict[str, Any] = {
    "nested": [[["a"]]],
    "a number": 7,
    "null": None,
    "an object": {"token": "00"},
    "empty": "",
    "overlong": "0" * 4097,
    "upper case": "AB",
    "not hex": "0g",
    "with a line's end": "00\n",
}
STATEMENTS: dict[str, Any] = {
    **{name: {"token": token} for name, token in TOKENS.items()},
    "nothing": {},
    "more": {"token": "00", "seq": 1},
    "a text": "token",
}


def stating(ledger: Any) -> RecordDict:
    """An honest message, but for what its sealed header says of the site's ledger."""
    content = honest()
    header = json.loads(str(content["site"]["header"])) | {"ledger": ledger}
    signed = canonical(header)
    content["site"]["header"] = signed.decode()
    content["site"]["signature"] = KEY.sign(b"fedtune update\0" + signed)
    return content


@pytest.mark.parametrize("ledger", STATEMENTS.values(), ids=STATEMENTS)
def test_a_ledgers_statement_that_is_no_token_is_dropped(ledger: Any):
    """The coordinator stores it for all of its studies, in one file, and signs it."""
    got = judge(stating(ledger))
    assert (got.status, got.reason) == ("dropped", "the header of its update is malformed")
    assert not got.ledger


def test_a_token_as_a_ledger_gives_it_is_taken(tmp_path: Path):
    statement = Ledger(tmp_path).head_statement("41:" + "a" * 64)
    assert judge(stating(statement)).ledger == statement


def test_without_the_check_a_nested_token_is_countersigned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(seal, "_is_statement", lambda ledger: isinstance(ledger, dict))
    got = judge(stating({"token": [[["a"]]]}))
    assert got.status == "trained"
    assert seal.receipt(SigningKey(), got.ledger)["token"] == [[["a"]]]
