"""Answers to the coordinator's messages, put together within a bound that is agreed before."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.flower.api import (
    ConfirmMessageReceivedRequest,
    PullAppMessagesRequest,
    PullObjectRequest,
    get_object_body,
    get_object_head_values_from_object_content,
    inflatable,
    inflate_object_from_contents,
    iterate_object_tree,
)

WORDS = 1 << 20  # bytes of a message beside its arrays' numbers, at most


PARTS, PART = 1000, 1 << 20  # of an answer: so many, and one more for each 1 MiB
MISSING = 20  # parts that one look for an answer may find to be still on their way


class TooLong(Exception):
    """An answer of more bytes than were agreed."""


class Lost(Exception):
    """A part of an answer is gone: its upload was given up."""


class Answer:
    """The answer to one message, part by part from the SuperLink.

    Guarantee: at most `most` bytes and one part are fetched and held at a time, and no more than
    `most` come of them when they are put together, though one part may be named many times.
    Nobody is waited for: while parts are still arriving there is no answer, and none are held."""

    def __init__(self, grid: Grid, asked: str, most: int) -> None:
        self._grid, self._asked, self._most = grid, asked, most
        self._root, self._parts, self._unseen, self._seen = "", list[str](), deque[str](), 0

    def take(self) -> Message | None:
        """The message, once it is there. Errors: TooLong, Lost; what a crafted message makes
        Flower's reader raise."""
        if getattr(self._grid, "_runtime_client", None) is None:  # sites in this process, or Ray's
            found = self._grid.pull_messages([self._asked])
            return next((m for m in found if m.metadata.reply_to_message_id == self._asked), None)
        if not self._root and not self._announced():
            return None
        contents = self._contents()
        if contents is None:
            return None
        self._check(contents)
        self.drop()
        message = inflate_object_from_contents(self._root, contents)
        if not isinstance(message, Message):
            raise TypeError("not a message")
        message.metadata.__dict__["_message_id"] = self._root
        return message

    def drop(self) -> None:
        """Delete at the SuperLink what was announced of the answer."""
        if self._root:
            node, run = self._link.node, self._link.run.run_id
            said = ConfirmMessageReceivedRequest(
                node=node, run_id=run, message_object_id=self._root
            )
            self._link._runtime_client.ConfirmMessageReceived(said)

    @property
    def _link(self) -> Any:  # Flower's HttpGrid, whose module brings a web server along
        return self._grid

    def _announced(self) -> bool:
        """Whether an answer was announced, and so which parts it has."""
        asked = PullAppMessagesRequest(message_ids=[self._asked])
        reply = self._link._runtime_client.PullMessages(asked)
        for message, tree in zip(reply.messages_list, reply.message_object_trees, strict=True):
            if message.metadata.reply_to_message_id == self._asked:
                self._root = message.metadata.message_id
                self._parts = list(dict.fromkeys(t.object_id for t in iterate_object_tree(tree)))
                self._unseen = deque(self._parts)
        if len(self._parts) > PARTS + self._most // PART:
            raise TooLong
        return bool(self._root)

    def _contents(self) -> dict[str, bytes] | None:
        """Every part; None where one is still missing. No part is fetched more than twice."""
        found, missing = dict[str, bytes](), 0
        for _ in range(len(self._unseen)):
            part = self._unseen.popleft()
            content = self._pulled(part)
            if content is None:
                self._unseen.append(part)
                missing += 1
                if missing == MISSING:
                    break
                continue
            self._seen += len(content)
            if self._seen > self._most:
                raise TooLong
            found[part] = content
        if self._unseen:
            return None
        for part in self._parts:  # what an earlier look has seen
            if part not in found:
                found[part] = self._pulled(part) or b""
        return found

    def _pulled(self, part: str) -> bytes | None:
        node, run = self._link.node, self._link.run.run_id
        asked = PullObjectRequest(node=node, run_id=run, object_id=part)
        found = self._link._runtime_client.PullObject(asked)
        if not found.object_found:
            raise Lost
        return found.object_content if found.object_available else None

    def _check(self, contents: dict[str, bytes]) -> None:
        """Errors: TooLong where it is mostly words, or grows when it is put together."""
        kinds = {n: get_object_head_values_from_object_content(c) for n, c in contents.items()}
        words = sum(len(contents[n]) for n, (kind, *_) in kinds.items() if kind != "ArrayChunk")
        if words > WORDS:
            raise TooLong
        whole: dict[str, int] = {}

        def unfolded(name: str) -> int:
            """Bytes of an object and all that it names, as often as it names it."""
            if name not in whole:
                kind, named, _ = kinds[name]
                if kind in ("RecordDict", "ArrayRecord", "Array"):
                    said = json.loads(get_object_body(contents[name], inflatable[kind]))
                    by_number = kind == "Array"
                    named = (
                        [named[n] for n in said["arraychunk_ids"]]
                        if by_number
                        else list(said.values())
                    )
                whole[name] = len(contents[name]) + sum(map(unfolded, named))
            return whole[name]

        if unfolded(self._root) > self._most:
            raise TooLong
