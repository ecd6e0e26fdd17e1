"""Limits on what a test may take: what hangs fails alone.

A limit on the processor's seconds is none of the machine's load."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise AssertionError in this thread after so many seconds of this process's own work."""

    def late(*_: Any) -> None:
        raise AssertionError(f"it works for more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def wall_limit(seconds: int) -> Iterator[None]:
    """Fail the test in this thread after so many seconds: for what waits, and does not work. It
    should be far more than a loaded machine needs."""

    def late(*_: Any) -> None:
        pytest.fail(f"it waits for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Let this process have so many bytes more than it has: who reads without end is refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that takes no byte of any file beyond `size`, as a full one: a write is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
