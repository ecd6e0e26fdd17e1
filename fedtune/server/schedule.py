"""Compute when the rounds of a study without a last round begin.

    slot k begins at start + k · every; a round runs in a slot, at most one in each

| event                                                           | what follows                 |
| the coordinator was away, or a round took longer than `every`   | missed rounds are left out   |
| the coordinator starts within a slot that has not had its round | that round begins now        |
Guarantee: the times follow only from the clock and the plan; nothing that a site sends changes any.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from fedtune.core.config import ScheduleTable

LONGEST = 30.0  # seconds of one sleep; then the clock, which somebody may have set, is read again


class Clock(Protocol):
    """The time of day, in seconds since 1970; tests and simulations provide their own."""

    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The time of day by this machine's clock. sleep: the function that is called to wait for a
    number of seconds."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sleep = sleep

    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        self._sleep(seconds)


class SimulatedClock:
    """A clock that starts at `at` (None: now) and advances only by its method `sleep`, which
    returns at once."""

    def __init__(self, at: float | None = None) -> None:
        self.at = time.time() if at is None else at

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


def next_slot(table: ScheduleTable, last: int | None, now: float) -> int:
    """Return the slot of the next round: the slot to which `now` belongs (0 before the first), or
    the slot after `last`, whichever is later. last: the slot of the latest round, None if there was
    none."""
    current = max(0, math.floor((now - table.start_timestamp) / table.every))
    return current if last is None else max(current, last + 1)


def slot_start(table: ScheduleTable, slot: int) -> float:
    """Return the time at which a slot begins, in seconds since 1970. table: the plan's
    [schedule]."""
    return table.start_timestamp + slot * table.every


def wait(clock: Clock, until: float) -> None:
    while (remaining := until - clock.now()) > 0:
        clock.sleep(min(remaining, LONGEST))


def format_utc(at: float) -> str:
    """Format a timestamp to the second, in UTC, as logs do."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
