"""Send messages and receive replies, one at a time, over any Flower Grid."""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedtune.core.errors import FedtuneError, InfrastructureError
from fedtune.flower import api, replies
from fedtune.flower.packing import pack, size
from fedtune.flower.polling import Poll

UNREADABLE = (  # what reading a hostile message may raise; a lost connection is none of these
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(RecursionError, NotImplementedError, struct.error, DecodeError),
)
POLL_SECONDS = (0.1, 1.0)  # shortest and longest pause before answers are looked for again
CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,79}")
ERROR_TEXT = {
    api.ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "the site could not load its app",
    api.ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "the site's app raised an error",
    api.ErrorCode.MESSAGE_UNAVAILABLE: "the message was lost on the way",
    api.ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "the reply was lost on the way",
    api.ErrorCode.NODE_UNAVAILABLE: "the site is not connected",
    api.ErrorCode.CLIENT_APP_CRASHED: "the site's app crashed",
}


@dataclass(frozen=True)
class Reply:
    """One node's answer, or the reason why there is none.

    - node: the node
    - content: the answer's records; None if there is none that can be used
    - reason: why there is no content
    - size: the number of bytes of the content on the wire
    - status: why a reply has no content: "dropped" if the answer was longer than agreed, "failed"
      otherwise"""

    node: int
    content: RecordDict | None
    reason: str = ""
    size: int = 0
    status: str = "failed"


def ask(
    grid: Grid,
    kind: str,
    contents: Mapping[int, RecordDict],
    group: str,
    timeout: float,
    most: int = replies.WORDS,
) -> Iterator[Reply]:
    """Send each node its content and yield exactly one Reply per node, in order of arrival. A node
    is identified by the message that it answers, never by the answer's content.

    - grid: the Flower grid of the nodes
    - kind: the messages' type in Flower, such as "train"
    - contents: node -> the records that it is sent
    - group: the messages' group in Flower, a text that they share
    - timeout: seconds to wait for all answers
    - most: the number of bytes that an answer may have

    Guarantee: at most one reply is held in memory, of at most `most` bytes. A reply that is longer,
    unreadable or never complete counts as a failure of its node only, and delays no other node.
    Errors: InfrastructureError if Flower's Grid fails.
    """
    try:
        waiting: dict[int, replies.Answer] = {}
        for node, content in contents.items():
            message = grid.create_message(content, kind, node, group, ttl=timeout)
            if replies.remote(grid):
                pack(message)
            for pushed in grid.push_messages([message]):
                if pushed:
                    waiting[node] = replies.Answer(grid, str(pushed), most)
        lost = set(contents) - set(waiting)
        yield from (Reply(node, None, "the message could not be sent") for node in sorted(lost))
        yield from _collect(waiting, most, time.monotonic() + timeout)
    except FedtuneError:
        raise
    except Exception as error:
        raise InfrastructureError(
            f"the connection to Flower failed ({type(error).__name__})",
            todo="check that the SuperLink runs, then go on with --resume",
        ) from error


def _collect(waiting: dict[int, replies.Answer], most: int, deadline: float) -> Iterator[Reply]:
    poll = Poll(*POLL_SECONDS)
    while waiting:
        count = len(waiting)
        replies.announce(waiting.values())
        for node in list(waiting):
            reply = _pull_answer(node, waiting[node], most)
            if reply is not None:
                del waiting[node]
                yield reply
        if len(waiting) < count:
            continue
        if time.monotonic() < deadline:
            poll.pause()
        else:
            for node, answer in waiting.items():
                answer.drop()  # free the parts that have arrived
                yield Reply(node, None, "no answer in time")
            return


def _pull_answer(node: int, answer: replies.Answer, most: int) -> Reply | None:
    """Fetch a node's answer if it has arrived, and return it as a Reply; return None if it has not
    arrived yet. If the answer is too long, lost or unreadable, the Reply has no content, and states
    the reason.

    - node: the node
    - answer: the handle by which the node's answer is fetched
    - most: the number of bytes that the answer may have

    Answers are fetched one at a time, for two reasons: a message that Flower cannot read makes
    it lose all messages fetched in the same call, and large answers are not held in memory
    together."""
    try:
        message = answer.take()
        if message is None:
            return None
        reply = _reply(node, message)
        if reply.size <= most:
            return reply
    except replies.TooLong:
        answer.drop()
    except replies.Lost:
        return Reply(node, None, ERROR_TEXT[api.ErrorCode.REPLY_MESSAGE_UNAVAILABLE])
    except UNREADABLE:
        return Reply(node, None, "its answer cannot be read")
    reason = f"its answer is not as agreed: more than {most} bytes"
    return Reply(node, None, reason, status="dropped")


def _reply(node: int, message: Message) -> Reply:
    if message.has_error():
        text = ERROR_TEXT.get(message.error.code, "the site's app failed")
        detail = message.error.reason or ""
        return Reply(node, None, f"{text} ({detail})" if CLASS_NAME.fullmatch(detail) else text)
    return Reply(node, message.content, size=size(message.content))


def clean(text: object, longest: int = 300) -> str:
    """Make a text from a site safe to show: replace it by one line of printable characters, cut to
    the first `longest`. A value that is no text gives ""."""
    start = text[: 10 * longest] if isinstance(text, str) else ""
    printable = "".join(c if c.isprintable() else " " for c in start)
    return " ".join(printable.split())[:longest]
