"""Sites of which a person has yet to sign the plan: the coordinator waits for them, within a
deadline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fedtune.core.config import Study
from fedtune.core.errors import Refused
from fedtune.core.vault.prepared import Admission, Held, Unprepared, Void
from fedtune.server import admission
from tests.server.fakes import FakeSite, make_parts, make_study

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
