"""Pauses between two looks: they follow the wait, within their bounds."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from fedtune.flower.polling import LOOK_SECONDS, REPLY_SECONDS, Impatient, Poll


class Clock:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_what_comes_soon_is_seen_soon_and_a_long_wait_costs_little(clock: Clock) -> None:
    with patch("fedtune.flower.polling.time", clock):
        poll = Poll(0.05, 1.0)
        while clock.now < 160.0:
            waited = clock.now - 100.0
            poll.pause()
            assert clock.slept[-1] == pytest.approx(min(max(waited / 10, 0.05), 1.0))
        looks = len(clock.slept)
        assert looks < 110 and clock.slept[-1] == 1.0
        poll.again()
        poll.pause()
        assert clock.slept[-1] == 0.05


def test_a_supernode_sleeps_as_long_as_what_it_waits_for_allows(clock: Clock) -> None:
    """Idle, a second at most; for an answer in its own memory, less; each wait starts anew."""
    with patch("fedtune.flower.polling.time", clock):
        impatient = Impatient()
        for _ in range(200):
            impatient.sleep(3)
        assert (clock.slept[0], clock.slept[-1]) == LOOK_SECONDS
        impatient.sleep(0.5)
        assert clock.slept[-1] == REPLY_SECONDS[0]
        for _ in range(200):
            impatient.sleep(0.5)
        assert clock.slept[-1] == REPLY_SECONDS[1]
        impatient.sleep(3)
        assert clock.slept[-1] == LOOK_SECONDS[0]
