"""A run that is killed anywhere and resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest

from fedtune.core.errors import ConfigError
from fedtune.server import rounds, store, summary
from fedtune.server.store import CheckpointError, Phase
from fedtune.strategies.fedadam import FedAdam
from tests.server.fakes import FakeEvaluator, FakeSite, make_parts, make_study

STUDY = make_study(min_sites=2, name="fedadam", options={"server_learning_rate": 0.1})


class Killed(KeyboardInterrupt):
    """Power loss: nothing may catch it."""


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool) -> None:
    """The `call`-th call of owner.name dies, before or after doing its work; later ones work."""
    real, count = getattr(owner, name), iter(range(1, 10**6))

    def dying(*args: Any, **kwargs: Any) -> Any:
        now = next(count) == call
        if now and not after:
            raise Killed
        result = real(*args, **kwargs)
        if now:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


PHASES = [
    ("admission", FakeSite, "prepare", 2),
    ("base measured", FakeEvaluator, "measure", 1),
    ("first checkpoint", store, "save", 1),
    ("first round, second site", FakeSite, "train", 2),
    ("third round, first site", FakeSite, "train", 5),
    ("aggregation", FedAdam, "apply", 2),
    ("second round measured", FakeEvaluator, "measure", 2),
    ("ε", summary, "epsilons", 3),
    ("a round asked for", store, "save", 4),
    ("checkpoint of a round", store, "save", 5),
    ("its arrays", store, "_put", 4),
    ("its transaction", store, "_commit", 5),
    ("older arrays", store, "_prune", 5),
    ("a file put in place", os, "replace", 7),
    ("metrics", store, "write_metrics", 3),
    ("adapter and report", rounds._Run, "_finish", 1),
    ("the end", store, "save", 10),
]


@pytest.mark.parametrize(
    "phase, owner, name, call, after",
    [
        pytest.param(
            *(*phase, after),
            id=f"{phase[0]}-{('before', 'after')[after]}",
            marks=() if at % 2 == after else pytest.mark.long,  # by default one of either
        )
        for at, phase in enumerate(PHASES)
        for after in (False, True)
    ],
)
def test_a_killed_run_resumes_to_the_same_end(trial, monkeypatch, phase, owner, name, call, after):
    whole = trial(FakeSite("a"), FakeSite("b"), folder="whole")
    expected = whole.run(STUDY)
    run = trial(FakeSite("a"), FakeSite("b"), folder="killed")
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call, after)
        with pytest.raises(Killed):
            run.run(STUDY)
    body = run.run(STUDY, resume=True)
    for key, array in whole.adapter().items():
        np.testing.assert_array_equal(run.adapter()[key], array)
    assert body["quality"] == expected["quality"]
    assert [r["round"] for r in body["rounds"]] == [1, 2, 3, 4]
    lines = (run.folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2, 3, 4]
    # A round that was lost was still paid for: ε counts every step that ran.
    ran = {site.name: site.steps for site in run.sites}
    assert {n: s["steps"] for n, s in body["privacy"]["sites"].items()} == ran


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(trial):
    run = trial(FakeSite("a"), FakeSite("b", script={3: KeyboardInterrupt()}))
    with pytest.raises(KeyboardInterrupt):
        run.run(STUDY)
    kept = store.load(run.folder / "out", STUDY)
    assert kept is not None and (kept.phase, kept.round) == (Phase.ASKED, 2)
    run.run(STUDY, resume=True)
    assert run.sites[1].calls == [1, 2, 3, 3, 4]


def test_resuming_does_not_start_or_measure_the_base_again(trial):
    run = trial(FakeSite("a"), FakeSite("b", script={2: KeyboardInterrupt()}))
    with pytest.raises(KeyboardInterrupt):
        run.run(STUDY)

    def never(*_: Any) -> Any:
        raise AssertionError("called again")

    assert run.run(STUDY, resume=True, parts=make_parts(start=never))["quality"]["before"]


def test_resuming_a_finished_run_asks_nobody(trial):
    run = trial(FakeSite("a"), FakeSite("b"))
    first = run.run(STUDY)
    before = [list(site.calls) for site in run.sites]
    assert run.run(STUDY, resume=True) == first
    assert [site.calls for site in run.sites] == before


def test_resume_where_nothing_is_starts_anew(trial):
    assert len(trial(FakeSite("a"), FakeSite("b")).run(STUDY, resume=True)["rounds"]) == 4


def test_a_run_is_not_overwritten(trial):
    run = trial(FakeSite("a"), FakeSite("b"))
    run.run(STUDY)
    with pytest.raises(ConfigError, match="--resume"):
        run.run(STUDY)


def test_another_plan_cannot_continue_a_run(trial):
    run = trial(FakeSite("a"), FakeSite("b"))
    run.run(STUDY)
    training = STUDY.training.model_copy(update={"learning_rate": 2.0})
    with pytest.raises(CheckpointError, match="another study"):
        run.run(STUDY.model_copy(update={"training": training}), resume=True)


def test_a_moved_evaluation_file_is_the_same_study(trial, tmp_path):
    run = trial(FakeSite("a"), FakeSite("b", script={2: KeyboardInterrupt()}))
    with pytest.raises(KeyboardInterrupt):
        run.run(STUDY)
    table = STUDY.evaluation.model_copy(update={"path": tmp_path / "elsewhere.jsonl"})
    seen = []
    parts = make_parts(evaluator=lambda study, frozen: seen.append(study) or FakeEvaluator())
    run.run(STUDY.model_copy(update={"evaluation": table}), resume=True, parts=parts)
    assert seen[0].evaluation.path == tmp_path / "elsewhere.jsonl"


def test_a_site_cannot_change_its_declared_size_on_the_way(trial):
    run = trial(FakeSite("a"), FakeSite("b", script={2: KeyboardInterrupt()}), FakeSite("c"))
    with pytest.raises(KeyboardInterrupt):
        run.run(STUDY)
    run.sites[2].size = 7
    body = run.run(STUDY, resume=True)
    assert "declared_size changed" in body["rounds"][-1]["missing"]["c"]


def test_each_site_hears_once_that_the_study_has_ended_and_not_before(trial, monkeypatch):
    """A site that hears it too early refuses by its records, once it restarts in mid-study."""
    run = trial(FakeSite("a"), FakeSite("b"))
    with monkeypatch.context() as patch:
        fail_at(patch, FakeSite, "train", 4, True)
        with pytest.raises(Killed):
            run.run(STUDY)
    assert [site.finished for site in run.sites] == [0, 0]
    run.run(STUDY, resume=True)
    assert [site.finished for site in run.sites] == [1, 1]
