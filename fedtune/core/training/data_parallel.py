"""Share one step among several processes of a site, under the guarantee of one process.

    rank 0       samples the rows, distributes them, adds the noise, writes the step log
    other ranks  clip and sum the rows assigned to them, no more

Integer addition is exact, so the sum is the one that a single process computes. The processes send
each other JSON and raw tensors, without pickle, over a Unix socket in a folder of the site's user.
(PyTorch's gloo listens on ports that every account of the machine can connect to, without
authentication.)"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedtune.core.dp.plan import ClippedSum
from fedtune.core.errors import InfrastructureError, is_fault
from fedtune.core.models.prefix_store import PREFIX_STORE

RENDEZVOUS_SECONDS = 1800.0  # how long a rank without a timeout tries to reach rank 0


class Group:
    """The connections of one process of a team to the other processes. The constructor returns once
    all are connected.

    - socket_path: a Unix socket in a folder that only this user can open; rank 0 creates it and the
      others connect to it
    - rank, size: the number of this process, from 0, and how many processes there are
    - timeout: seconds to wait for the others in each exchange; None: for ever
    - check_alive: called while rank 0 waits for the others to connect; it raises if one of them has
      ended

    Guarantee: no other user of this machine joins, reads or sends. The folder's permissions keep
    them out and, on Linux, the kernel reports the user of the connecting process. Errors, of every
    method: InfrastructureError if another process is gone or silent."""

    def __init__(
        self,
        rank: int,
        size: int,
        timeout: float | None,
        socket_path: Path,
        check_alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank = rank
        self.size = size
        self._is_leader = rank == 0
        with _as_infrastructure_error():
            if self._is_leader:
                self._peers = _accept_peers(socket_path, size, timeout, check_alive)
            else:
                self._peers = [_connect(socket_path, rank, timeout)]

    def send(self, header: dict[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Send a message from rank 0 to all other processes. header: a dict for JSON; tensors: the
        tensors that go with it."""
        shapes = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        text = json.dumps({**header, "tensors": shapes}).encode()
        with _as_infrastructure_error():
            for peer in self._peers:
                peer.sendall(struct.pack("!Q", len(text)) + text)
                for tensor in tensors:
                    peer.sendall(_bytes_of(tensor.contiguous()))

    def receive(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Receive a message from rank 0, and return its header and tensors. Only the other ranks
        call this."""
        (peer,) = self._peers
        with _as_infrastructure_error():
            text = bytearray(*struct.unpack("!Q", _receive_into(peer, bytearray(8))))
            header = json.loads(_receive_into(peer, text))
            tensors = [torch.zeros(s, dtype=getattr(torch, d)) for d, s in header.pop("tensors")]
            for tensor in tensors:
                _receive_into(peer, _bytes_of(tensor))
        return header, tensors

    def reduce_sum(self, mine: torch.Tensor) -> torch.Tensor:
        """Add up the tensors `mine` of all processes, and return `mine`. Each process's tensor is
        overwritten: at rank 0 by the sum, at the others by zeros."""
        with _as_infrastructure_error():
            if not self._is_leader:
                self._peers[0].sendall(_bytes_of(mine))
                return mine.zero_()
            received = torch.zeros_like(mine)
            for peer in self._peers:
                _receive_into(peer, _bytes_of(received))
                mine += received
            received.zero_()
        return mine

    def close(self) -> None:
        for peer in self._peers:
            peer.close()


def _accept_peers(
    socket_path: Path, size: int, timeout: float | None, check_alive: Callable[[], None]
) -> list[socket.socket]:
    """Accept the other processes, and return their connections in rank order; other users and
    unknown ranks are refused.

    - socket_path: where the Unix socket is made; it is removed before this returns or raises
    - size: the number of processes, this one included
    - timeout: seconds in which all must connect, and the limit of each later send or receive;
      None: no limit
    - check_alive: called about every 0.1 seconds while this waits; it raises if a process has ended

    Errors: TimeoutError if not all connect in time; those of `check_alive`; OSError."""
    peers: dict[int, socket.socket] = {}
    deadline = None if timeout is None else time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path))
        try:
            listener.listen(size)
            listener.settimeout(0.1)
            while len(peers) < size - 1:
                check_alive()
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError
                with suppress(TimeoutError):
                    peer, _ = listener.accept()
                    rank = _handshake(peer)
                    if 0 < rank < size and rank not in peers:
                        peer.settimeout(timeout)
                        peers[rank] = peer
                    else:
                        peer.close()
        except BaseException:
            for peer in peers.values():
                peer.close()
            raise
        finally:
            socket_path.unlink(missing_ok=True)
    return [peers[rank] for rank in sorted(peers)]


def _handshake(peer: socket.socket) -> int:
    """Return the rank of a process that connects; 0 if it must be refused, since it does not belong
    to this group."""
    peer.settimeout(5.0)
    with suppress(OSError):
        if _peer_user(peer) == os.getuid():
            return int(struct.unpack("!Q", _receive_into(peer, bytearray(8)))[0])
    return 0


def _peer_user(peer: socket.socket) -> int:
    """Return the user id of the process at the other end of the socket, as Linux reports it. On
    other systems return this process's own user id: there only the permissions of the socket's
    folder keep other users out."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return os.getuid()  # not Linux: the folder alone keeps others out
    credentials = peer.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _connect(socket_path: Path, rank: int, timeout: float | None) -> socket.socket:
    deadline = time.monotonic() + (RENDEZVOUS_SECONDS if timeout is None else timeout)
    while True:
        peer = socket.socket(socket.AF_UNIX)
        try:
            peer.connect(str(socket_path))
            break
        except OSError:
            peer.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    if _peer_user(peer) != os.getuid():
        peer.close()
        raise ConnectionError
    peer.settimeout(timeout)
    peer.sendall(struct.pack("!Q", rank))
    return peer


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory that a contiguous tensor occupies, so that bytes can be sent from it or
    received into it."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


B = TypeVar("B", bytearray, memoryview)


def _receive_into(peer: socket.socket, buffer: B) -> B:
    view = memoryview(buffer)
    while len(view):
        count = peer.recv_into(view)
        if not count:
            raise ConnectionError
        view = view[count:]
    return buffer


def sum_over_workers(
    group: Group, sampled: list[int], dimension: int, clipped_sum: ClippedSum
) -> torch.Tensor:
    """Sum the clipped rows over all processes. Each process calls this with the same `sampled`, and
    sums its share by `clipped_sum`; rank 0 gets the sum, int64 (dimension,), the others zeros. A
    process without rows, or one that fails, sends zeros, so that no other process waits for it.

    - group: this process's connections to the others
    - sampled: the numbers of all rows drawn for the step; process r of n sums sampled[r::n]
    - dimension: d, the number of entries of a row's gradient
    - clipped_sum: computes the clipped sum of the rows that it gets, int64 (dimension,), in
      multiples of the plan's grid

    Errors: InfrastructureError if another process is gone or did not sum its rows; those of
    `clipped_sum`, raised after this process has sent its zeros."""
    # After the sum, one counter per row: how often it was added. A total number of rows alone could
    # not show that one row was missed and another added twice.
    counted_sum = torch.zeros(dimension + len(sampled), dtype=torch.int64)
    failure: BaseException | None = None
    try:
        share = slice(group.rank, None, group.size)
        partial = clipped_sum(sampled[share])
        counted_sum[:dimension] = partial
        partial.zero_()
        counted_sum[dimension:][share] = 1
    except BaseException as error:
        if not is_fault(error):
            raise
        failure = error
    total = group.reduce_sum(counted_sum)
    if failure is not None:
        total.zero_()
        raise failure
    if group.rank == 0 and not bool((total[dimension:] == 1).all()):
        total.zero_()
        raise InfrastructureError(
            "another of the processes that share this site's steps did not sum its rows",
            "each sampled row once",
            "read the logs rank-*.log in the site's state folder; nothing of the step was released",
        )
    return total[:dimension]


@contextmanager
def _as_infrastructure_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # closed, or silent for too long
        raise InfrastructureError(
            "a process that shares this site's steps is gone or does not answer",
            "every process that was started",
            "read the logs rank-*.log in the site's state folder; the next round starts them anew",
        ) from error


def share_machine(index: int, processes: int) -> None:
    """Limit a process to its share of this machine, on which several equal ones run: of the cores,
    and of the memory for cached states. With several GPUs the processes are spread over them, so
    that each has one of its own while there are enough.

    - index: the process's number, from 0
    - processes: how many there are"""
    PREFIX_STORE.processes = processes
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
