"""Flipped bits, cuts and replays: none passes, each is dropped."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedtune.core.wire.arrays import WireError, unpack_arrays
from fedtune.core.wire.codec import VALUES
from fedtune.flower import api
from fedtune.flower.grid import InProcessGrid
from tests.server.fakes import SHAPES, FakeSite, grid_of, make_parts, make_study, zeros
from tests.wire.hostile_kit import (
    LIES,
    body_of,
    changed,
    honest,
    judge,
    message,
    npy,
    on_the_wire,
    renamed,
    same,
    wire,
)

pytestmark = pytest.mark.usefixtures("_encoded")


def read(body: bytes) -> RecordDict | None:
    """As Flower reads it; None where it cannot."""
    from flwr.common.serde import recorddict_from_proto

    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(body))
    except Exception:
        return None


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
            (array,) = unpack_arrays(record).values()
            assert array.size == 6 and array.dtype.name == wire.encoding
        except WireError:
            pass


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
    grid = grid_of((s.name for s in run.sites), Replayer)
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
        grid = grid_of((s.name for s in run.sites), Replayer)
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
