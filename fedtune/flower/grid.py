"""Define a Flower Grid (through which a coordinator sends messages to nodes) whose nodes run in
this process, for simulations. It uses the apps and the wire format of a deployment, but no server
and no Ray."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.core.config import load_site
from fedtune.core.errors import FedtuneError
from fedtune.flower import api
from fedtune.flower.enrol import Member

RUN_ID = 1
SIMULATED = "simulated"  # a key in the config of nodes that this machine simulates, and of no other
PEERS = "peers"  # in a simulated node's config: the signing keys of all sites on this machine


class InProcessGrid(Grid):
    """A Grid with one node for each site file. A node's ClientApp is called when the node's reply
    is pulled.

    Messages in both directions go through Flower's wire format, so a message that works here also
    works on the network. `bytes_down` and `bytes_up` count, for each node, the bytes of the
    messages to it and from it, metadata included.

    - sites: the sites' files; the first file gets the lowest node number
    - app: the ClientApp that answers for each site
    - name_of: a function that returns the site's name for a site file; by default it reads the name
      in the file
    - peers: the signing keys of all sites, separated by spaces; "" without secure aggregation

    Guarantee: at most one reply is held at a time. An exception in the ClientApp becomes an error
    reply with the name of its class; only for a FedtuneError the reply also has the exception's
    message."""

    def __init__(
        self,
        sites: Sequence[Path],
        app: ClientApp,
        name_of: Callable[[Path], str] = lambda path: load_site(path).site.name,
        peers: str = "",
    ) -> None:
        self._app, self._name_of = app, name_of
        self._contexts = contexts_of(dict(enumerate(sites, api.SUPERLINK_NODE_ID + 1)), peers)
        self._waiting: dict[str, bytes] = {}
        self._numbers = itertools.count(1)
        self._run = api.Run.create_empty(RUN_ID)
        self.bytes_down: Counter[int] = Counter()
        self.bytes_up: Counter[int] = Counter()

    def set_run(self, run: api.Run) -> None:
        self._run = run

    @property
    def run(self) -> api.Run:
        return self._run

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def members(self) -> dict[int, Member]:
        """Return which site each node belongs to: node number -> Member, with the site's name. A
        node whose site file cannot be read is left out."""
        members = {}
        for node, context in self._contexts.items():
            with suppress(FedtuneError):
                members[node] = Member(self._name_of(Path(str(context.node_config["site"]))))
        return members

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message of this grid's one run, RUN_ID, which has no task. Return it without an
        id, which it gets when it is pushed.

        - content: the records of the message
        - message_type: what the message asks the site to do, such as "train" or "query.prepare"
        - dst_node_id: the number of the node that receives the message
        - group_id: a text that the messages of one exchange share, such as the round's number
        - ttl: for how many seconds the message and its reply are valid; None for Flower's
          DEFAULT_TTL"""
        return api.create_message(RUN_ID, None, content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Store the messages as bytes until their replies are pulled, and return the messages' ids.
        Errors: KeyError if a node is unknown."""
        pushed = []
        for message in messages:
            node = message.metadata.dst_node_id
            self._contexts[node]
            identity = str(next(self._numbers))
            proto = api.message_to_proto(message)
            proto.metadata.message_id = identity
            self._waiting[identity] = proto.SerializeToString()
            self.bytes_down[node] += len(self._waiting[identity])
            pushed.append(identity)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies to the messages with these ids. A message is handed to its node's app
        only when its reply is taken from the iterator. Each message is answered once."""
        for identity in message_ids:
            message_bytes = self._waiting.pop(identity, None)
            if message_bytes is not None:
                yield self._answer(message_bytes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return list(self.pull_messages(self.push_messages(messages)))

    def _answer(self, message_bytes: bytes) -> Message:
        sent = answer(self._app, self._contexts, message_bytes)
        reply = decode(sent)
        self.bytes_up[reply.metadata.src_node_id] += len(sent)
        return reply


def contexts_of(sites: Mapping[int, Path], peers: str = "") -> dict[int, Context]:
    """Build Flower's context for each node, which tells the node's app its site file. Return node
    number -> context. sites: node number -> site file; peers: the sites' signing keys, separated by
    spaces, or "" without secure aggregation."""
    return {
        number: Context(
            RUN_ID, number, {"site": str(path), SIMULATED: True, PEERS: peers}, RecordDict(), {}
        )
        for number, path in sites.items()
    }


def answer(app: ClientApp, contexts: Mapping[int, Context], message_bytes: bytes) -> bytes:
    """Let the app answer a message for the node to which it is addressed. Return the reply in the
    wire format. An exception in the app becomes an error reply.

    - contexts: node number -> the node's context
    - message_bytes: the message in the wire format"""
    message = decode(message_bytes)
    try:
        reply = app(message, contexts[message.metadata.dst_node_id])
    except Exception as error:
        detail = f": {error}" if isinstance(error, FedtuneError) else ""
        code = api.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        reply = Message(Error(code, type(error).__name__ + detail), reply_to=message)
    sent: bytes = api.message_to_proto(reply).SerializeToString()
    return sent


def decode(message_bytes: bytes) -> Message:
    """Parse a message from its wire format."""
    return api.message_from_proto(api.ProtoMessage.FromString(message_bytes))
