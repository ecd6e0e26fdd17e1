"""Rounds begin by the clock and the plan; what cannot go on without end is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import ScheduleTable, Study, format_duration, load_study
from fedtune.core.errors import ConfigError, InfrastructureError, PolicyRefused
from fedtune.core.vault.site_checks import check_watch
from fedtune.launch.simulate import check_rounds, find_start
from fedtune.server.schedule import SimulatedClock, format_utc, next_slot, slot_start, wait
from tests.continuous.fakes import START, continuous, go, parts, sites
from tests.continuous.world import SCHEDULE, study_text
from tests.server.fakes import FakeSite, make_study

HOUR = 3600


def table(**keys: Any) -> ScheduleTable:
    return ScheduleTable.model_validate_json(json.dumps({"every": "1h", **keys}))


@pytest.mark.parametrize(
    "written, seconds",
    [("90s", 90), ("30m", 1800), ("1h", HOUR), ("2d", 172800), ("1w", 604800), (45, 45)],
)
def test_every_is_read_and_spelled(written: Any, seconds: int) -> None:
    assert table(every=written).every == seconds
    assert table(every=format_duration(seconds)).every == seconds


def test_slots_are_counted_from_the_public_start() -> None:
    plan = table(start="2026-01-05T02:00:00+02:00")
    first = plan.start_timestamp
    assert format_utc(first) == "2026-01-05T00:00:00Z"
    assert next_slot(plan, None, first - 100) == 0  # before the start: wait for it
    assert next_slot(plan, None, first + 30 * 60) == 0  # within a slot: now
    assert next_slot(plan, 0, first + 30 * 60) == 1
    assert next_slot(plan, 0, first + 5.5 * HOUR) == 5  # what was missed is not made up
    assert next_slot(plan, 7, first) == 7 + 1  # a clock that was set back
    assert slot_start(plan, 5) == first + 5 * HOUR


def test_waiting_ends_at_the_time() -> None:
    clock = SimulatedClock(10.0)
    wait(clock, 95.0)
    assert clock.now() == 95.0
    wait(clock, 5.0)
    assert clock.now() == 95.0


# ---------------------------------------------------------------------------- what is refused


def written(tmp_path: Path, old: str, new: str) -> Study:
    text = study_text(Path("/base"))
    assert text.count(old) == 1, old
    (tmp_path / "study.toml").write_text(text.replace(old, new))
    return load_study(tmp_path / "study.toml")


COUNTS = [
    'every = "50 records"', 'every = "10 patients"', 'new_records = 50', "count = 100",
    "min_units = 5", "threshold = 3", "after_patients = 10", "batch = 64",
]  # fmt: skip


@pytest.mark.parametrize("line", COUNTS)
def test_a_round_that_a_count_begins_is_refused(tmp_path: Path, line: str) -> None:
    every = line.startswith("every")
    old = 'every = "1h"'
    with pytest.raises(ConfigError, match="publishes their number"):
        written(tmp_path, old, line if every else f"{old}\n{line}")


REFUSED = [
    ("noise_multiplier = 2.5\n", "", "noise_multiplier, which sets the cost of each round"),
    ("epsilon = 3.0\n", "", "the most that one patient ever pays"),
    ("sampling_rate = 1.0", "sampling_rate = 1.0\nrounds = 4", "such a study has no last round"),
    ('unit = "patient"', 'unit = "record"', 'needs privacy.unit = "patient"'),
    ('every = "1h"', 'every = "soon"', "must be seconds"),
    ('every = "1h"', "every = 0", "every"),
    ("2026-01-05T00:00:00Z", "2026-01-05T00:00:00", "with an offset"),
    ("2026-01-05T00:00:00Z", "Monday", "with an offset"),
    ('every = "1h"', 'every = "1h"\nalpha = 0.6', "alpha"),
    (
        "[evaluation]",
        "[private_evaluation]\nnoise_multiplier = 9.0\n[evaluation]",
        "not allowed with a",
    ),
]


@pytest.mark.parametrize("old, new, says", REFUSED)
def test_what_cannot_go_on_is_an_error(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        written(tmp_path, old, new)


def test_without_public_records_nothing_could_be_judged(tmp_path: Path) -> None:
    table_ = SCHEDULE[: SCHEDULE.index("[schedule]")]
    with pytest.raises(ConfigError, match=r"needs an \[evaluation\] table"):
        written(tmp_path, table_, "\n")


def test_a_plan_without_a_schedule_is_as_it_was() -> None:
    usual = make_study()
    assert "schedule" not in usual.model_dump_json()
    assert continuous().digest != usual.digest and "schedule" in continuous().model_dump_json()
    assert "schedule" not in usual.model_dump(mode="json")  # which the digest is over


def test_a_site_takes_part_only_in_what_it_was_started_for() -> None:
    check_watch(continuous(), True)
    check_watch(make_study(), False)
    check_watch(continuous(), None)  # simulation: there is nobody to ask
    with pytest.raises(PolicyRefused, match="this site runs without --watch"):
        check_watch(continuous(), False)
    with pytest.raises(PolicyRefused, match=r"no \[schedule\]"):
        check_watch(make_study(), True)


def test_the_choice_reaches_the_plan(trial: Any) -> None:
    run = trial(*sites())
    for watch, study, fails in ((False, continuous(), True), (True, continuous(), False)):
        grid = run.grid()
        for context in grid._contexts.values():
            context.node_config["watch"] = watch
        if fails:
            with pytest.raises(Exception, match="this site runs without --watch"):
                run.run(study, grid=grid, parts=parts(1), out=run.folder / "refused")
        else:
            run.run(study, grid=grid, parts=parts(1))


def test_simulate_wants_to_know_when_to_stop() -> None:
    check_rounds(continuous(), 3)
    check_rounds(make_study(), None)
    with pytest.raises(ConfigError, match="--rounds N"):
        check_rounds(continuous(), None)
    with pytest.raises(ConfigError, match="--rounds is for"):
        check_rounds(make_study(), 3)


def test_a_simulation_begins_at_the_plans_start_whenever_it_runs() -> None:
    study = continuous()
    assert find_start(study) is None  # no start: it begins now
    assert study.schedule
    table = study.schedule.model_copy(update={"start": "2026-03-30T02:00:00Z"})
    at = find_start(study.model_copy(update={"schedule": table}))
    assert at == table.start_timestamp and next_slot(table, None, at) == 0
    assert find_start(make_study()) is None


# ------------------------------------------------------------------------------ the coordinator


def slots(run: Any) -> list[int]:
    text = (run.folder / "out" / "metrics.jsonl").read_text()
    return [json.loads(line)["slot"] - int(START) // HOUR for line in text.splitlines()]


def test_one_round_in_each_slot_until_it_is_stopped(trial: Any) -> None:
    run, clock = trial(*sites()), SimulatedClock(START + 10)
    go(run, 3, clock)
    assert slots(run) == [0, 1, 2] and clock.now() == START + 2 * HOUR
    told = [data for kind, data in run.events if kind == "waiting"]
    assert [data["next"] for data in told] == [format_utc(START + n * HOUR) for n in range(3)]


def test_a_restart_has_no_second_round_in_a_slot_and_makes_nothing_up(trial: Any) -> None:
    run = trial(*sites())
    go(run, 2, SimulatedClock(START))
    go(run, 3, SimulatedClock(START + HOUR + 60))  # within the slot of round 2
    go(run, 4, SimulatedClock(START + 9.5 * HOUR))  # after six missed ones
    assert slots(run) == [0, 1, 2, 9]
    assert run.sites[0].calls == [1, 2, 3, 4]


def test_a_round_that_too_few_deliver_is_left_out_and_the_study_goes_on(trial: Any) -> None:
    lost: dict[int, Any] = dict.fromkeys(range(2, 6), InfrastructureError("power cut"))
    run = trial(FakeSite("a"), FakeSite("b", script=lost))
    body = go(run, 2, skip=True)
    assert slots(run) == [0, 2]
    assert [entry["participants"] for entry in body["rounds"]] == [["a", "b"]] * 2
    whole = trial(*sites(), folder="whole")
    go(whole, 2)  # what site a delivered in vain is in no round
    assert load_all(run) == load_all(whole)


def test_where_nobody_is_to_come_a_round_that_fails_is_an_error(trial: Any) -> None:
    """A simulation would go on for ever."""
    run = trial(FakeSite("a"), FakeSite("b", script=dict.fromkeys(range(2, 99), OSError())))
    with pytest.raises(InfrastructureError, match="1 sites delivered"):
        go(run, 2)


def load_all(run: Any) -> Any:
    from fedtune.server.store import load

    kept = load(run.folder / "out", continuous())
    assert kept is not None
    return {name: array.tolist() for name, array in kept.adapter.items()}


def test_the_report_states_the_lifetime_at_most(trial: Any) -> None:
    dear = {"epsilon": lambda events, delta: 3.0 * sum(n for _, _, n, _ in events)}
    run = trial(*sites())
    assert go(run, 2, **dear)["privacy"]["epsilon"] == 6.0
    body = go(run, 5, SimulatedClock(START + 9 * HOUR), **dear)
    assert body["privacy"]["epsilon"] == 8.0  # the plan's; sites leave who has spent it out
    assert body["continuous"]["version in use"] == 5 or body["continuous"]["versions kept back"]
