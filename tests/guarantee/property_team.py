"""Other processes of a site's team, and the checks before a site joins, for the property."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fedtune.cli.halves
import fedtune.launch.site
from fedtune.core.errors import FedtuneError, InfrastructureError
from fedtune.core.registry import process_cache
from fedtune.core.vault import rank_process
from fedtune.officer.before_joining import check_before_joining


class ForkedRank:
    """Stands in for `fedtune.core.processes.Child`: the same program in a fork of this process,
    which has every library loaded already. It ends when rank 0 closes its connection."""

    def __init__(
        self, program: str, options: Sequence[str], *, home: Path, log: Path, **_: Any
    ) -> None:
        assert program == "rank"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._ended: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                with open(log, "wb", buffering=0) as sink:
                    os.dup2(sink.fileno(), 1)
                    os.dup2(sink.fileno(), 2)
                torch.set_num_threads(1)  # a fork has none of the threads of a pool
                process_cache.clear()
                rank_process.main(list(options))
            finally:
                os._exit(0)

    @property
    def alive(self) -> bool:
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._ended = status if pid else None
        return self._ended is None

    def build_end_error(self) -> InfrastructureError:
        return InfrastructureError("a process of this site's team ended by itself")

    def kill(self) -> None:
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            _, self._ended = os.waitpid(self.pid, 0)

    def __enter__(self) -> ForkedRank:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def forked_ranks() -> Iterator[None]:
    """Ranks that start in the block are forks; where there is a GPU, programs of their own."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(rank_process, "Child", ForkedRank)
        yield


class Joined(BaseException):
    """Raised where `fedtune client` has checked everything that it checks and would now connect."""


def joins(site: Path, watch: bool) -> bool:
    """Whether `fedtune client` comes as far as connecting to the coordinator."""

    def connect(*_: object) -> None:
        raise Joined

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedtune.launch.site, "read_link", connect)
        # What is checked in a process of its own is checked in this one, where a test can break it.
        patch.setattr(fedtune.launch.site, "check", lambda site, _: check_before_joining(site))
        try:
            fedtune.cli.halves.client(site, once=True, watch=watch)
        except Joined:
            return True
        except FedtuneError:
            return False
    raise AssertionError("it neither joined nor said why not")
