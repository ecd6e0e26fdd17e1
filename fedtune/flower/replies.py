"""Fetch the sites' answers to the coordinator's messages, part by part, and assemble them. How
large an answer may be is fixed before its message is sent."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.flower.api import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    get_object_body,
    get_object_head_values_from_object_content,
    inflatable,
    inflate_object_from_contents,
    iterate_object_tree,
    pull_replies,
)
from fedtune.flower.packing import unpack

WORDS = 1 << 20  # largest number of bytes of a message without its arrays' values


PARTS, PART = 1000, 1 << 20  # an answer may have PARTS parts, and one more for each PART bytes
MISSING = 20  # the number of missing parts after which a poll for an answer stops


class TooLong(Exception):
    """Raised if an answer has more bytes than it may have."""


class Lost(Exception):
    """Raised if a part of an answer will not arrive, since the site gave up its upload."""


def announce(answers: Collection[Answer]) -> None:
    """Ask the SuperLink, in one call, which of the answers have arrived or begun to arrive. The
    result is noted in each Answer, so that `take` can fetch it. Does nothing for a grid without a
    SuperLink, as in a simulation."""
    unknown = {answer._asked: answer for answer in answers if not answer._root}
    grid: Any = next((answer._grid for answer in unknown.values()), None)
    if not remote(grid):
        return
    reply = grid._runtime_client.PullMessages(pull_replies(unknown))
    for message, tree in zip(reply.messages_list, reply.message_object_trees, strict=True):
        if answer := unknown.get(message.metadata.reply_to_message_id):
            answer._root, answer._tree = message.metadata.message_id, tree


def remote(grid: Any) -> bool:
    """Return whether the grid uses a SuperLink. The grid of a simulation does not."""
    return getattr(grid, "_runtime_client", None) is not None


class Answer:
    """The answer to one message, which is fetched part by part from the SuperLink.

    - grid: the grid over which the message was sent
    - asked: the message's id
    - most: how many bytes the answer may have

    Guarantee: while the answer is fetched, at most `most` bytes and one part more are held in
    memory. The assembled answer has at most `most` bytes, even if it lists one part many times. No
    method waits: while parts are missing, `take` returns None and keeps no part."""

    def __init__(self, grid: Grid, asked: str, most: int) -> None:
        self._grid = grid
        self._asked = asked
        self._most = most
        self._root, self._received = "", 0
        self._tree: Any = None  # the tree of its parts, as the SuperLink announced it
        self._parts, self._pending = list[str](), deque[str]()

    def take(self) -> Message | None:
        """Fetch the answer and return it as a message; None if it has not arrived completely. Call
        `announce` before, which finds out whether it has begun to arrive.

        Errors: TooLong if it has too many bytes; Lost if a part will not arrive; and any error that
        a crafted message causes in Flower's reader."""
        if not remote(self._grid):
            messages = self._grid.pull_messages([self._asked])
            return next(
                (m for m in messages if m.metadata.reply_to_message_id == self._asked), None
            )
        if not self._root:
            return None
        self._note_parts()
        contents = self._contents()
        if contents is None:
            return None
        self._check(contents)
        self.drop()
        message = inflate_object_from_contents(self._root, contents)
        if not isinstance(message, Message):
            raise TypeError("not a message")
        message.metadata.__dict__["_message_id"] = self._root
        return unpack(message)

    def drop(self) -> None:
        """Delete the answer at the SuperLink. Does nothing if it was not announced there."""
        if self._root:
            node, run = self._link.node, self._link.run.run_id
            confirmation = ConfirmMessageReceivedRequest(
                node=node, run_id=run, message_object_id=self._root
            )
            self._link._runtime_client.ConfirmMessageReceived(confirmation)

    @property
    def _link(self) -> Any:  # Flower's HttpGrid; importing its type would load a web server
        return self._grid

    def _note_parts(self) -> None:
        if self._tree is not None:
            parts = dict.fromkeys(t.object_id for t in iterate_object_tree(self._tree))
            self._parts = list(parts)
            self._pending = deque(parts)
            self._tree = None
        if len(self._parts) > PARTS + self._most // PART:
            raise TooLong

    def _contents(self) -> dict[str, bytes] | None:
        """Fetch the parts that had not arrived before. If now all have arrived, return the content
        of every part, as a dict from the part's id; else None. No part's content is fetched more
        than twice. Errors: TooLong if they have too many bytes together; Lost if a part will not
        arrive."""
        contents, missing = dict[str, bytes](), 0
        for _ in range(len(self._pending)):
            part = self._pending.popleft()
            content = self._pull_part(part)
            if content is None:
                self._pending.append(part)
                missing += 1
                if missing == MISSING:
                    break
                continue
            self._received += len(content)
            if self._received > self._most:
                raise TooLong
            contents[part] = content
        if self._pending:
            return None
        for part in self._parts:  # parts that arrived in an earlier poll
            if part not in contents:
                contents[part] = self._pull_part(part) or b""
        return contents

    def _pull_part(self, part: str) -> bytes | None:
        node, run = self._link.node, self._link.run.run_id
        request = PullObjectRequest(node=node, run_id=run, object_id=part)
        response = self._link._runtime_client.PullObject(request)
        if not response.object_found:
            raise Lost
        return response.object_content if response.object_available else None

    def _check(self, contents: dict[str, bytes]) -> None:
        """Check two sizes: that of all parts without array values together, and that of the
        assembled answer. In the latter, a part that is named several times counts several times.
        contents: id of a part -> its content. Errors: TooLong if one is too large."""
        kinds = {n: get_object_head_values_from_object_content(c) for n, c in contents.items()}
        words = sum(len(contents[n]) for n, (kind, *_) in kinds.items() if kind != "ArrayChunk")
        if words > WORDS:
            raise TooLong
        sizes: dict[str, int] = {}

        def count_bytes(name: str) -> int:
            """Return how many bytes the part `name` has together with all parts that it refers to,
            directly or not. A part that is referred to several times counts several times. name:
            the part's id."""
            if name not in sizes:
                kind, named, _ = kinds[name]
                if kind in ("RecordDict", "ArrayRecord", "Array"):
                    references = json.loads(get_object_body(contents[name], inflatable[kind]))
                    by_number = kind == "Array"
                    named = (
                        [named[n] for n in references["arraychunk_ids"]]
                        if by_number
                        else list(references.values())
                    )
                sizes[name] = len(contents[name]) + sum(map(count_bytes, named))
            return sizes[name]

        if count_bytes(self._root) > self._most:
            raise TooLong
