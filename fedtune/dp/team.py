"""Several processes at one site that add up one step, under the guarantee of one process.

    rank 0      draws the rows, deals them out, adds the noise, writes the log
    the others  clip and add up the rows that they were dealt, no more

Integers add exactly, so the sum is the one that a single process makes. Gloo carries it, over
loopback: JSON and plain tensors, no pickle."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from fedtune.errors import InfrastructureError

AddUp = Callable[[list[int]], torch.Tensor]  # rows -> their clipped sum, int64 (d,)
FOREVER = 10 * 365 * 86400.0  # seconds: how long a rank waits for work; it ends with rank 0


class Team(Protocol):
    """What a step asks of the processes beside it."""

    def total(self, sampled: list[int], dimension: int, own: AddUp) -> torch.Tensor:
        """Σ of the clipped rows `sampled` over all processes, int64 (dimension,); `own` adds up
        those that fall to this one.

        Guarantee: each of `sampled` is in the sum exactly once, else nothing is returned.
        Errors: InfrastructureError where another process failed; `own`'s own errors."""
        ...


class Group:
    """Process `rank` of `size`, once all of them are there. One group per process at a time.

    store: where they find each other; None: where torchrun's environment says. patience: seconds
    to wait for the others in each exchange.
    Errors, of every method: InfrastructureError where another process is gone or silent."""

    def __init__(self, rank: int, size: int, patience: float, store: Store | None) -> None:
        self.rank, self.size = rank, size
        os.environ["GLOO_SOCKET_IFNAME"] = _loopback()
        with _named():
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank if store else -1,
                world_size=size if store else -1,
                timeout=timedelta(seconds=patience),
            )

    def send(self, header: dict[str, Any], tensors: Sequence[torch.Tensor] = ()) -> None:
        """Rank 0: `header` (JSON) and `tensors` to all others."""
        forms = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        text = json.dumps({**header, "tensors": forms}).encode()
        with _named():
            dist.broadcast(torch.tensor([len(text)]), 0)
            for tensor in (torch.frombuffer(bytearray(text), dtype=torch.uint8), *tensors):
                if tensor.numel():
                    dist.broadcast(tensor.contiguous(), 0)

    def receive(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """The others: what rank 0 sent."""
        length = torch.zeros(1, dtype=torch.int64)
        with _named():
            dist.broadcast(length, 0)
            text = torch.zeros(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0)
            header = json.loads(text.numpy().tobytes())
            tensors = [torch.zeros(s, dtype=getattr(torch, d)) for d, s in header.pop("tensors")]
            for tensor in tensors:
                if tensor.numel():
                    dist.broadcast(tensor, 0)
        return header, tensors

    def add_up(self, mine: torch.Tensor) -> torch.Tensor:
        """Σ over all processes of `mine`, which is overwritten: at rank 0 by the sum, at the others
        by zeros."""
        with _named():
            dist.reduce(mine, 0)
        return mine if self.rank == 0 else mine.zero_()

    def close(self) -> None:
        dist.destroy_process_group()


def meeting(place: Path, size: int) -> Store:
    """Where `size` processes find each other: a file that none but they may write."""
    return FileStore(str(place), size)


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
    whole = group.add_up(mine)
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
    except RuntimeError as error:  # gloo: connection closed, timed out
        raise InfrastructureError(
            "a process of this site's team is gone or does not answer",
            "every process that was started",
            "read the team's logs in the site's state folder; the next round starts them anew",
        ) from error


def _loopback() -> str:
    """The name of the loopback interface: gloo listens nowhere else."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), "lo")
