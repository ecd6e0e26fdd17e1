"""No message crashes either side, and none is counted that is not valid.

Short here; `make fuzz` (marker `long`) sends a million. A failure names the seed and the number of
the message, which together make it again."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

import fedtune.core.vault.answers
import fedtune.launch.in_one_process
from fedtune.core.config import Encoding
from fedtune.core.wire import seal
from fedtune.core.wire.arrays import WireError, bodies, unpack_arrays
from fedtune.core.wire.codec import GROWTH, decode, encode
from fedtune.core.wire.keys import SigningKey
from fedtune.flower import api
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record
from fedtune.server.admission import Outcome, Roster, outcome, plan_message
from fedtune.server.bound import Terms
from fedtune.server.exchange import UNREADABLE, Reply
from tests.depth import long_but
from tests.fuzz.messages import Forge
from tests.server.fakes import EVENT, SHAPES, FakeSite, make_study, zeros

STUDY = make_study()
COORDINATOR = SigningKey()
WANTED = seal.Header(STUDY.digest, 1, "", "a", COORDINATOR.public, "nonce", "", {})
TERMS = Terms(EVENT["q"], EVENT["sigma"], 1.0, 1, steps=4, divisor=25.0)
OUTCOMES = {"trained", "refused", "unprepared", "failed", "dropped"}
ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "int8")
SHORT, LONG = 20_000, 1_000_000


class Coordinator:
    """Everything of the coordinator that reads what a site sent."""

    def __init__(self, forge: Forge) -> None:
        self.forge, self.counted = forge, 0
        self.roster = self.fresh()

    def fresh(self) -> Roster:
        plan = RecordDict()
        return Roster(
            InProcessGrid([], fedtune.launch.in_one_process.app),
            STUDY,
            plan,
            {},
            {},
            lambda *_: None,
        )

    def hear(self, content: RecordDict | None) -> None:
        got = self.judge(content)
        assert got.status in OUTCOMES
        if got.status == "trained":
            self.counted += 1
            assert {n: a.shape for n, a in got.update.items()} == {
                n: a.shape for n, a in zeros().items()
            }
            total = sum(float((a.astype(np.float64) ** 2).sum()) for a in got.update.values())
            longest = 10 * GROWTH[self.forge.encoding]
            assert total**0.5 <= longest and all(a.dtype == np.float32 for a in got.update.values())
            assert all(e["sigma"] >= 1.4 and e["records"] == 1 for e in got.events)
        else:
            assert got.reason and len(got.reason) <= 400 and not got.update and not got.events
        self.roster._on_admission_reply(Reply(2, content, "" if content else "no answer"))
        assert len(self.roster.nodes) <= 1
        if len(self.roster.refused) > 50:
            self.roster = self.fresh()

    def judge(self, content: RecordDict | None) -> Outcome:
        key = self.forge.key.public
        reply = Reply(2, content, "" if content is not None else "no answer")
        limits = {"terms": TERMS, "longest": 10.0, "encoding": self.forge.encoding}
        return outcome(reply, zeros(), True, [], key, WANTED, **limits)


def read(body: bytes) -> RecordDict | None:
    """As the coordinator's exchange reads it: what Flower cannot read is that node's failure."""
    try:
        message = api.message_from_proto(api.ProtoMessage.FromString(body))
        return None if message.has_error() else message.content
    except UNREADABLE:
        return None


def fuzz(count: int, seed: int, encoding: Encoding) -> dict[str, float]:
    """Messages per second, and how many of the untouched ones were taken."""
    forge = Forge(WANTED, seed, encoding)
    side, kinds, honest = Coordinator(forge), forge.kinds(), 0
    started = time.monotonic()
    for number in range(count):
        make = kinds[forge.random.randrange(len(kinds))]
        try:
            made = make()
            content = read(made) if isinstance(made, bytes) else made
            honest += make == forge.honest
            before = side.counted
            side.hear(content)
            assert make != forge.honest or side.counted == before + 1
            for record in content.array_records.values() if content is not None else ():
                with suppress(WireError):
                    decode(unpack_arrays(record), SHAPES)
        except Exception as error:
            raise AssertionError(f"seed {seed}, message {number} ({make.__name__})") from error
    seconds = time.monotonic() - started
    return {"per_second": count / seconds, "honest": honest, "counted": side.counted}


@pytest.mark.parametrize("encoding", long_but(["int8"], ENCODINGS))
def test_the_coordinator_survives(encoding: Encoding):
    found = fuzz(SHORT // 2, 1, encoding)
    print(f"{found['per_second']:.0f} messages/s, {found['counted']} of {SHORT // 2} valid")
    assert found["honest"] <= found["counted"] < SHORT / 4


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_the_coordinator_survives_a_million(seed: int):
    found = fuzz(LONG // 10, 100 + seed, ENCODINGS[seed % 3])
    print(f"{found['per_second']:.0f} messages/s")


# ------------------------------------------------------------------------------------- the site


class CarefulSite(FakeSite):
    """What reaches the work must have been checked on the way."""

    def prepare(self, study: Any, frozen: Any, coordinator: str) -> Any:
        assert study.digest == STUDY.digest and coordinator == COORDINATOR.public
        return super().prepare(study, frozen, coordinator)

    def train(self, digest: str, round_: int, adapter: Any, receipt: str) -> Any:
        assert (digest, round_) == (STUDY.digest, 1)
        assert all(a.dtype == np.float32 for a in adapter.values())
        return super().train(digest, round_, adapter, receipt)


def at_a_site(
    count: int, seed: int, monkeypatch: pytest.MonkeyPatch, encoding: Encoding = "int8"
) -> float:
    """Orders and plans, honest and not, to the ClientApp of a site."""
    site = CarefulSite("a")
    monkeypatch.setattr(fedtune.core.vault.answers, "worker", lambda path: site)
    forge, grid = (
        Forge(WANTED, seed, encoding),
        InProcessGrid([Path("a")], fedtune.launch.in_one_process.app),
    )
    context = Context(1, 2, {"site": "a"}, RecordDict(), {})
    plan = plan_message(STUDY, {}, COORDINATOR)
    adapter = to_record(encode(zeros(), encoding))
    beside = seal.digest_beside(bodies(adapter))
    order = seal.order(COORDINATOR, STUDY.digest, 1, "nonce", "", beside=beside)
    started = time.monotonic()
    for number in range(count):
        kind = forge.random.choice(["query.prepare", "train", "query.evaluate"])
        content = plan if kind == "query.prepare" else None
        if content is None:
            content = RecordDict({"order": ConfigRecord(order), "adapter": adapter})
        content = _spoilt(content, forge)
        message = grid.create_message(content, kind, 2, "1")
        try:
            reply: Message = fedtune.launch.in_one_process.app(message, context)
            assert not reply.has_error()
            (said,) = (r for n, r in reply.content.items() if n in ("admission", "site"))
            assert said["status"] in OUTCOMES | {"admitted", "answered"}
        except Exception as error:
            raise AssertionError(f"seed {seed}, message {number} ({kind})") from error
    assert set(site.calls) == {1}
    return count / (time.monotonic() - started)


def _spoilt(content: RecordDict, forge: Forge) -> RecordDict:
    luck = forge.random.random()
    if luck < 0.1:
        return content
    if luck < 0.3:
        return forge.anything()
    copy = RecordDict(dict(content))
    name = forge.random.choice(list(copy))
    if luck < 0.5:
        copy[name] = forge.record()
    elif hasattr(copy[name], "items") and len(copy[name]):
        record = type(copy[name])(dict(copy[name]))
        key = forge.random.choice(list(record))
        record[key] = forge.value() if name in ("plan", "order") else forge.array()
        copy[name] = record
    return copy


def test_a_site_survives(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    caplog.set_level("ERROR")
    print(f"{at_a_site(4_000, 1, monkeypatch):.0f} messages/s")


@pytest.mark.long
def test_a_site_survives_many(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    caplog.set_level("ERROR")
    at_a_site(200_000, 2, monkeypatch)
