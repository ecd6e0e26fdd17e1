"""Processes for tests in which their start is not the point: forks of this one, which has every
library loaded already. A program of its own takes three seconds of a processor to import them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import fedtune.launch.process_pool
from fedtune.core.errors import InfrastructureError
from fedtune.core.processes import PROGRAMS, Program
from fedtune.core.registry import process_cache
from fedtune.core.vault import rank_process


class Fork:
    """A fork of this process that does `work` and ends, with the methods that `Popen` has for it.

    - log: the file for what it prints; None: what this process has
    - keep: numbers of this process's open files that it may use. All others lead nowhere there, so
      that a connection which is closed here is closed; their numbers stay taken, since objects that
      it inherits may close them once more"""

    def __init__(
        self, work: Callable[[], Any], *, log: Path | None = None, keep: Sequence[int] = ()
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _separate(log, {0, 1, 2, *keep})
                torch.set_num_threads(1)  # a fork has none of the threads of a pool
                process_cache.clear()
                work()
                status = 0
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 1
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds: float = 120.0) -> int:
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"it did not end in {seconds:.0f} s")
            time.sleep(0.005)
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _separate(log: Path | None, kept: set[int]) -> None:
    if log is not None:
        with open(log, "wb", buffering=0) as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/dev/fd"):
        if int(name) not in {*kept, nowhere}:
            with contextlib.suppress(OSError):
                os.fstat(int(name))  # the folder's own is closed by now
                os.dup2(nowhere, int(name))


class ForkedChild:
    """Stands in for `fedtune.core.processes.Child`: the same program in a fork. A rank ends when
    rank 0 closes its connection, and a process of a simulation when its grid does; a vault confines
    itself as it is shipped. before: statements that the fork runs first."""

    before = ""

    def __init__(
        self,
        program: Program,
        options: Sequence[str],
        *,
        home: Path,
        log: Path,
        keep: Sequence[int] = (),
    ) -> None:
        assert program in ("rank", "sites", "vault")
        log.parent.mkdir(parents=True, exist_ok=True)
        # What a vault reads there ends with the one that started it.
        stdin, self._open = os.pipe()
        self._process = Fork(
            partial(self._run, program, [*options], stdin), log=log, keep=[*keep, stdin]
        )
        os.close(stdin)
        self.pid = self._process.pid

    def _run(self, program: Program, options: list[str], stdin: int) -> None:
        os.dup2(stdin, 0)
        exec(self.before, {})
        import_module(PROGRAMS[program][0]).main(options)

    @property
    def alive(self) -> bool:
        return self.status is None

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def wait(self) -> None:
        if self._process.wait() != 0:
            raise self.build_end_error()

    def build_end_error(self) -> InfrastructureError:
        return InfrastructureError("a process of this site's team ended by itself")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._open >= 0:
            os.close(self._open)
            self._open = -1

    def __enter__(self) -> ForkedChild:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def forked_children() -> Iterator[None]:
    """Within the block, ranks and a simulation's processes are forks; where there is a GPU, or no
    fork, programs of their own."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available() and sys.platform == "linux":
            patch.setattr(rank_process, "Child", ForkedChild)
            patch.setattr(fedtune.launch.process_pool, "Child", ForkedChild)
        yield
