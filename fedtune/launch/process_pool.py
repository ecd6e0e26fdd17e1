"""Run the sites of a simulation in several processes that train at the same time, behind one Flower
Grid (ProcessGrid).

    coordinator: ProcessGrid ── socket pair, Flower's messages as bytes ──> main(): runs some sites

Each site belongs to one process for the whole run, and only that process opens its data and ledger.
A process first waits for the locks of its sites, which an earlier process of this run may still
hold. The base's weights are memory-mapped, so that all processes share one copy. Messages are JSON
and bytes, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from flwr.app import Error, Message

from fedtune.core import errors
from fedtune.core.errors import FedtuneError
from fedtune.core.files import locks
from fedtune.core.processes import Child
from fedtune.flower import api
from fedtune.flower.grid import InProcessGrid, answer, contexts_of, decode
from fedtune.launch.in_one_process import app, site_errors

Sites = dict[int, str]  # node number -> site file
PAUSE = 0.05  # seconds to wait for a reply before all workers are checked again


class ProcessGrid(InProcessGrid):
    """A Flower Grid whose sites answer in several processes. As a context manager it ends these
    processes. site_errors: site file -> the error with which the site failed.

    - sites: the sites' files
    - processes: the number of processes, to which the sites are dealt out in turn; at most one for
      each site is used
    - logs: the folder for the processes' logs, sites-N.log, and for the sites' locks
    - peers: the signing keys of all sites, separated by spaces; "" without secure aggregation

    Guarantee: at most one reply is held here, and one more in each process. If a process ends, the
    request that it was answering fails. The next message to one of its sites starts a new process.
    """

    def __init__(self, sites: Sequence[Path], processes: int, logs: Path, peers: str = "") -> None:
        super().__init__(sites, app)
        self.site_errors: dict[str, FedtuneError] = {}
        parts: list[Sites] = [{} for _ in range(min(processes, len(sites)))]
        for at, (node, context) in enumerate(self._contexts.items()):
            parts[at % len(parts)][node] = str(context.node_config["site"])
        self._workers: list[Any] = [
            self._worker(logs / f"sites-{n}.log", part, (n, len(parts)), peers)
            for n, part in enumerate(parts)
        ]
        self._of = {node: worker for worker in self._workers for node in worker.sites}
        self._replies: dict[str, bytes] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            (identity,) = super().push_messages([message])
            self._of[message.metadata.dst_node_id].queue.append(identity)
            pushed.append(identity)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies to these messages that have arrived. Each reply is yielded only once.
        message_ids: the ids of the messages that were sent."""
        for identity in message_ids:
            self._move()
            reply = self._replies.pop(identity, None)
            if reply is not None:
                yield decode(reply)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        waiting, replies = self.push_messages(messages), list[Message]()
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting and (deadline is None or time.monotonic() < deadline):
            for reply in self.pull_messages(waiting):
                waiting.remove(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    def __enter__(self) -> ProcessGrid:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def _worker(self, *options: Any) -> Worker:
        return Worker(*options)

    def _move(self) -> None:
        """Send the next message to each idle worker. Then fetch the reply of one busy worker, for
        which this waits at most PAUSE seconds, and send that worker its next message. No reply is
        fetched while an earlier one has not been taken by `pull_messages`."""
        for worker in self._workers:
            self._feed(worker)
        if self._replies:
            return
        busy = [worker for worker in self._workers if worker.busy]
        if busy and (answered := self._await(busy)):
            self._take(answered)
            self._feed(answered)

    def _await(self, busy: list[Worker]) -> Worker | None:
        """Wait for at most PAUSE seconds until one of the workers `busy`, which were sent a
        message, has an answer, or its process has ended. Return this worker, or None if there is
        none by then."""
        ready = wait([worker.connection for worker in busy if worker.connection], PAUSE)
        return next((worker for worker in busy if worker.connection in ready), None)

    def _feed(self, worker: Worker) -> None:
        if not worker.busy and worker.queue:
            identity = worker.queue.popleft()
            worker.send(identity, self._waiting.pop(identity))

    def _take(self, worker: Worker) -> None:
        identity, message = worker.busy, decode(worker.message_bytes)
        try:
            errors_by_site, reply = worker.receive()
            site_errors = json.loads(errors_by_site)
        except (EOFError, OSError):
            worker.stop()
            site_errors = {}
            crashed = Message(Error(api.ErrorCode.CLIENT_APP_CRASHED), reply_to=message)
            reply = api.message_to_proto(crashed).SerializeToString()
        worker.busy, worker.message_bytes = "", b""
        self.site_errors |= {site: _error(fields) for site, fields in site_errors.items()}
        self.bytes_up[message.metadata.dst_node_id] += len(reply)
        self._replies[identity] = reply


class Worker:
    """A process and its sites. The first message to one of the sites starts the process.

    - log: the file for the process's output. Its folder also has the locks of the sites.
    - sites: node number -> site file, for the sites of this process
    - share: (number of this process, from 0; number of such processes), from which the process
      computes its part of the machine's processors
    - peers: the signing keys of all sites of the simulation, separated by spaces; "" without secure
      aggregation"""

    def __init__(self, log: Path, sites: Sites, share: tuple[int, int], peers: str) -> None:
        self.log, self.sites, self.peers = log, sites, peers
        self._share = share
        self._child: Child | None = None
        self.connection: Connection | None = None
        self.queue: deque[str] = deque()
        self.busy, self.message_bytes = "", b""  # the message that it is answering

    def send(self, identity: str, message_bytes: bytes) -> None:
        connection = self.connection or self.start()
        self.busy, self.message_bytes = identity, message_bytes
        with suppress(OSError):  # a process that has ended is noticed when its reply is read
            connection.send_bytes(message_bytes)

    def receive(self) -> tuple[bytes, bytes]:
        """Wait until the process has answered the message that was sent to it. Return two byte
        strings: the errors of its sites as JSON (site file -> the error's class and texts), and its
        reply. Errors: EOFError or OSError if the process has ended."""
        if self.connection is None:
            raise EOFError
        return self.connection.recv_bytes(), self.connection.recv_bytes()

    def start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            options = list(map(str, (theirs.fileno(), *self._share)))
            home, keep = self.log.parent, [theirs.fileno()]
            self._child = Child("sites", options, home=home, log=self.log, keep=keep)
        self.connection = Connection(ours.detach())
        self.connection.send_bytes(json.dumps([self.sites, self.peers, str(home)]).encode())
        return self.connection

    def stop(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self._child is not None:
            self._child.stop()
            self._child = None


def _error(fields: list[str]) -> FedtuneError:
    kind, *words = fields
    error_class = getattr(errors, kind, None)
    is_ours = isinstance(error_class, type) and issubclass(error_class, FedtuneError)
    return (error_class if is_ours else FedtuneError)(*words)  # type: ignore[misc]


# ----------------------------------------------------------------------------- a site's process


def main(options: list[str]) -> None:
    """Run some of a simulation's sites in this process: receive their files on a socket, then
    answer each message that comes there, until the socket is closed. options: three numbers as
    texts: the socket's file descriptor, the number of this process, from 0, and the number of such
    processes."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    descriptor, number, processes = map(int, options)
    connection = Connection(descriptor)
    listed, peers, folder = json.loads(connection.recv_bytes())
    sites = {int(node): Path(path) for node, path in listed.items()}
    from fedtune.core.training.data_parallel import share_machine

    share_machine(number, processes)
    contexts = contexts_of(sites, peers)
    with ExitStack() as held, suppress(EOFError, OSError):
        for path in sites.values():  # a process that was cut off or outlives its run may hold them
            held.enter_context(locks.hold(_lock_of(path, Path(folder))))
        while True:
            reply = answer(app, contexts, connection.recv_bytes())
            errors_by_site: dict[str, Any] = {
                site: [type(e).__name__, e.happened, e.expected, e.todo]
                for site, e in site_errors.items()
            }
            site_errors.clear()
            connection.send_bytes(json.dumps(errors_by_site).encode())
            connection.send_bytes(reply)


def _lock_of(site: Path, folder: Path) -> Path:
    return folder / f"{hashlib.sha256(bytes(site)).hexdigest()[:16]}.lock"
