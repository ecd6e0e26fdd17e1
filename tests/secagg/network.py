"""A network that loses, repeats, delays and spoils messages, and kills the coordinator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict

import fedtune.launch.in_one_process
from fedtune.flower import grid as grid_module
from fedtune.flower.grid import InProcessGrid
from tests.secagg.unit_sites import NAMES

MOST_MESSAGES = 400  # of one start of the coordinator: more is a hang


class Killed(KeyboardInterrupt):
    """The coordinator dies here: nothing may catch it."""


class Network(InProcessGrid):
    """saw: told what leaves a site. faults: (node, kind of message) -> what happens to the next
    one. away: not connected."""

    def __init__(self, saw: Callable[[str, Message, Message], None]) -> None:
        super().__init__([Path(name) for name in NAMES], fedtune.launch.in_one_process.app, str)
        self.saw = saw
        self.faults: dict[tuple[int, str], str] = {}
        self.away: set[int] = set()
        self.old: dict[tuple[int, str], RecordDict] = {}
        self.orders: dict[int, list[bytes]] = defaultdict(list)
        self.kill_at, self.messages = 0, 0
        self._late: set[str] = set()

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            self._counted()
            node = message.metadata.dst_node_id
            (identity,) = super().push_messages([message])
            self.orders[node].append(self._waiting[identity])
            if node in self.away or self._fault(message, "request"):
                del self._waiting[identity]
            pushed.append(identity)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for identity in message_ids:
            if identity not in self._waiting:
                continue
            asked = grid_module.decode(self._waiting[identity])
            slot = asked.metadata.dst_node_id, asked.metadata.message_type
            if identity not in self._late and self._fault(asked, "late"):
                self._late.add(identity)  # others answer before it
                continue
            if slot in self.old and self._fault(asked, "replay"):
                del self._waiting[identity]
                yield Message(self.old[slot], reply_to=asked)
                continue
            for reply in super().pull_messages([identity]):
                self._counted()
                if self._fault(asked, "garbage"):
                    raise KeyError("an object of a kind that Flower does not know")
                if self._fault(asked, "response"):
                    continue
                if not reply.has_error():
                    self.old[slot] = reply.content
                yield reply
                if self._fault(asked, "twice"):
                    yield reply

    def _answer(self, message_bytes: bytes) -> Message:
        asked = grid_module.decode(message_bytes)
        reply = super()._answer(message_bytes)
        self.saw(NAMES[asked.metadata.dst_node_id - 2], asked, reply)
        return reply

    def tell(self, name: str, kind: str, records: dict[str, Any]) -> str:
        """Send a site a message of the coordinator's own making; returns the answer's status."""
        node = NAMES.index(name) + 2
        message = self.create_message(RecordDict(records), kind, node, "x")
        (identity,) = InProcessGrid.push_messages(self, [message])
        (reply,) = InProcessGrid.pull_messages(self, [identity])
        return str(reply.content["site"]["status"]) if not reply.has_error() else "error"

    def _fault(self, message: Message, kind: str) -> bool:
        slot = message.metadata.dst_node_id, message.metadata.message_type
        return self.faults.get(slot) == kind and bool(self.faults.pop(slot))

    def _counted(self) -> None:
        self.messages += 1
        assert self.messages <= MOST_MESSAGES, "the coordinator asks and asks"
        if self.messages == self.kill_at:
            raise Killed
