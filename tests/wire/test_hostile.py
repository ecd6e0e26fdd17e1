"""Messages that lie: each is refused with its own reason, nothing is counted, memory stays flat.

All of it in each encoding that a plan can ask for: `wire` says in which one messages travel."""

from __future__ import annotations

import pickle
import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedtune.config import Encoding
from fedtune.flower import api
from fedtune.flower.arrays import WireError, bodies, from_record, to_record
from fedtune.flower.grid import InProcessGrid
from fedtune.server.admission import Outcome, outcome
from fedtune.server.bound import Terms
from fedtune.server.exchange import Reply
from fedtune.wire import seal
from fedtune.wire.codec import SCALES, VALUES, encode
from fedtune.wire.keys import SigningKey, verifies
from tests.server.fakes import EVENT, SHAPES, FakeSite, make_parts, make_study, zeros

STUDY = make_study()
KEY, COORDINATOR = SigningKey(), SigningKey()
WANTED = seal.Header(STUDY.digest, 3, "sha256:b", "a", COORDINATOR.public, "nonce-1", "", {})
TERMS = Terms(EVENT["q"], EVENT["sigma"], 1.0, 1, 25.0, 4)
EVENTS = '[{"sigma":1.5,"q":0.25,"max_grad_norm":1.0,"records":1,"steps":1}]'
ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "int8")
SPELLED = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}


@dataclass
class Wire:
    """encoding: of every message of the test that runs."""

    encoding: Encoding = "float32"

    def record(self, arrays: dict[str, np.ndarray]) -> ArrayRecord:
        return to_record(encode(arrays, self.encoding))

    def numbers(self, *shape: int) -> np.ndarray:
        return np.zeros(shape, SPELLED[self.encoding])


wire = Wire()


@pytest.fixture(params=ENCODINGS, autouse=True)
def _encoded(request: pytest.FixtureRequest) -> None:
    wire.encoding = request.param


def message(record: ArrayRecord | None = None, key: SigningKey = KEY, **header: Any) -> RecordDict:
    """What an honest site sends; `record` and `header` as they are changed before sealing."""
    record = wire.record({n: a + 0.5 for n, a in zeros().items()}) if record is None else record
    said = {"name": "a", "status": "trained", "reason": "", "events": EVENTS}
    body = seal.body_digest(bodies(record), said)
    sealed = seal.seal(key, replace(WANTED, body=body, ledger={"token": "t"}, **header))
    return RecordDict({"update": record, "site": ConfigRecord(said | sealed)})


def judge(content: RecordDict, wanted: seal.Header = WANTED, longest: float = 10.0) -> Outcome:
    limits: dict[str, Any] = {"terms": TERMS, "longest": longest, "encoding": wire.encoding}
    return outcome(Reply(2, content), zeros(), True, 0, KEY.public, wanted, **limits)


def honest() -> RecordDict:
    return message()


def test_the_honest_message_is_taken():
    got = judge(honest())
    assert got.status == "trained"
    assert all((a == np.float32(0.5)).all() and a.dtype == np.float32 for a in got.update.values())


# --------------------------------------------------------------------- one lie, one reason each


def changed(name: str, change: Callable[[Array], Array]) -> RecordDict:
    record = wire.record(zeros())
    record[name] = change(record[name])
    return message(record)


def scaled(change: Callable[[np.ndarray], np.ndarray]) -> RecordDict:
    """Other scales beside honest numbers; where there are none, the numbers changed."""
    arrays = encode({n: a + 0.5 for n, a in zeros().items()}, wire.encoding)
    name = SCALES if SCALES in arrays else VALUES
    return message(to_record(arrays | {name: change(arrays[name])}))


def body_of(data: bytes) -> Callable[[Array], Array]:
    return lambda old: Array(old.dtype, old.shape, old.stype, data)


def npy(array: np.ndarray) -> bytes:
    return Array(array).data


def renamed(shape: bytes) -> bytes:
    """The body of the values, which says of itself that it has another shape."""
    small = npy(wire.numbers(10))
    return small.replace(b"(10,), }" + b" " * (len(shape) - 8), shape)


def another_encoding() -> RecordDict:
    other = ENCODINGS[(ENCODINGS.index(wire.encoding) + 1) % 3]
    return message(to_record(encode(zeros(), other)))


LIES: dict[str, tuple[Callable[[], RecordDict], str]] = {
    "another key": (lambda: message(key=SigningKey()), "not signed by the key"),
    "an earlier round": (lambda: message(round=2), "sealed for another round"),
    "another run or order": (lambda: message(nonce="nonce-0"), "sealed for another nonce"),
    "another coordinator": (lambda: message(receiver="0" * 64), "sealed for another receiver"),
    "another study": (lambda: message(plan="sha256:0"), "sealed for another plan"),
    "another base": (lambda: message(base="sha256:0"), "sealed for another base"),
    "another site": (lambda: message(site="b"), "sealed for another site"),
    "2⁶² numbers claimed": (
        lambda: changed(VALUES, body_of(renamed(b"(4611686018427387904,), }"))),
        "'values' is not plain",
    ),
    "pickle": (
        lambda: changed(VALUES, lambda o: body_of(
            pickle.dumps([0] * 60).ljust(len(o.data), b"\0")[: len(o.data)])(o)),
        "not in .npy format",
    ),
    "an object array": (
        lambda: changed(VALUES, lambda o: body_of(
            o.data.replace(SPELLED[wire.encoding].encode(), b"|O "))(o)),
        "by its header",
    ),
    "another type inside": (
        lambda: changed(VALUES, lambda o: body_of(
            o.data.replace(SPELLED[wire.encoding].encode(), other_type()))(o)),
        "'values' is not plain",
    ),
    "fp64": (
        lambda: changed(VALUES, lambda _: Array(np.zeros(10))), "'values' is not plain",
    ),
    "another encoding": (another_encoding, ""),
    "the wrong shape": (
        lambda: changed(VALUES, lambda _: Array(wire.numbers(5, 2))),
        "'values' has another shape",
    ),
    "another shape inside": (
        lambda: changed(VALUES, body_of(npy(wire.numbers(5, 2)))),
        "not as many numbers as agreed",
    ),
    "rank 4096": (
        lambda: changed(VALUES, lambda _: Array(wire.numbers(4096 * 10))),
        "'values' has another shape",
    ),
    "bytes too many": (
        lambda: changed(VALUES, lambda old: body_of(old.data + b"\0" * 4096)(old)),
        "has not the bytes of its shape",
    ),
    "an array too many": (
        lambda: message(ArrayRecord({**wire.record(zeros()), "x": Array(wire.numbers(2))})),
        "other arrays than agreed",
    ),
    "an array too few": (
        lambda: message(ArrayRecord({SCALES: Array(np.ones(1, np.float32))})),
        "other arrays than agreed",
    ),
    "NaN": (lambda: scaled(lambda s: s * np.float32(np.nan)), "not"),
    "infinity": (lambda: scaled(lambda s: s * np.float32(np.inf)), "not"),
    "too long": (lambda: scaled(lambda s: s * np.float32(1e3)), "is longer"),
}  # fmt: skip


def other_type() -> bytes:
    return b"<f2" if wire.encoding != "float16" else b"<f4"


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


# ------------------------------------------------------------------------------ bits and bytes


def on_the_wire(content: RecordDict) -> bytes:
    return bytes(api.recorddict_to_proto(content).SerializeToString())


def read(body: bytes) -> RecordDict | None:
    """As Flower reads it; None where it cannot."""
    from flwr.common.serde import recorddict_from_proto

    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(body))
    except Exception:
        return None


def same(one: RecordDict, other: RecordDict) -> bool:
    return on_the_wire(one) == on_the_wire(other)


def flips(body: bytes) -> Iterator[bytes]:
    for at in range(len(body)):
        for bit in range(8):
            yield body[:at] + bytes([body[at] ^ 1 << bit]) + body[at + 1 :]


def test_no_flipped_bit_passes():
    """Every bit of the message. What survives reads as the very same content (protobuf may spell
    one thing in several ways)."""
    original = honest()
    body, refused = on_the_wire(original), 0
    for altered in flips(body):
        content = read(altered)
        if content is not None and not same(content, original):
            got = judge(content)
            assert got.status in ("dropped", "failed", "refused", "unprepared"), got
            refused += 1
    assert refused > 4 * len(body)  # most flips are readable, so the seal had to catch them


def test_no_truncation_passes():
    original = honest()
    body = on_the_wire(original)
    for length in range(len(body)):
        content = read(body[:length])
        assert content is None or judge(content).status != "trained"


def test_a_name_given_twice_counts_as_what_was_signed_or_not_at_all():
    proto = api.recorddict_to_proto(honest())
    evil = api.recorddict_to_proto(message(wire.record({n: a + 9 for n, a in zeros().items()})))
    for first in (True, False):
        both = ProtoRecordDict()
        both.CopyFrom(proto)
        (arrays,) = (i for i in both.items if i.key == "update")
        (others,) = (i for i in evil.items if i.key == "update")
        extra = [others.array_record.items[0], arrays.array_record.items[0]]
        arrays.array_record.items[0].CopyFrom(extra[0 if first else 1])
        arrays.array_record.items.append(extra[1 if first else 0])
        got = judge(read(both.SerializeToString()) or RecordDict())
        if got.status == "trained":
            assert all((a == 0.5).all() for a in got.update.values())
        else:
            assert "another body" in got.reason


def test_memory_stays_flat_under_claims():
    """Bodies that claim up to 2⁶² numbers: less than 1 MB is ever held for them."""
    contents = [made() for made, _ in LIES.values()]
    for n in (10**3, 2**20, 2**31, 2**40, 2**62):
        body = renamed(f"({n},), }}".encode())
        record = wire.record(zeros())
        record[VALUES] = Array(wire.encoding, (n,), "numpy.ndarray", body)
        contents += [message(record), changed(VALUES, body_of(body))]
    judge(contents[0])
    tracemalloc.start()
    for content in contents:
        assert judge(content).status == "dropped"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_site_reads_what_it_is_sent_as_strictly():
    generator = random.Random(5)
    body = npy(wire.numbers(3, 2))
    for _ in range(3_000):
        altered = bytearray(body)
        for _ in range(generator.randint(1, 4)):
            altered[generator.randrange(len(altered) - 6)] = generator.randrange(256)
        record = ArrayRecord({"a": Array(wire.encoding, (3, 2), "numpy.ndarray", bytes(altered))})
        try:
            (array,) = from_record(record).values()
            assert array.size == 6 and array.dtype.name == wire.encoding
        except WireError:
            pass


# -------------------------------------------------------------------------------- whole rounds


class Replayer(InProcessGrid):
    """A network that keeps every answer and can put an old one in a new one's place."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.old: list[RecordDict] = []
        self.swap: Callable[[str, list[RecordDict]], RecordDict | None] = lambda name, old: None
        self.twice = False

    def pull_messages(self, message_ids: Any) -> Iterator[Message]:
        for reply in super().pull_messages(message_ids):
            if not reply.has_error() and "update" in reply.content:
                new = self.swap(str(reply.content["site"]["name"]), self.old)
                self.old.append(reply.content)
                if new is not None:
                    reply.content = new
            yield reply
            if self.twice:
                yield reply


def replayed(trial: Any, swap: Any, *, twice: bool = False) -> tuple[Any, dict[str, Any]]:
    run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c"))
    grid = Replayer([Path(s.name) for s in run.sites])
    grid.swap, grid.twice = swap, twice
    return run, run.run(make_study(wire=wire.encoding, min_sites=2), grid=grid)


def test_an_answer_delivered_twice_counts_once(trial):
    run, body = replayed(trial, lambda name, old: None, twice=True)
    plain = trial(FakeSite("a"), FakeSite("b"), FakeSite("c"), folder="plain")
    plain.run(make_study(wire=wire.encoding, min_sites=2))
    assert all(r["participants"] == ["a", "b", "c"] for r in body["rounds"])
    for name in SHAPES:
        np.testing.assert_array_equal(run.adapter()[name], plain.adapter()[name])


def sent_by(name: str, old: list[RecordDict]) -> list[RecordDict]:
    return [content for content in old if content["site"]["name"] == name]


@pytest.mark.parametrize("whose", ["a", "c"])
def test_an_old_answer_in_place_of_a_new_one_is_dropped(trial, whose: str):
    """The site's own of the first round in every later one, or another site's."""

    def swap(name: str, old: list[RecordDict]) -> RecordDict | None:
        return next(iter(sent_by(whose, old)), None) if name == "c" and len(old) > 2 else None

    _, body = replayed(trial, swap)
    for entry in body["rounds"][1:]:
        assert entry["participants"] == ["a", "b"]
        assert entry["missing"]["c"].startswith("dropped: its update is")
    assert body["absences"]["c"]["longest_rounds"] >= 3 and "a" not in body["absences"]


def test_another_runs_answers_are_dropped(trial):
    """The same sites, plan, round and coordinator key; only the order's nonce differs."""
    parts = make_parts()

    def go(folder: str, swap: Any) -> tuple[Any, dict[str, Any]]:
        run = trial(*sites, folder=folder)
        grid = Replayer([Path(s.name) for s in run.sites])
        grid.swap = swap
        return grid, run.run(make_study(wire=wire.encoding, min_sites=2), grid=grid, parts=parts)

    sites = [FakeSite("a"), FakeSite("b"), FakeSite("c")]
    grid, _ = go("first", lambda name, old: None)
    kept = sent_by("c", grid.old)
    for site in sites:
        site.steps = 0
    seen = iter(kept)
    _, body = go("second", lambda name, old: next(seen) if name == "c" else None)
    for entry in body["rounds"]:
        assert entry["missing"]["c"] == "dropped: its update is sealed for another nonce"
