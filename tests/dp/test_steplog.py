"""The step log on a disk that fills up: a line is whole before its step runs, or is no step."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.errors import InfrastructureError
from fedtune.core.files import writing
from tests.test_files import Recorded, files_of_at_most


def step(round_: int) -> Step:
    return Step(
        study="sha256:0",
        round=round_,
        noise_multiplier=1.0,
        sampling_rate=0.5,
        max_grad_norm=1.0,
        unit="record",
    )


def test_a_step_is_on_disk_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: a line that is appended as a loss is, on which nothing depends."""
    log, recorded = StepLog(tmp_path / "steps.jsonl"), Recorded()
    monkeypatch.setattr(writing, "os", recorded)
    log.append(step(1))
    assert recorded.calls == ["write", "fsync", "close", "open", "fsync", "close"]  # and its name
    log.append(step(2))
    assert recorded.calls[6:] == ["write", "fsync", "close"]
    writing.append_line(log.path, b"", durably=False)
    assert recorded.calls[9:] == ["write", "close"]


@pytest.mark.parametrize("room", [0, 1, 40, -1])
def test_a_full_disk_stops_the_step_and_leaves_no_half_of_it(tmp_path: Path, room: int) -> None:
    """room: bytes of the second line that the disk takes; -1: all but the newline."""
    log = StepLog(tmp_path / "steps.jsonl")
    log.append(step(1))
    line = log.path.stat().st_size
    with (
        files_of_at_most(line + room % line),
        pytest.raises(InfrastructureError, match="no step runs unless it is logged"),
    ):
        log.append(step(2))
    assert log.path.stat().st_size == line + room % line
    assert log.steps() == [step(1)]  # as after a crash: what is torn never ran
    log.append(step(3))
    assert log.steps() == [step(1), step(3)]
    assert len(log.path.read_text().splitlines()) == 2


def test_a_rounds_steps_are_one_line_that_is_written_before_the_first(tmp_path: Path) -> None:
    """A disk that fills up in a round stops none of its steps, and how long a round is decides
    nothing about how much is written."""
    log = StepLog(tmp_path / "steps.jsonl")
    log.append(step(1), of_round=9)
    line = log.path.stat().st_size
    with files_of_at_most(line):
        for _ in range(8):
            log.append(step(1), of_round=9)
    assert log.path.stat().st_size == line and log.steps() == [step(1)] * 9
    log.append(step(1), of_round=9)  # the round again, and the next one, which breaks off
    log.append(step(2), of_round=9)
    assert len(log.path.read_text().splitlines()) == 3
    assert StepLog(log.path).steps() == log.steps() == [step(1)] * 18 + [step(2)] * 9
    StepLog(log.path).append(step(2), of_round=9)  # after a restart
    assert len(log.steps()) == 36


def test_an_attempt_that_follows_one_that_broke_off_has_a_line_of_its_own(tmp_path: Path) -> None:
    """Before its first step, so that no later one meets the disk."""
    log = StepLog(tmp_path / "steps.jsonl")
    log.append(step(1), of_round=3)  # and the round breaks off
    log.begin_round()
    log.append(step(1), of_round=3)
    assert len(log.path.read_text().splitlines()) == 2
    with files_of_at_most(log.path.stat().st_size):
        for _ in range(2):
            log.append(step(1), of_round=3)
    assert log.steps() == [step(1)] * 6


@pytest.mark.parametrize("count", ["0", "-1", "true", "1.5", "null"])
def test_a_line_of_an_impossible_number_of_steps_is_an_error(tmp_path: Path, count: str) -> None:
    log = StepLog(tmp_path / "steps.jsonl")
    log.append(step(1))
    log.path.write_text(log.path.read_text().replace("{", f'{{"steps": {count}, '))
    with pytest.raises(InfrastructureError, match="line 1 is not a step"):
        log.steps()


def test_a_line_that_is_no_step_is_an_error(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps.jsonl")
    log.append(step(1))
    log.path.write_text("{}\n" + log.path.read_text())
    with pytest.raises(InfrastructureError, match="line 1 is not a step"):
        log.steps()


def test_a_hospitals_memberships_log_their_steps_apart(tmp_path: Path) -> None:
    """A line of a site whose log is its own is as it was, and read by whoever takes it over."""
    own, onco, cardio = (StepLog(tmp_path / "steps.jsonl", name) for name in ("", "onco", "cardio"))
    for log in (own, onco, cardio):
        log.append(step(1), of_round=2)
        log.append(step(1), of_round=2)
    lines = own.path.read_text().splitlines()
    assert ["membership" in line for line in lines] == [False, True, True]
    assert len(own.steps()) == 6
    assert {s.membership for s in own.steps("sha256:0", {"", "onco"})} == {"", "onco"}
    assert (
        len(own.steps("sha256:0", {"cardio"})) == 2 and own.steps("sha256:0", {""}) == [step(1)] * 2
    )
