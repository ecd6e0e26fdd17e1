"""Sites of which a person has yet to sign the plan: the coordinator waits for them, within a
deadline."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.core.config import Study
from fedtune.core.errors import InfrastructureError, Refused
from fedtune.core.vault.prepared import Admission, Held, Unprepared, Void
from fedtune.flower.grid import InProcessGrid
from fedtune.server import admission, rounds
from fedtune.server.turns import Turn
from tests.expected import raises_nothing
from tests.server.fakes import FakeSite, grid_of, make_parts, make_study

REASON = 'policy.admission = "reviewed" and nobody at the site has signed this plan'


@dataclass
class Unsigned(FakeSite):
    """Waits for a person, who signs before it is asked for the `signed`-th time."""

    signed: int = 3

    def prepare(self, study: Study, frozen: dict[str, np.ndarray], coordinator: str) -> Admission:
        answer = super().prepare(study, frozen, coordinator)
        if self.prepared >= self.signed:
            return answer
        self.known = False
        return Admission(False, REASON, self.name, self.size, waits=True)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again without a pause."""
    monkeypatch.setattr(admission, "ASK_SECONDS", (0.0, 0.0))


def waits(trial: Any) -> list[dict[str, Any]]:
    """What was said of sites that wait."""
    return [data for kind, data in trial.events if data.get("status") == "waiting"]


def test_the_study_goes_on_when_somebody_has_signed(trial: Any, at_once: None) -> None:
    late = Unsigned("b")
    run = trial(FakeSite("a"), late)
    body = run.run(parts=make_parts(waits=True, signing=60.0))
    assert [r["participants"] for r in body["rounds"]] == [["a", "b"]] * 4
    assert late.prepared == 3 and late.calls == [1, 2, 3, 4]
    (said,) = waits(run)  # once, however often it was asked
    assert said["name"] == "b" and "policy.admission" in said["reason"]
    steps = [data.get("text", "") for kind, data in run.events if kind == "step"]
    assert any("waiting for people at b to sign" in text for text in steps)
    assert body["sites"] == {"a": "admitted", "b": "admitted"}


def test_it_ends_where_nobody_signs_within_the_deadline(trial: Any, at_once: None) -> None:
    """Twin: with time left the same sites train."""
    run = trial(FakeSite("a"), Unsigned("b"))
    with pytest.raises(Refused, match=r"b: waiting: policy\.admission") as caught:
        run.run(parts=make_parts(waits=True, signing=0.0))
    assert caught.value.exit_code == 3 and run.sites[0].calls == run.sites[1].calls == []
    assert not (run.folder / "out").exists()
    assert run.run(parts=make_parts(waits=True, signing=60.0))["rounds"]


def test_those_who_suffice_begin_and_the_others_follow(trial: Any, at_once: None) -> None:
    run = trial(FakeSite("a"), FakeSite("b"), Unsigned("c", signed=4))
    body = run.run(parts=make_parts(waits=True, signing=60.0))
    assert [r["participants"] for r in body["rounds"]] == [["a", "b"]] * 2 + [["a", "b", "c"]] * 2
    assert "waiting: policy.admission" in body["rounds"][0]["missing"]["c"]


def test_a_refusal_that_leaves_too_few_ends_the_wait(trial: Any, at_once: None) -> None:
    run = trial(FakeSite("a", refusal="policy.max_epsilon"), Unsigned("b"))
    with pytest.raises(Refused, match=r"a: refused: policy\.max_epsilon"):
        run.run(parts=make_parts(waits=True, signing=60.0))


class CutOff(InProcessGrid):
    """A network that loses node 2 once the first round is over, for as long as it is looked for
    `away` times; None: for good."""

    away: int | None = 20
    looked: int | None = None

    def get_node_ids(self) -> list[int]:
        there = [*super().get_node_ids()]
        if self.looked is None:
            return there
        self.looked += 1
        return there if self.away is not None and self.looked > self.away else there[:1]


def lose_b(run: Any, **options: Any) -> Any:
    """Run a study of the sites a and b, of which b is cut off after round 1."""
    grid = grid_of(["a", "b"], CutOff)
    grid.away = options.pop("away", CutOff.away)

    def hear(kind: str, data: dict[str, Any]) -> None:
        run.events.append((kind, data))
        if kind == "round" and grid.looked is None:
            grid.looked = 0

    study = make_study(min_sites=2, round_timeout=options.pop("timeout", 60.0))
    return run.run(study, grid=grid, parts=make_parts(**options), on_event=hear)


def test_a_round_waits_for_a_site_that_the_network_lost(trial: Any) -> None:
    """For far longer than a round's retries take; nobody trains twice. Twin: a coordinator that
    does not wait, as in a simulation, gives up."""
    run = trial(FakeSite("a"), FakeSite("b"))
    with raises_nothing():
        body = lose_b(run, waits=True)
    assert [r["participants"] for r in body["rounds"]] == [["a", "b"]] * 4
    assert run.sites[0].calls == run.sites[1].calls == [1, 2, 3, 4]
    said = [data["text"] for kind, data in run.events if "too few sites" in data.get("text", "")]
    assert len(said) == 1 and "b: failed: the site is not connected" in said[0]

    run = trial(FakeSite("a"), FakeSite("b"), folder="twin")
    with pytest.raises(InfrastructureError, match="round 2: 0 sites delivered"):
        lose_b(run, waits=False)


def test_it_gives_up_where_nobody_comes_back_within_the_rounds_time(
    trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which each look at it takes a second."""
    run, seconds = trial(FakeSite("a"), FakeSite("b")), itertools.count()
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with pytest.raises(InfrastructureError, match=r"round 2: .*b: failed: the site is not conn"):
        lose_b(run, waits=True, away=None, timeout=60.0)
    assert 60 <= next(seconds) < 90
    assert run.sites[0].calls == [1], "nobody pays for a round that cannot count"


@dataclass
class Failing(FakeSite):
    """Cannot prepare the plan before `well`, a time on the test's clock."""

    well: float = 0.0
    asked_at: list[float] = field(default_factory=list)

    def prepare(self, study: Study, frozen: dict[str, np.ndarray], coordinator: str) -> Admission:
        self.asked_at.append(admission.time.monotonic())
        if admission.time.monotonic() < self.well:
            raise InfrastructureError("no memory is left")
        return super().prepare(study, frozen, coordinator)


class Clock(Turn):
    """A clock that moves when the coordinator pauses."""

    now = 0.0

    def pause(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("in_mid_study", [False, True])
def test_a_site_that_fails_is_asked_more_rarely_while_the_run_waits_for_it(
    trial: Any, monkeypatch: pytest.MonkeyPatch, in_mid_study: bool
) -> None:
    """At most a minute apart; each question carries the plan. It is found well within a minute."""
    clock, ill = Clock(), Failing("b")
    for module in (admission, rounds):
        monkeypatch.setattr(module, "time", clock)
    run = trial(FakeSite("a"), ill)
    grid = grid_of(["a", "b"], CutOff)
    grid.away = 1

    def hear(kind: str, data: dict[str, Any]) -> None:
        if in_mid_study and kind == "round" and grid.looked is None:
            grid.looked, ill.well = 0, clock.now + 300.0  # cut off once, and then it fails

    ill.well = 0.0 if in_mid_study else 300.0
    parts = make_parts(waits=True, patience=2.0, turn=clock)
    study = make_study(min_sites=2, round_timeout=3600.0)
    body = run.run(study, grid=grid, parts=parts, on_event=hear)
    assert [r["participants"] for r in body["rounds"]] == [["a", "b"]] * 4
    pauses = [then - now for now, then in pairwise(ill.asked_at[1 if in_mid_study else 0 :])]
    assert pauses == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0]
    assert ill.asked_at[-1] <= ill.well + 60.0


@pytest.mark.parametrize("in_mid_study", [False, True])
def test_before_a_run_gives_up_it_asks_who_failed_once_more(
    trial: Any, monkeypatch: pytest.MonkeyPatch, in_mid_study: bool
) -> None:
    """Its pause may be longer than what is left. Twin: a site that is not well by then is out."""
    for well, is_found in ((70.0, True), (130.0, False)):
        clock, ill = Clock(), Failing("b")
        for module in (admission, rounds):
            monkeypatch.setattr(module, "time", clock)
        run = trial(FakeSite("a"), ill, folder=f"run-{well:g}")
        grid = grid_of(["a", "b"], CutOff)
        grid.away = 1

        def hear(kind: str, _: Any, grid: Any = grid, ill: Any = ill, clock: Any = clock) -> None:
            if in_mid_study and kind == "round" and grid.looked is None:
                grid.looked, ill.well = 0, clock.now + well  # noqa: B023

        ill.well = 0.0 if in_mid_study else well
        parts = make_parts(waits=in_mid_study, patience=2.0 if in_mid_study else 120.0, turn=clock)
        study = make_study(min_sites=2, round_timeout=120.0)
        with nullcontext() if is_found else pytest.raises(InfrastructureError):
            run.run(study, grid=grid, parts=parts, on_event=hear)


def test_it_is_asked_more_rarely_the_longer_it_waits(trial: Any) -> None:
    """Each question carries the plan and the frozen factor."""
    now = admission.time.monotonic()

    def pause(waited: float) -> float:
        known = admission._Unsigned("b", REASON, since=now - waited, again=now)
        return admission._Unsigned.after(known, "b", REASON).again - admission.time.monotonic()

    assert pause(0.0) == pytest.approx(5.0, abs=1.0)
    assert pause(200.0) == pytest.approx(20.0, abs=1.0)
    assert pause(86_400.0) == pytest.approx(300.0, abs=1.0)
    late = Unsigned("c", signed=99)
    trial(FakeSite("a"), FakeSite("b"), late).run(parts=make_parts(waits=True, signing=60.0))
    assert late.prepared == 1  # in all four rounds


# ----------------------------------------------------------------- answers that wait for a person

HELD = 'policy.answers = "held" and nobody at the site has let this answer go'


def answers_waiting(run: Any) -> list[tuple[str, int]]:
    return [(data["name"], data["round"]) for data in waits(run)]


def test_a_site_whose_answer_waits_is_asked_again_within_the_rounds_deadline(
    trial: Any, at_once: None
) -> None:
    late = FakeSite("b", script=dict.fromkeys((1, 2, 3), Held(HELD)))
    run = trial(FakeSite("a"), late)
    body = run.run(parts=make_parts())
    assert [r["participants"] for r in body["rounds"]] == [["a", "b"]] * 4
    assert late.calls == [1, 1, 1, 1, 2, 3, 4] and run.sites[0].calls == [1, 2, 3, 4]
    assert answers_waiting(run) == [("b", 1)]  # once, however often it was asked
    assert body["rounds"][0]["late"] == {"b": f"waiting: {HELD}"}


def test_the_round_goes_on_without_it_past_the_deadline(trial: Any, at_once: None) -> None:
    """Twin: with time left it takes part."""
    for timeout, expected in ((0.001, ["a", "c"]), (3600.0, ["a", "b", "c"])):
        script = dict.fromkeys((1, 2), Held(HELD))
        run = trial(FakeSite("a"), FakeSite("b", script=script), FakeSite("c"), folder=str(timeout))
        body = run.run(make_study(round_timeout=timeout), parts=make_parts())
        assert body["rounds"][0]["participants"] == expected
        assert ("b" in body["rounds"][0]["missing"]) == (timeout < 1)


def test_a_site_that_restarts_while_its_answer_waits_gets_the_plan_again(
    trial: Any, at_once: None
) -> None:
    script = {1: Held(HELD), 2: Unprepared("this site does not know the plan"), 3: Held(HELD)}
    late = FakeSite("b", script=script)
    body = trial(FakeSite("a"), late).run(parts=make_parts())
    assert body["rounds"][0]["participants"] == ["a", "b"]
    assert late.calls[:4] == [1, 1, 1, 1] and late.prepared == 2


def test_a_site_that_refuses_to_let_its_answer_go_stays_in_the_study(
    trial: Any, at_once: None
) -> None:
    refused = Void("a person at the site refused to let this answer go")
    sites = [FakeSite("a"), FakeSite("b", script={1: Held(HELD), 2: refused}), FakeSite("c")]
    body = trial(*sites).run(parts=make_parts())
    assert body["rounds"][0]["missing"]["b"].startswith("void: a person at the site refused")
    assert body["rounds"][1]["participants"] == ["a", "b", "c"]
