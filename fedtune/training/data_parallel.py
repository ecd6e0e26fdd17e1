"""Several processes at one site that add up one step, under the guarantee of one process.

    rank 0      draws the rows, deals them out, adds the noise, writes the log
    the others  clip and add up the rows that they were dealt, no more

Integers add exactly, so the sum is the one that a single process makes. A Unix socket carries it,
in a folder of the site's user alone: JSON and plain tensors, no pickle. (PyTorch's gloo listens on
ports that every account of the machine can connect to, and asks nobody who he is.)"""

from __future__ import annotations

import hashlib
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

from fedtune.data.dataset import Dataset
from fedtune.dp.plan import AddUp
from fedtune.errors import InfrastructureError
from fedtune.models.prefix_store import PREFIX_STORE

RENDEZVOUS_SECONDS = 1800.0  # that a rank without patience looks for rank 0


class Group:
    """Process `rank` of `size`, once all of them are there.

    place: a socket in a folder of this user alone, which rank 0 makes and the others look for;
    patience: seconds to wait for the others in each exchange (None: for ever); alive: called while
    rank 0 waits for the others to come, and raises where that is in vain.
    Guarantee: nobody else on this machine joins, reads or sends: the folder keeps other users out,
    and the system vouches for the user at the other end.
    Errors, of every method: InfrastructureError where another process is gone or silent."""

    def __init__(
        self,
        rank: int,
        size: int,
        timeout: float | None,
        place: Path,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank, self.size, self._leads = rank, size, rank == 0
        with _named():
            if self._leads:
                self._ends = _gathered(place, size, timeout, alive)
            else:
                self._ends = [_joined(place, rank, timeout)]

    def send(self, header: dict[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Rank 0: `header` (JSON) and `tensors` to all others."""
        forms = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        text = json.dumps({**header, "tensors": forms}).encode()
        with _named():
            for end in self._ends:
                end.sendall(struct.pack("!Q", len(text)) + text)
                for tensor in tensors:
                    end.sendall(_bytes_of(tensor.contiguous()))

    def receive(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """The others: what rank 0 sent."""
        (end,) = self._ends
        with _named():
            text = bytearray(*struct.unpack("!Q", _filled(end, bytearray(8))))
            header = json.loads(_filled(end, text))
            tensors = [torch.zeros(s, dtype=getattr(torch, d)) for d, s in header.pop("tensors")]
            for tensor in tensors:
                _filled(end, _bytes_of(tensor))
        return header, tensors

    def reduce_sum(self, mine: torch.Tensor) -> torch.Tensor:
        """Σ over all processes of `mine`, which is overwritten: at rank 0 by the sum, at the others
        by zeros."""
        with _named():
            if not self._leads:
                self._ends[0].sendall(_bytes_of(mine))
                return mine.zero_()
            part = torch.zeros_like(mine)
            for end in self._ends:
                _filled(end, _bytes_of(part))
                mine += part
            part.zero_()
        return mine

    def close(self) -> None:
        for end in self._ends:
            end.close()


def _gathered(
    place: Path, size: int, timeout: float | None, alive: Callable[[], None]
) -> list[socket.socket]:
    """The other processes, by rank; who is of another user, or no rank, is turned away."""
    ends: dict[int, socket.socket] = {}
    deadline = None if timeout is None else time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(place))
        try:
            door.listen(size)
            door.settimeout(0.1)
            while len(ends) < size - 1:
                alive()
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError
                with suppress(TimeoutError):
                    end, _ = door.accept()
                    rank = _greeted(end)
                    if 0 < rank < size and rank not in ends:
                        end.settimeout(timeout)
                        ends[rank] = end
                    else:
                        end.close()
        except BaseException:
            for end in ends.values():
                end.close()
            raise
        finally:
            place.unlink(missing_ok=True)
    return [ends[rank] for rank in sorted(ends)]


def _greeted(end: socket.socket) -> int:
    """Which rank is there; 0: none of ours."""
    end.settimeout(5.0)
    with suppress(OSError):
        if _user(end) == os.getuid():
            return int(struct.unpack("!Q", _filled(end, bytearray(8)))[0])
    return 0


def _user(end: socket.socket) -> int:
    """Whose process is at the other end, as the system says."""
    peer = getattr(socket, "SO_PEERCRED", None)
    if peer is None:
        return os.getuid()  # not Linux: the folder alone keeps others out
    told = end.getsockopt(socket.SOL_SOCKET, peer, struct.calcsize("3i"))
    return int(struct.unpack("3i", told)[1])


def _joined(place: Path, rank: int, timeout: float | None) -> socket.socket:
    deadline = time.monotonic() + (RENDEZVOUS_SECONDS if timeout is None else timeout)
    while True:
        end = socket.socket(socket.AF_UNIX)
        try:
            end.connect(str(place))
            break
        except OSError:
            end.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    if _user(end) != os.getuid():
        end.close()
        raise ConnectionError
    end.settimeout(timeout)
    end.sendall(struct.pack("!Q", rank))
    return end


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


B = TypeVar("B", bytearray, memoryview)


def _filled(end: socket.socket, room: B) -> B:
    view = memoryview(room)
    while len(view):
        got = end.recv_into(view)
        if not got:
            raise ConnectionError
        view = view[got:]
    return room


def summed(group: Group, sampled: list[int], dimension: int, own: AddUp) -> torch.Tensor:
    """One process' part in `Team.total`: every process calls it with the same `sampled`, and rank 0
    gets the sum. Whoever has no row, or fails, takes part with zeros, so that nobody waits.

    Errors: as `Team.total`."""
    # Behind the sum, for each row, how often it was added up: a count alone could be fooled by one
    # row missed and one doubled.
    mine = torch.zeros(dimension + len(sampled), dtype=torch.int64)
    failure: Exception | None = None
    try:
        share = slice(group.rank, None, group.size)
        part = own(sampled[share])
        mine[:dimension] = part
        part.zero_()
        mine[dimension:][share] = 1
    except Exception as error:
        failure = error
    whole = group.reduce_sum(mine)
    if failure is not None:
        raise failure
    if group.rank == 0 and not bool((whole[dimension:] == 1).all()):
        whole.zero_()
        raise InfrastructureError(
            "another process of this site's team did not add up its rows",
            "each sampled row once",
            "read the team's logs in the site's state folder; nothing of the step was released",
        )
    return whole[:dimension]


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # closed, or silent for too long
        raise InfrastructureError(
            "a process of this site's team is gone or does not answer",
            "every process that was started",
            "read the team's logs in the site's state folder; the next round starts them anew",
        ) from error


def fingerprint(dataset: Dataset) -> str:
    """sha256 of every record as it trains, in order: two processes whose fingerprints agree mean
    the same record by the same row."""
    total = hashlib.sha256()
    for example in dataset.examples:
        media = example.media.digest.hex() if example.media else ""
        total.update(f"{example.unit} {example.label} {media} ".encode())
        for passage in example.passages:
            parts = (passage.input_ids.tobytes(), passage.target_ids.tobytes())
            total.update(f"{len(parts[0])} ".encode() + b"".join(parts))
    return total.hexdigest()


def share_machine(number: int, size: int) -> None:
    """Be number `number` of `size` processes that do the same work on this machine: a share of its
    cores and of the memory for states, and a GPU of its own as far as there are some."""
    PREFIX_STORE.processes = size
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
