"""Statements, sets and replies as nobody sends them: each is refused in order."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtune.core.config import noise_shares
from fedtune.core.dp.shared_noise import own_sigma
from fedtune.core.secagg import masks
from fedtune.core.secagg.statement import Draw, Ready, StatementError, parse, parse_set, set_text
from fedtune.core.wire import seal
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.codec import VALUES
from fedtune.core.wire.keys import SigningKey
from fedtune.server.admission import Tally
from fedtune.server.exchange import Reply
from fedtune.server.orders import Answer
from fedtune.server.secure_round import SecureRound
from fedtune.strategies.fedavg import FedAvg
from tests.fuzz.messages import TEXTS, Forge
from tests.secagg.unit_sites import DIMENSION, study

DIGEST = "sha256:" + "0" * 64
SHORT, LONG = 3_000, 200_000
KEY = SigningKey()
WANTED = seal.Header(DIGEST, 1, "", "a", KEY.public, "nonce", "", {})


def stated(key: SigningKey, name: str = "a", **changes: Any) -> Ready:
    at = Draw(**{"plan": DIGEST, "round": 1, "attempt": 1, "adapter": DIGEST, **changes})
    return Ready(at, name, 10, key.public, masks.public_of(masks.new_key())).signed(key)


def spoilt(text: str, forge: Forge) -> Any:
    """A text with something changed, or another thing altogether."""
    luck, at = forge.random.random(), forge.random.randrange(len(text))
    if luck < 0.3:
        return (
            text[:at] + forge.random.choice(['"', "{", "0", " ", "ε", "\x00", "\ud800"]) + text[at:]
        )
    if luck < 0.5:
        return text[:at] + text[at + forge.random.randint(1, 40) :]
    if luck < 0.6:
        return forge.random.choice([*TEXTS, *(f"[{t}]" for t in TEXTS)])
    try:
        fields = json.loads(text)
    except ValueError:
        return forge.value()
    fields = fields if isinstance(fields, dict) else {"0": fields}
    name = forge.random.choice(list(fields))
    value = forge.value()
    fields[name] = value.decode("latin-1") if isinstance(value, bytes) else value
    return json.dumps(fields) if luck < 0.9 else forge.value()


def read_nonsense(count: int, seed: int) -> None:
    forge = Forge(WANTED, seed)
    said = [stated(SigningKey(), name) for name in ("a", "b", "c")]
    texts = {said[0].text(): parse, set_text(said): parse_set}
    for number in range(count):
        text, read = forge.random.choice(list(texts.items()))
        bad = spoilt(text, forge)
        try:
            got = read(bad)
            assert bad == text or got == read(text), "another statement was taken"
        except StatementError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}, text {number}") from error


def test_no_statement_or_set_ends_in_anything_but_a_refusal() -> None:
    read_nonsense(SHORT, 1)


@pytest.mark.long
def test_many_statements_and_sets() -> None:
    read_nonsense(LONG, 2)


# ---------------------------------------------------------------------- the coordinator's readers


def coordinator(forge: Forge) -> tuple[SecureRound, Any, Any]:
    """The coordinator in the middle of a round, and its two readers."""
    from collections import Counter

    from fedtune.server.masked_sum import MaskedSum

    made = study()
    adapter = {"u": np.zeros(DIMENSION, np.float32)}
    keys, sizes = {"a": forge.key.public}, {"a": 10}
    progress = SimpleNamespace(
        **{"study": made, "adapter": adapter, "events": {}, "keys": keys, "sizes": sizes},
        **{"receipts": {}, "attempt": {"round": 1, "number": 1, "statements": {}}},
    )
    roster = SimpleNamespace(down=Counter(), up=Counter(), refused={}, is_stranger=lambda *_: False)
    sigma = made.privacy.noise_multiplier  # type: ignore[union-attr]
    mechanism = SimpleNamespace(noise_multiplier=sigma)
    limits = SimpleNamespace(of=lambda *_: {"terms": None}, mechanism=lambda _: mechanism)
    parts = (SimpleNamespace(key=KEY), limits, FedAvg(), None, lambda: None, lambda *_: None, None)
    secure = SecureRound(progress, roster, *parts)  # type: ignore[arg-type]
    draw = Draw(DIGEST, 1, 1, DIGEST)
    own = own_sigma(sigma, noise_shares(made))
    ready = Ready(draw, "a", 10, forge.key.public, masks.public_of(masks.new_key()), own)
    ready = ready.signed(forge.key)
    words = MaskedSum([ready], DIMENSION, 32)
    return secure, (ready, draw), words


def honest(forge: Forge, ready: Ready, kind: str) -> RecordDict:
    arrays, said = ArrayRecord(), {"ready": ready.text()}
    if kind == "masked":
        array = Array(np.arange(DIMENSION, dtype=np.uint32))
        arrays, said = ArrayRecord({VALUES: array}), {"set": "chosen"}
    said |= {"name": "a", "status": kind, "reason": "", "events": "[]"}
    return sealed(forge, arrays, said, kind)


def sealed(forge: Forge, arrays: ArrayRecord, said: dict[str, Any], kind: str) -> RecordDict:
    texts = {k: v for k, v in said.items() if isinstance(v, str) and v.isprintable()}
    head = WANTED.__class__(**{**vars(WANTED), "body": seal.body_digest(bodies(arrays), texts)})
    head = head.__class__(**{**vars(head), "ledger": {"token": "00"}})
    record = ConfigRecord(texts | seal.seal(forge.key, head))
    return RecordDict({"update" if kind == "masked" else "ready": arrays, "site": record})


def hear_nonsense(count: int, seed: int) -> int:
    forge, taken = Forge(WANTED, seed, "float32"), 0
    for number in range(count):
        secure, (ready, draw), words = coordinator(forge)
        kind = forge.random.choice(["ready", "masked"])
        content = honest(forge, ready, kind)
        how = forge.random.random()
        if how < 0.2:
            content = forge.anything()
        elif how < 0.9:
            record = "update" if kind == "masked" else "ready"
            arrays, site = content[record], dict(content["site"])
            said = {k: v for k, v in site.items() if k not in seal.OUTSIDE}
            name = forge.random.choice([*said, "more"])
            said[name] = spoilt(str(said.get(name) or "x"), forge) if how < 0.6 else said.get(name)
            if how >= 0.6:
                arrays = ArrayRecord({forge.random.choice([VALUES, "x"]): forge.array()})
            said = {k: v for k, v in said.items() if isinstance(v, str)}
            try:
                content = sealed(forge, arrays, said, kind)
            except (seal.SealError, ValueError):
                continue  # a site cannot seal that
        answer, tally = Answer("a", Reply(2, content), WANTED, 1), Tally(1)
        try:
            if kind == "ready":
                status = secure._take_ready(tally, draw, answer)
                said_so = secure.progress.attempt["statements"]
                assert (status == "ready") == bool(said_so)
                assert not said_so or parse(said_so["a"]).draw == draw
            else:
                status = secure._take_words(tally, words, {}, "chosen", answer)
                assert (status == "masked") == (not words.missing)
        except Exception as error:
            raise AssertionError(f"seed {seed}, reply {number} ({kind})") from error
        assert status in ("ready", "masked", "failed", "dropped", "refused", "unprepared", "void")
        taken += status in ("ready", "masked")
    return taken


def test_the_coordinator_survives_replies_of_either_kind() -> None:
    assert 50 < hear_nonsense(1_000, 1) < 700


@pytest.mark.long
def test_the_coordinator_survives_many() -> None:
    assert hear_nonsense(LONG // 4, 2)
