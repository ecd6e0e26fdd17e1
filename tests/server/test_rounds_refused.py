"""Sites that refuse, fail, are absent or send what does not count."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fedtune.core.errors import (
    BudgetExceeded,
    ConfigError,
    InfrastructureError,
    PolicyRefused,
    Refused,
)
from fedtune.core.vault.prepared import Update
from fedtune.core.wire.keys import SigningKey
from fedtune.flower.grid import InProcessGrid
from fedtune.server import summary
from fedtune.server.store import CheckpointError
from tests.server.fakes import SHAPES, FakeSite, grid_of, make_parts, make_study
from tests.server.rounds_kit import metrics, one_round, three


def test_refusals_at_the_start_end_the_study_with_their_reasons(trial):
    run = trial(FakeSite("a"), FakeSite("b", refusal="policy.objectives does not list it"))
    with pytest.raises(Refused, match=r"b: refused: policy\.objectives does not list it") as caught:
        run.run()
    assert caught.value.exit_code == 3
    assert not (run.folder / "out" / "checkpoint").exists()
    run.sites[1].refusal = ""
    run.run()  # nothing to clean up first


def test_absence_is_not_refusal(trial):
    with pytest.raises(InfrastructureError) as caught:
        trial(FakeSite("a")).run()
    assert caught.value.exit_code == 4
    absent = [FakeSite("a"), FakeSite("b", refusal="no"), FakeSite("c", prepare_error=OSError())]
    with pytest.raises(InfrastructureError, match=r"c: failed: the site's own log says why"):
        trial(*absent, folder="other").run()


class Late(InProcessGrid):
    """Its nodes are there from the third look on."""

    looks = 0

    def get_node_ids(self) -> list[int]:
        self.looks += 1
        return super().get_node_ids() if self.looks > 3 else []


@pytest.mark.parametrize("waits", [True, False])
def test_a_coordinator_waits_for_sites_that_are_still_to_be_admitted(trial, waits):
    """Between machines they come by telephone; in a simulation nobody comes later."""
    run = trial(FakeSite("a"), FakeSite("b"))
    grid, parts = grid_of("ab", Late), make_parts(waits=waits)
    if waits:
        assert run.run(grid=grid, parts=parts)["rounds"]
        return
    with pytest.raises(InfrastructureError, match="0 sites take part"):
        run.run(grid=grid, parts=parts)


def test_it_does_not_wait_for_one_that_refuses(trial):
    run = trial(FakeSite("a"), FakeSite("b", refusal="no"))
    with pytest.raises(Refused, match="no"):
        run.run(parts=make_parts(waits=True))


def test_a_budget_that_runs_out_is_recorded_and_the_rest_goes_on(trial):
    over = BudgetExceeded("the plan would bring this site's total to ε = 9.00")
    run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", script={3: over}))
    body = run.run()
    assert [r["participants"] for r in body["rounds"]] == [["a", "b", "c"]] * 2 + [["a", "b"]] * 2
    assert "ε = 9.00" in body["rounds"][2]["missing"]["c"]
    assert "ε = 9.00" in body["rounds"][3]["missing"]["c"]
    assert run.sites[2].calls == [1, 2, 3]
    assert body["privacy"]["sites"]["c"]["steps"] == 2  # what it reported is still counted


def test_when_all_refuse_the_study_ends_refused(trial):
    run = trial(*[FakeSite(n, script={3: PolicyRefused("no more")}) for n in "ab"])
    with pytest.raises(Refused, match="no more"):
        run.run()
    assert len(metrics(run)) == 2


def bad(**changes: Any):
    def change(update: Update) -> Update:
        delta = {
            name: changes.get("fill", lambda a: a)(array) for name, array in update.delta.items()
        }
        return Update(
            changes.get("delta", lambda d: d)(delta),
            changes.get("events", update.events),
            changes.get("said", {}),
        )

    return change


BAD = {
    "not finite": bad(fill=lambda a: np.where(a == a.max(), np.nan, a).astype(np.float32)),
    "infinite": bad(fill=lambda a: np.full_like(a, np.inf)),
    "other shape": bad(fill=lambda a: a[:1]),
    "missing name": bad(delta=lambda d: dict(list(d.items())[:1])),
    "extra name": bad(delta=lambda d: d | {"x": np.zeros(2, np.float32)}),
    "empty": bad(delta=lambda d: {}),
    "no step logged": bad(events=[]),
    "fewer steps": bad(events=[{"sigma": 1.5, "q": 0.25, "max_grad_norm": 1.0, "steps": 0}]),
    "no sigma": bad(events=[{"q": 0.25, "max_grad_norm": 1.0, "steps": 3}]),
    "sigma zero": bad(events=[{"sigma": 0.0, "q": 0.25, "max_grad_norm": 1.0, "steps": 3}]),
    "sigma nan": bad(events=[{"sigma": float("nan"), "q": 0.2, "max_grad_norm": 1, "steps": 3}]),
    "q above one": bad(events=[{"sigma": 1.0, "q": 1.5, "max_grad_norm": 1.0, "steps": 3}]),
    "not a list": bad(events=3),
    "another's name": bad(said={"name": "a"}),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_dropped_with_a_reason_and_changes_nothing(trial, kind):
    study = make_study(min_sites=2).model_copy(update={"training": one_round()})
    bad_run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", script={1: BAD[kind]}))
    body = bad_run.run(study)
    assert body["rounds"][0]["participants"] == ["a", "b"]
    assert body["rounds"][0]["missing"]["c"].startswith("dropped: its ")
    good_run = trial(FakeSite("a"), FakeSite("b"), folder="good")
    good_run.run(study)
    for name in SHAPES:
        np.testing.assert_array_equal(bad_run.adapter()[name], good_run.adapter()[name])


def test_without_privacy_every_output_says_so(trial):
    study = make_study(min_sites=2).model_copy(update={"privacy": "off"})
    run = trial(*[FakeSite(n, script={1: bad(events=[])}) for n in "ab"])
    body = run.run(study)
    assert body["private"] is False and body["privacy"]["mode"] == "off"
    assert all(line["private"] is False and line["epsilon"] == {} for line in metrics(run))
    assert all(data["private"] is False for _, data in run.events)


def test_an_unknown_strategy_stops_before_anything_is_sent(trial):
    run = trial(*three())
    with pytest.raises(ConfigError, match="fedavg"):
        run.run(make_study(name="fedmagic"))
    assert all(site.prepared == 0 for site in run.sites)


def test_the_report_says_who_was_missing_how_long_and_why(trial):
    failing = {2: OSError(), 3: OSError()}
    run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", script=failing))
    body = run.run()
    absent = body["absences"]["c"]
    assert absent["rounds"] == absent["longest_rounds"] == 2
    assert absent["reasons"] == {"failed: the site's own log says why": 2}
    lines = metrics(run)
    assert absent["longest_seconds"] == round(lines[1]["seconds"] + lines[2]["seconds"], 3)
    assert list(body["absences"]) == ["c"]


def test_an_absence_ends_when_the_site_takes_part():
    def entry(seconds: float, participants: str, **missing: str) -> dict[str, Any]:
        return {"seconds": seconds, "participants": list(participants), "missing": missing}

    history = [
        entry(1.0, "a", b="failed: x"),
        entry(2.0, "a"),  # b was not asked: neither present nor missing
        entry(4.0, "a", b="failed: x"),
        entry(8.0, "ab"),
        entry(16.0, "a", b="refused: y"),
    ]
    assert summary.absences(history) == {
        "b": {
            "rounds": 3, "longest_rounds": 2, "longest_seconds": 16.0,
            "reasons": {"failed: x": 2, "refused: y": 1},
        }
    }  # fmt: skip
    assert summary.absences([]) == {}


def test_receipts_outlive_a_run_and_open_the_next_study(trial, tmp_path):
    sites, key = [FakeSite("a"), FakeSite("b")], SigningKey()
    kept = tmp_path / "home" / "receipts.json"
    parts = make_parts(key=key, receipts=kept)
    trial(*sites, folder="one").run(parts=parts)
    assert sites[0].receipts[0] == "" and kept.exists()
    newest = json.loads(kept.read_text())
    assert newest.keys() == {site.key.public for site in sites}
    for site in sites:
        site.receipts.clear()
        site.steps = 0
    trial(*sites, folder="two").run(parts=parts)
    assert json.loads(sites[0].receipts[0]) == newest[sites[0].key.public]


def test_the_twin_that_keeps_none_sends_none(trial):
    sites = [FakeSite("a"), FakeSite("b")]
    trial(*sites, folder="one").run()
    for site in sites:
        site.receipts.clear()
        site.steps = 0
    trial(*sites, folder="two").run()
    assert sites[0].receipts[0] == ""


def test_another_coordinators_receipts_are_not_sent(trial, tmp_path):
    """A site would take them for a forgery and fail."""
    sites, kept = [FakeSite("a"), FakeSite("b")], tmp_path / "receipts.json"
    trial(*sites, folder="one").run(parts=make_parts(receipts=kept, key=SigningKey()))
    for site in sites:
        site.receipts.clear()
        site.steps = 0
    trial(*sites, folder="two").run(parts=make_parts(receipts=kept, key=SigningKey()))
    assert sites[0].receipts[0] == ""


@pytest.mark.parametrize("body", ["", "[]", '{"a": 1}', "\x00"])
def test_damaged_receipts_stop_the_run(trial, tmp_path, body):
    kept = tmp_path / "receipts.json"
    kept.write_text(body)
    run = trial(FakeSite("a"), FakeSite("b"))
    with pytest.raises(CheckpointError, match="damaged"):
        run.run(parts=make_parts(receipts=kept))
    assert run.sites[0].calls == []


def test_a_size_that_fits_no_plan_is_dropped_and_the_rest_goes_on(trial):
    def budget(study: Any, declared: int) -> Any:
        if declared == 7:
            raise ConfigError("nothing fits the budget")
        return make_parts().budget(study, declared)

    run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", size=7))
    body = run.run(parts=make_parts(budget=budget))
    assert body["rounds"][0]["missing"]["c"].startswith("dropped: its declared size")


def test_a_log_of_other_noise_is_dropped(trial):
    """ε in the report is computed from it."""
    good = {"sigma": 1.5, "q": 0.25, "max_grad_norm": 1.0, "records": 1, "steps": 1}
    for change in ({"sigma": 3.0}, {"sigma": 1e-300}, {"q": 0.1}, {"records": 2}, {"steps": 9**9}):
        script = {1: bad(events=[good | change])}
        run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", script=script), folder=str(change))
        body = run.run(make_study(min_sites=2).model_copy(update={"training": one_round()}))
        assert body["rounds"][0]["missing"]["c"].startswith("dropped: its step log shows ")


def test_a_log_whose_steps_are_not_alike_is_dropped(trial):
    """Each is within 2 % of the plan's noise; but a plan that states ε names no σ."""
    good = {"sigma": 1.475, "q": 0.25, "max_grad_norm": 1.0, "records": 1, "steps": 1}
    for sigma, counts in ((1.5, True), (1.525, False)):
        script = {1: bad(events=[good, good | {"sigma": sigma}])}
        run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", script=script), folder=str(sigma))
        body = run.run(make_study(min_sites=2).model_copy(update={"training": one_round()}))
        assert ("c" in body["rounds"][0]["participants"]) is counts


def test_a_log_whose_earlier_steps_changed_is_dropped_and_the_site_goes_on(trial):
    """It has more steps than before, of a noise that the plan allows."""
    other = [{"sigma": 1.51, "q": 0.25, "max_grad_norm": 1.0, "records": 1, "steps": 2}]
    run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", script={2: bad(events=other)}))
    body = run.run(make_study(min_sites=2))
    assert [len(row["participants"]) for row in body["rounds"]] == [3, 2, 3, 3]
    why = body["rounds"][1]["missing"]["c"]
    assert why.startswith("dropped: its step log ") and "lacks an earlier one" in why
    assert body["privacy"]["sites"]["c"]["steps"] == 4
