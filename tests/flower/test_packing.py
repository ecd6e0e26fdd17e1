"""A short message travels in one part, with the same records in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedtune.core.errors import InfrastructureError
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.seal import body_digest
from fedtune.courier.executor import Executor
from fedtune.flower import api, replies
from fedtune.flower.packing import MOST, NEVER, PACKED, pack, unpack
from fedtune.flower.records import to_record
from fedtune.server.exchange import UNREADABLE, ask

ADAPTER = {"values": np.arange(4000, dtype=np.int8), "scales": np.ones(16, np.float32)}


def message(content: RecordDict, kind: str = "train") -> Message:
    return api.create_message(1, 1, content, kind, 2, "")


def order(arrays: dict[str, Any] = ADAPTER) -> RecordDict:
    record = ConfigRecord({"plan": "sha256:0", "round": 3, "signature": "f" * 128})
    return RecordDict({"order": record, "adapter": to_record(arrays)})


def parts(of: Message) -> int:
    return len(get_all_nested_objects(of))


def digest(content: RecordDict) -> str:
    order_ = content.config_records["order"]
    return body_digest(
        bodies(content.array_records["adapter"]), {k: str(order_[k]) for k in order_}
    )


def test_three_parts_instead_of_eight_and_the_same_records() -> None:
    sent = message(order())
    assert parts(sent) == 8 and parts(pack(sent)) == 3
    received = unpack(api.message_from_proto(api.message_to_proto(sent)))
    assert received.content == order() and digest(received.content) == digest(order())
    assert unpack(received).content == order()  # what is not packed stays as it is


def test_the_same_records_are_the_same_bytes() -> None:
    one, two = (pack(message(order())).content[PACKED][PACKED] for _ in range(2))
    assert one == two


def test_a_long_message_travels_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not copied to learn that it is long."""
    close = RecordDict({"order": ConfigRecord({"text": "x" * MOST})})
    assert pack(message(close)).content == close
    monkeypatch.setattr(api, "recorddict_to_proto", None)
    long = {"values": np.zeros(MOST, np.int8)}
    sent = pack(message(order(long)))
    assert sent.content == order(long) and MOST < replies.WORDS  # what a packed one counts as


def test_every_protocol_can_read_a_plan_and_its_answer() -> None:
    content = RecordDict({"plan": ConfigRecord({"protocol": 1})})
    assert pack(message(content, NEVER)).content == content


def test_an_error_has_nothing_to_pack() -> None:
    error = api.error_reply(message(order()), "no")
    assert unpack(pack(error)).has_error()


PROTO = api.recorddict_to_proto(RecordDict({PACKED: ConfigRecord({PACKED: b"inside"})}))
CRAFTED = {
    "no protobuf": ConfigRecord({PACKED: b"\xff\xff\xff"}),
    "cut off": ConfigRecord({PACKED: api.recorddict_to_proto(order()).SerializeToString()[:-9]}),
    "no bytes": ConfigRecord({PACKED: "text"}),
    "another name": ConfigRecord({"other": b""}),
    "a metric": MetricRecord({PACKED: 1}),
    "arrays": ArrayRecord(),
}


@pytest.mark.parametrize("record", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_one_is_that_messages_failure_alone(record: Any) -> None:
    """A site answers it with an error, and works on; a coordinator takes it for unreadable."""
    called: list[Message] = []

    def app(asked: Message, _: Context) -> Message:
        called.append(asked)
        return asked

    executor = Executor(app, lambda *_: None)  # type: ignore[arg-type]
    crafted = message(RecordDict({PACKED: record}))
    reply = executor.reply(api.CLIENT_APP, crafted, Context(1, 2, {}, RecordDict(), {}))
    assert reply.has_error() and not called
    with pytest.raises(UNREADABLE):
        unpack(message(RecordDict({PACKED: record})))


def test_it_is_unpacked_once() -> None:
    inside = ConfigRecord({PACKED: PROTO.SerializeToString()})
    once = unpack(message(RecordDict({PACKED: inside})))
    assert once.content == RecordDict({PACKED: ConfigRecord({PACKED: b"inside"})})


class Link:
    """A grid of a SuperLink that takes no message."""

    _runtime_client = object()

    def __init__(self, pushed: list[Message]) -> None:
        self._pushed = pushed

    def create_message(self, content: RecordDict, kind: str, *_: Any, **__: Any) -> Message:
        return message(content, kind)

    def push_messages(self, messages: list[Message]) -> list[str]:
        self._pushed.extend(messages)
        raise OSError


def test_a_sites_answer_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its app sees of a packed order, and returns, is not."""
    answered: list[Message] = []

    class Task:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> Task:
            return self

        def __exit__(self, *_: object) -> None: ...

        def pull(self) -> tuple[Message, Context]:
            return pack(message(order())), Context(1, 2, {}, RecordDict(), {})

        def push(self, reply: Message) -> None:
            answered.append(reply)

    def app(asked: Message, _: Context) -> Message:
        assert asked.content == order()
        return Message(asked.content, reply_to=asked)

    monkeypatch.setattr(api, "ClientTask", Task)
    executor = Executor(app, lambda *_: None)  # type: ignore[arg-type]
    executor._answer(None, "", api.Claim(api.CLIENT_APP, ""))  # type: ignore[arg-type]
    (reply,) = answered
    assert list(reply.content) == [PACKED] and unpack(reply).content == order()


def test_what_a_coordinator_sends_through_a_superlink_is_packed() -> None:
    pushed: list[Message] = []
    with pytest.raises(InfrastructureError):
        list(ask(Link(pushed), "train", {2: order()}, "1", 1.0))  # type: ignore[arg-type]
    (sent,) = pushed
    assert list(sent.content) == [PACKED] and unpack(sent).content == order()
