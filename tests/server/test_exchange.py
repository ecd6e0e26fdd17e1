"""Streaming over any Grid: batches, lost messages, deadlines, liars."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedtune.core.errors import InfrastructureError
from fedtune.flower import api, replies
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record
from fedtune.server.exchange import _collect, ask, clean


def grid_of(count: int, answer: Any = None) -> InProcessGrid:
    app = ClientApp()

    @app.query("x")
    def reply(message: Message, context: Context) -> Message:
        return answer(message) if answer else Message(RecordDict(), reply_to=message)

    return InProcessGrid([Path(str(k)) for k in range(count)], app)


def go(grid: InProcessGrid, timeout: float = 5.0) -> list[Any]:
    contents = dict.fromkeys(grid.get_node_ids(), RecordDict())
    return list(ask(grid, "query.x", contents, "1", timeout))


def test_every_node_gets_exactly_one_reply():
    grid = grid_of(9)
    assert sorted(r.node for r in go(grid)) == grid.get_node_ids()


def test_replies_are_pulled_one_at_a_time():
    grid, asked = grid_of(9), []
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: asked.append(len(list(ids))) or pull(ids)
    go(grid)
    assert max(asked) == 1


def test_a_slow_network_is_polled_until_the_answer_is_there():
    grid, polls = grid_of(2), []
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: polls.append(1) or (pull(ids) if len(polls) > 3 else [])
    assert all(r.content is not None for r in go(grid)) and len(polls) > 3


def test_silence_ends_at_the_deadline():
    grid = grid_of(2)
    grid.pull_messages = lambda ids: []
    assert [(r.content, r.reason) for r in go(grid, 0.1)] == [(None, "no answer in time")] * 2


@pytest.mark.parametrize("pushed", [[], [None]])
def test_a_message_that_flower_does_not_take_is_reported(pushed):
    grid = grid_of(2)
    push = grid.push_messages

    def lossy(messages: Iterable[Message]) -> list[Any]:
        (message,) = messages
        return pushed if message.metadata.dst_node_id == 2 else push([message])

    grid.push_messages = lossy
    reasons = {r.node: r.reason for r in go(grid)}
    assert reasons == {2: "the message could not be sent", 3: ""}


def test_a_failing_connection_is_an_infrastructure_error():
    grid = grid_of(2)

    def broken(ids: Iterable[str]) -> list[Message]:
        raise ConnectionError("10.0.0.7 refused")

    grid.pull_messages = broken
    with pytest.raises(InfrastructureError, match="ConnectionError") as caught:
        go(grid)
    assert "10.0.0.7" not in str(caught.value)


@pytest.mark.parametrize(
    "code, text, reason",
    [
        (api.ErrorCode.NODE_UNAVAILABLE, "Node Unavailable", "the site is not connected"),
        (2, "ValueError", "the site's app raised an error (ValueError)"),
        (2, "<class 'ValueError'>:<'Mrs Example'>", "the site's app raised an error"),
        (77, None, "the site's app failed"),
    ],
)
def test_an_error_reply_is_told_by_code_and_class_alone(code, text, reason):
    grid = grid_of(1, lambda message: Message(Error(code, text), reply_to=message))
    assert [r.reason for r in go(grid)] == [reason]


def test_a_reply_to_another_message_is_nobodys():
    """A node is known by the message that it answers, never by what its answer says."""

    def liar(message: Message) -> Message:
        reply = Message(RecordDict(), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 3
        return reply

    assert sorted(r.node for r in go(grid_of(2, liar))) == [2, 3]
    grid = grid_of(1)
    pull = grid.pull_messages

    def stray(ids: Iterable[str]) -> list[Message]:
        found = list(pull(ids))
        for message in found:
            message.metadata.__dict__["_reply_to_message_id"] = "another"
        return found

    grid.pull_messages = stray
    assert [r.reason for r in go(grid, 0.1)] == ["no answer in time"]


def test_a_sites_words_are_one_short_printable_line():
    assert clean("a\n\x1b[31mred\x00\u202e b") == "a [31mred b"
    assert len(clean("x" * 10_000)) == 300


@pytest.mark.parametrize("error", [KeyError("Evil"), ValueError(), RecursionError(), TypeError()])
def test_an_answer_that_flower_cannot_read_is_its_senders_failure_alone(error):
    """Flower's own reader raises on a crafted message, after it has told the SuperLink to drop it
    and whatever was pulled with it."""
    grid = grid_of(3)
    pull = grid.pull_messages

    def reading(ids: Iterable[str]) -> Any:
        found = list(pull(ids))
        if any(message.metadata.src_node_id == 3 for message in found):
            raise error
        return found

    grid.pull_messages = reading
    reasons = {r.node: r.reason for r in go(grid)}
    assert reasons == {2: "", 3: "its answer cannot be read", 4: ""}


def test_an_answer_to_another_nodes_message_does_not_take_its_place():
    grid = grid_of(2)
    pull = grid.pull_messages

    def crossed(ids: Iterable[str]) -> Any:
        for message in pull(ids):
            if message.metadata.src_node_id == 2:
                message.metadata.__dict__["_reply_to_message_id"] = "2"  # node 3 was asked in it
            yield message

    grid.pull_messages = crossed
    reasons = {r.node: r.reason for r in go(grid, 0.1)}
    assert reasons == {2: "no answer in time", 3: ""}


# ------------------------------------------------------------------------- part by part


class SuperLink:
    """What a SuperLink says of the answers that arrived: to each question, its parts by name, of
    which some are yet to come. pulled: how often each part was asked for; deleted: answers."""

    def __init__(self, *answers: Message) -> None:
        self.objects, self.trees, self.protos = {}, [], []  # type: ignore[var-annotated]
        for answer in answers:
            answer.metadata.__dict__["_message_id"] = answer.object_id
            found = get_all_nested_objects(answer)
            self.objects |= {name: each.deflate() for name, each in found.items()}
            self.trees.append(get_object_tree(answer))
            self.protos.append(api.message_to_proto(answer))
        self.coming: set[str] = set()
        self.lost: set[str] = set()
        self.pulled: Counter[str] = Counter()
        self.deleted: list[str] = []
        self.asked: list[list[str]] = []
        self.node, self.run, self._runtime_client = Node(node_id=1), SimpleNamespace(run_id=1), self

    def PullMessages(self, request: Any) -> Any:
        self.asked.append(list(request.message_ids))
        asked = self.asked[-1]
        here = [n for n, m in enumerate(self.protos) if m.metadata.reply_to_message_id in asked]
        return PullAppMessagesResponse(
            messages_list=[self.protos[n] for n in here],
            message_object_trees=[self.trees[n] for n in here],
        )

    def PullObject(self, request: Any) -> Any:
        name = request.object_id
        self.pulled[name] += 1
        there = name not in self.coming
        return PullObjectResponse(
            object_found=name not in self.lost,
            object_available=there,
            object_content=self.objects[name] if there else b"",
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.deleted.append(request.message_object_id)


def answering(array: np.ndarray, words: str = "") -> Message:
    asked = grid_of(1).create_message(RecordDict(), "train", 2, "1")
    asked.metadata.__dict__["_message_id"] = "1"
    content = {"update": to_record({"a": array}), "site": ConfigRecord({"events": words})}
    return Message(RecordDict(content), reply_to=asked)


def noise(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-128, 128, size, dtype=np.int8)


MIB = 1 << 20


def looked(answer: replies.Answer) -> Message | None:
    """What one look for the answer brings."""
    replies.announce([answer])
    return answer.take()


def ended(answer: replies.Answer) -> type[Exception] | None:
    """How a look for the answer fails."""
    try:
        looked(answer)
    except Exception as error:
        return type(error)
    return None


def test_an_answer_is_there_when_its_last_part_is(monkeypatch):
    link = SuperLink(answering(noise(20 * MIB)))  # four numbers' parts, and five objects around
    *_, last = link.objects
    answer = replies.Answer(link, "1", 21 * MIB)
    for missing in [set(link.objects), {last}, {last}]:
        link.coming = missing
        assert looked(answer) is None
    link.coming = set()
    message = looked(answer)
    assert message is not None and message.content["update"]["a"].numpy().size == 20 * MIB
    others = {name: count for name, count in link.pulled.items() if name != last}
    assert max(others.values()) == 3  # not there, there, and there with the others
    assert link.deleted == [message.metadata.message_id]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param((noise(20 * MIB),), id="long"),
        pytest.param((np.zeros(40 * MIB, np.int8),), id="one part named eight times"),
        pytest.param((noise(1), "x" * 2 * MIB), id="mostly words"),
    ],
)
def test_an_answer_that_is_longer_than_agreed_is_dropped_before_it_is_put_together(
    content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, built = SuperLink(answering(*content)), []
    monkeypatch.setattr(replies, "inflate_object_from_contents", lambda *_: built.append(1))
    answer = replies.Answer(link, "1", 12 * MIB)
    assert ended(answer) is replies.TooLong
    assert not built
    fetched = sum(len(link.objects[name]) for name in link.pulled)
    assert fetched <= 12 * MIB + 6 * MIB
    answer.drop()
    assert len(link.deleted) == 1


def test_an_answer_of_too_many_parts_is_not_begun() -> None:
    link = SuperLink(answering(noise(1)))
    for n in range(2000):
        link.trees[0].children.add(object_id=f"{n:064x}")
    assert ended(replies.Answer(link, "1", 10 * MIB)) is replies.TooLong
    assert not link.pulled


def test_who_never_finishes_holds_nobody_up_and_is_deleted_at_the_deadline() -> None:
    asked = {name: grid_of(1).create_message(RecordDict(), "train", 2, "1") for name in "12"}
    for name, message in asked.items():
        message.metadata.__dict__["_message_id"] = name
    stuck, quick = (
        Message(RecordDict({"c": ConfigRecord({"who": name})}), reply_to=message)
        for name, message in asked.items()
    )
    link = SuperLink(stuck, quick)
    link.coming = {stuck.metadata.message_id}
    waiting = {int(name): replies.Answer(link, name, MIB) for name in "12"}
    first, last = _collect(waiting, MIB, time.monotonic() + 0.3)
    assert first.node == 2 and first.content is not None
    assert (last.node, last.reason) == (1, "no answer in time")
    assert link.deleted == [quick.metadata.message_id, stuck.metadata.message_id]
    assert link.asked == [["1", "2"]]  # one call for all, and none for what is announced


def test_a_lost_part_is_its_senders_failure() -> None:
    link = SuperLink(answering(noise(1)))
    link.lost = {next(iter(link.objects))}
    assert ended(replies.Answer(link, "1", MIB)) is replies.Lost


def test_a_longer_answer_in_this_process_is_dropped_too():
    """The same words on every grid: not as agreed, and by whom."""
    long = lambda m: Message(RecordDict({"c": ConfigRecord({"x": "y" * 2 * MIB})}), reply_to=m)  # noqa: E731
    (reply,) = go(grid_of(1, long))
    assert (reply.content, reply.status) == (None, "dropped")
    assert "not as agreed" in reply.reason
