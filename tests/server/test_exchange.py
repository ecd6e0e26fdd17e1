"""Streaming over any Grid: batches, lost messages, deadlines, liars."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.errors import InfrastructureError
from fedtune.flower import api
from fedtune.flower.grid import InProcessGrid
from server.exchange import ask, clean


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
