"""Estimates of the time left, on rounds that were recorded and others that were made up: within a
factor of 1.5 of what the rest then took, after the first tenth."""

from __future__ import annotations

import io
import re
from itertools import accumulate, pairwise

import pytest
from rich.cells import cell_len
from rich.console import Console

from fedtune.cli import watch
from fedtune.cli.pace import SOONEST, RoundsPace, StepPace
from fedtune.core import progress
from fedtune.core.progress import Step
from fedtune.report.figures import duration

FACTOR = 1.5
# Three sites in one process: the seconds of each round, and those that reading the sites' records
# through the frozen layers took in the first.
HEAD = ([7.3, 1.0, 1.0, 0.9, 0.9], [2.1, 2.6, 1.6])  # as recorded, of a head on two cores
ADAPTER = ([212.0, 38.0, 36.5, 40.2, 37.1, 36.0, 39.4, 38.8], [61.0, 58.2, 55.9])  # made up


def left_after(rounds: list[float], once: list[float], heard: bool = True) -> list[float | None]:
    """What is said after each round. heard: whether the sites work in this process."""
    pace, now, said = RoundsPace(), 1000.0, list[float | None]()
    for number, seconds in enumerate(rounds, 1):
        pace.begin(now)
        at = now
        for reading in once if heard and number == 1 else ():
            pace.hear(Step("reading", 0, 512, once=True), at)
            pace.hear(Step("reading", 256, 512, once=True), at + reading / 2)
            at += reading
            pace.hear(Step("reading", 512, 512, once=True), at)
            pace.hear(Step("training", 100, 100), at)
        now += seconds
        said.append(pace.end_round(len(rounds) - number, now))
    return said


def off(rounds: list[float], said: list[float | None]) -> float:
    """The most that an estimate after the first tenth of the rounds errs by, as a factor."""
    total, worst = sum(rounds), 1.0
    for done, left in zip(accumulate(rounds), said, strict=True):
        if left is not None and total > done:
            worst = max(worst, left / (total - done), (total - done) / left)
    return worst


@pytest.mark.parametrize(("rounds", "once"), [HEAD, ADAPTER])
def test_the_first_round_does_not_count_what_no_later_one_repeats(rounds, once) -> None:
    said = left_after(rounds, once)
    assert None not in said[:-1] and said[-1] is None
    assert off(rounds, said) < FACTOR


@pytest.mark.parametrize(("rounds", "once"), [HEAD, ADAPTER])
def test_a_coordinator_that_hears_nothing_of_it_waits_for_the_second_round(rounds, once) -> None:
    said = left_after(rounds, once, heard=False)
    assert said[0] is None and None not in said[1:-1]
    assert off(rounds, said) < FACTOR


@pytest.mark.parametrize(("rounds", "once"), [HEAD, ADAPTER])
def test_twin_the_mean_of_all_rounds_is_caught(rounds, once) -> None:
    """As it was: "< 9 min" of what took 15 seconds."""
    said = [
        done / number * (len(rounds) - number) or None
        for number, done in enumerate(accumulate(rounds), 1)
    ]
    assert off(rounds, said) > FACTOR


def test_work_that_is_done_once_before_the_rounds_is_not_taken_off_them() -> None:
    pace = RoundsPace()
    for at, done in ((0.0, 0), (50.0, 9)):
        pace.hear(Step("reading public records", done, 9, once=True), at)
    pace.begin(60.0)
    assert pace.end_round(4, 70.0) is None  # whether that round read records nobody said
    assert pace.end_round(3, 80.0) == 30.0


def test_a_long_step_is_timed_from_when_it_was_heard_of() -> None:
    pace = StepPace()
    assert pace.estimate_remaining(Step("training", 10, 100), 1000.0) is None
    assert (
        pace.estimate_remaining(Step("training", 20, 100), 1000.0 + SOONEST / 2) is None
    )  # too soon
    assert pace.estimate_remaining(Step("training", 30, 100), 1020.0) == 70.0
    assert pace.estimate_remaining(Step("measuring", 1, 2), 1030.0) is None  # another step
    assert (
        pace.estimate_remaining(Step("training", 5, 100), 1040.0) is None
    )  # and another one of that name
    assert pace.estimate_remaining(Step("training", 100, 100), 1090.0) is None  # nothing is left


def test_a_time_is_written_to_a_quarter_of_itself() -> None:
    times = [float(seconds) for seconds in range(1, 20_000)]
    units = {"s": 1, "min": 60, "h": 3600}
    for seconds in times:
        number, unit = duration(seconds).split()
        assert 0.8 <= float(number) * units[unit] / seconds <= 1.25 or seconds < 2, seconds
    written = [float(n) * units[u] for n, u in (duration(s).split() for s in times)]
    assert all(earlier <= later for earlier, later in pairwise(written))


def lines_of(drawn: str) -> list[str]:
    """What a terminal drew, without the codes that move its cursor."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_shows_how_much_is_done_and_how_long_the_rest_takes(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, now = io.StringIO(), 1000.0
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    with watch.Watch(console, "preparing") as screen, progress.stage("site 2 of 3, north, round 1"):
        for done in (0, 250, 500):
            progress.report("reading records once through the frozen layers", done, 1000)
            now += 200
        screen._bar.refresh()
    shown = file.getvalue()
    assert "site 2 of 3, north, round 1: re" in shown and "50%, 7 min left" in shown
    assert max(cell_len(line) for line in lines_of(shown)) <= width
