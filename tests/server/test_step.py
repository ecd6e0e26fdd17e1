"""How far a round moves the adapter is chosen on public records; the evaluation chooses nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.core.config import (
    Columns,
    EvaluationTable,
    PublicTable,
    SelectionTable,
    StartTable,
    Study,
)
from fedtune.core.errors import DataError, ModelError
from fedtune.evaluation.selection import check_apart
from fedtune.flower.grid import InProcessGrid
from fedtune.report.claim import verdict
from fedtune.report.markdown import markdown
from fedtune.report.plot import png
from fedtune.server import step
from fedtune.server.store import Progress
from tests.server.fakes import (
    Bowl,
    FakeEvaluator,
    FakeSite,
    grid_of,
    make_parts,
    make_study,
    zeros,
)
from tests.server.rounds_kit import metrics, three

COLUMNS = Columns(prompt="p", completion="c")
SELECTION = SelectionTable(path=Path("/selection.jsonl"), columns=COLUMNS, patience=2)


def selected(**changes: Any) -> Study:
    table = SELECTION.model_copy(update=changes)
    return make_study(min_sites=2).model_copy(update={"selection": table})


class Evaluators(dict[Path, Any]):
    """One for each file, so that it is seen who is asked for what."""

    def __call__(self, study: Study, frozen: Any) -> Any:
        assert study.evaluation is not None
        return self.setdefault(study.evaluation.path, self.new(study.evaluation.path))

    @staticmethod
    def new(path: Path) -> Any:
        return Bowl() if path == SELECTION.path else Counted()


class Counted(FakeEvaluator):
    def __init__(self) -> None:
        self.asked: list[bool] = []

    def measure(self, adapter: Any) -> dict[str, float]:
        self.asked.append(adapter is None)
        return super().measure(adapter)


def test_each_round_moves_as_far_as_the_selection_records_say(trial):
    evaluators, run = Evaluators(), trial(*three())
    body = run.run(selected(), parts=make_parts(evaluator=evaluators))
    lines = metrics(run)
    losses = [line["selection"]["loss"] for line in lines]
    assert losses == sorted(losses, reverse=True) and losses[-1] < Bowl().measure(None)["loss"]
    assert losses[-1] == Bowl().measure(run.adapter())["loss"]
    assert any(line["step"] not in (0.0, 1.0) for line in lines)
    for key in ("keep", "step"):
        assert [row[key] for row in body["quality"]["selection"]] == [line[key] for line in lines]
    # The evaluation records are read for the base, and when everything is chosen.
    (judge,) = (e for path, e in evaluators.items() if path != SELECTION.path)
    assert judge.asked == [True, False]
    assert [row["round"] for row in body["quality"]["by_round"]] == [len(lines)]
    assert "chosen on the 10 public [selection] records" in markdown(body) and png(body)


def test_the_loss_that_a_round_ended_with_is_not_measured_again() -> None:
    proposed = {name: array + 0.1 for name, array in zeros().items()}
    first, later = Bowl(), Bowl()
    ended = {"keep": 1.0, "step": 1.0, "selection": Bowl().measure(zeros())}
    begun = SimpleNamespace(origin=zeros(), adapter=zeros(), history=[])
    _, found = step.choose(first, begun, proposed)
    begun.history.append(ended)
    _, found_later = step.choose(later, begun, proposed)
    assert found_later == found and later.measured == first.measured - 1


@pytest.mark.parametrize("rate", [1e-3, 1.0, 1e3])
def test_a_wrong_learning_rate_is_put_right(trial, rate):
    """The sites' updates a thousand times too long or too short lead to the same adapter."""

    def longer(update: Any) -> Any:
        return replace(update, delta={n: a * np.float32(rate) for n, a in update.delta.items()})

    sites = [FakeSite(n, script=dict.fromkeys(range(1, 9), longer)) for n in "abc"]
    run = trial(*sites)
    study = selected().model_copy(update={"privacy": "off"})
    run.run(study, parts=make_parts(evaluator=Evaluators()))
    right = trial(*three(), folder="right")
    right.run(study, parts=make_parts(evaluator=Evaluators()))
    got, wanted = (Bowl().measure(r.adapter())["loss"] for r in (run, right))
    assert got == pytest.approx(wanted, rel=0.3)


def test_it_ends_where_no_step_helps_any_more(trial):
    """At the bottom every update is uphill: after `patience` such rounds nothing more is spent."""
    run = trial(*three())

    class Bottom(Evaluators):
        @staticmethod
        def new(path: Path) -> Any:
            return Bowl(bottom=0.0) if path == SELECTION.path else Counted()

    groups: list[str] = []

    class Telling(InProcessGrid):
        def create_message(
            self, content: Any, kind: str, node: int, group: str, **more: Any
        ) -> Any:
            told = content.config_records.get("plan", {}).get("finished")
            groups.extend(["told"] * bool(told))
            return super().create_message(content, kind, node, group, **more)

    grid = grid_of("abc", Telling)
    body = run.run(selected(), parts=make_parts(evaluator=Bottom()), grid=grid)
    assert groups == ["told"] * 3 and [site.prepared for site in run.sites] == [1, 1, 1]
    assert [line["step"] for line in metrics(run)] == [0.0, 0.0]
    assert all(not array.any() for array in run.adapter().values())
    assert body["quality"]["after"], "measured although the last planned round never came"


def test_a_resumed_run_chooses_as_one_that_was_not_stopped(trial):
    whole = trial(*three())
    whole.run(selected(), parts=make_parts(evaluator=Evaluators()))
    stopped = trial(*three(), folder="stopped")

    def stop(kind: str, data: dict[str, Any]) -> None:
        if kind == "round" and data["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(selected(), parts=make_parts(evaluator=Evaluators()), on_event=stop)
    stopped.run(selected(), parts=make_parts(evaluator=Evaluators()), resume=True)
    steps = [[(line["keep"], line["step"]) for line in metrics(run)] for run in (stopped, whole)]
    assert steps[0] == steps[1]


def test_new_noise_is_averaged_with_old():
    """Updates of one size and independent noise: their mean has less of it than the newest, or
    than their sum; so it keeps a part of the past, and adds as much of the new."""
    rng = np.random.default_rng(0)
    target = {"w": np.ones(400, np.float32)}

    class Near(Bowl):
        def measure(self, adapter: Any) -> dict[str, float]:
            return {"loss": float(((adapter["w"] - target["w"]) ** 2).mean())}

    origin = {"w": np.zeros(400, np.float32)}
    progress = Progress("", selected(), origin, {}, origin)
    for _ in range(16):
        update = target["w"] + rng.normal(0, 3, 400).astype(np.float32)
        proposed = {"w": progress.adapter["w"] + update}
        progress.adapter, chosen = step.choose(Near(), progress, proposed)
        progress.history.append(chosen)
    assert min(entry["keep"] for entry in progress.history) < 1
    # The best multiple of one update alone has 0.9.
    assert progress.history[-1]["selection"]["loss"] < 0.5


def test_the_records_that_choose_are_the_selections():
    """Measured as the evaluation records are: the same metric and choices."""
    study = make_study().model_copy(update={"selection": SELECTION})
    asked, table = step.replace_evaluation(study).evaluation, study.evaluation
    assert asked and table and asked.path == SELECTION.path and asked.columns == SELECTION.columns
    assert (asked.metric, asked.choices) == (table.metric, table.choices)


@pytest.mark.parametrize(
    ("newest", "left"), [((1.0, 0.0), False), ((0.5, 0.0), True), ((1.0, 2.0), True)]
)
def test_a_round_that_kept_less_of_the_past_has_learnt_too(newest, left):
    rounds = [(1.0, 0.0), newest]
    history = [{"keep": keep, "step": factor} for keep, factor in rounds]
    assert step.steps_left(selected(), history) is left


def test_a_gain_of_nothing_is_no_step():
    """A hundred-thousandth of the loss is not learnt: the adapter stays as it was."""

    class Flat(Bowl):
        def measure(self, adapter: Any) -> dict[str, float]:
            return {"loss": 1.0 - 1e-5 * float(adapter["w"][0] == 1)}

    start = {"w": np.zeros(2, np.float32)}
    progress = Progress("", selected(), start, {}, start)
    adapter, chosen = step.choose(Flat(), progress, {"w": np.ones(2, np.float32)})
    assert chosen["step"] == 0.0 and not adapter["w"].any()


class Bounded(Bowl):
    """As a network, which loads no adapter with an entry above 1000."""

    def measure(self, adapter: Any) -> dict[str, float]:
        if adapter and max(np.abs(array).max() for array in adapter.values()) > 1000:
            raise ModelError("an entry is larger than 1000", "an adapter that has not diverged")
        return super().measure(adapter)


def test_a_step_too_long_to_be_loaded_is_shortened():
    start = {"w": np.zeros(2, np.float32)}
    progress = Progress("", selected(), start, {}, start)
    adapter, chosen = step.choose(Bounded(), progress, {"w": np.full(2, 3e4, np.float32)})
    assert 0 < chosen["step"] < 1 and adapter["w"] == pytest.approx(Bowl.bottom, rel=0.9)
    # Twin: where the adapter as it stands cannot be loaded, no step makes up for it.
    wrong = {"w": np.full(2, 3e4, np.float32)}
    with pytest.raises(ModelError, match="not diverged"):
        step.choose(Bounded(), Progress("", selected(), wrong, {}, wrong), start)


@pytest.mark.parametrize("best", [0.0, 1e-5, 0.3, 1.0, 7.0, 2e4])
@pytest.mark.parametrize("start", [1e-3, 1.0, 50.0])
def test_the_search_is_within_a_factor_of_the_best(best, start):
    calls: list[float] = []

    def loss(factor: float) -> float:
        calls.append(factor)
        return (factor - best) ** 2

    factor = step.line_search(loss, start)
    assert factor == 0 if best == 0 else best / 2 <= factor <= best * 2
    assert len(set(calls)) < 50


def test_a_loss_that_is_not_finite_is_no_choice():
    factor = step.line_search(lambda f: math.inf if f > 0.01 else 1 - f, 1.0)
    assert 0.001 < factor <= 0.01


def test_records_that_choose_do_not_judge(tmp_path: Path):
    rows = ['{"p": "a", "c": "x"}', '{"p": "b", "c": "y"}', '{"p": "c", "c": "z"}']
    files = tmp_path / "selection.jsonl", tmp_path / "evaluation.jsonl"
    study = selected(path=files[0])
    table = EvaluationTable(path=files[1], columns=COLUMNS)
    study = study.model_copy(update={"evaluation": table})
    for mine, theirs, shared in ((rows[:2], rows[2:], 0), (rows[:2], rows[1:], 1)):
        for path, lines in zip(files, (mine, theirs), strict=True):
            path.write_text("\n".join(lines) + "\n")
        if not shared:
            check_apart(study)
            continue
        with pytest.raises(DataError, match=r"1 records of .selection. are in .evaluation. too"):
            check_apart(study)


@pytest.mark.parametrize("shared", ["selection", "evaluation"])
def test_records_that_teach_neither_choose_nor_judge(tmp_path: Path, shared: str):
    """Where [public] makes the adapter's frozen factor alone, its answers are not learnt."""
    for name in ("public", "selection", "evaluation"):
        rows = [f'{{"p": "{name} {k}", "c": "x"}}\n' for k in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    with (tmp_path / f"{shared}.jsonl").open("a") as file:
        file.write('{"p": "public 1", "c": "x"}\n')
    tables = {
        "public": PublicTable(path=tmp_path / "public.jsonl", columns=COLUMNS, licence="CC0"),
        "evaluation": EvaluationTable(path=tmp_path / "evaluation.jsonl", columns=COLUMNS),
    }
    study = selected(path=tmp_path / "selection.jsonl").model_copy(update=tables)
    check_apart(study)
    for start in (StartTable(steps=1), StartTable(head="public")):
        with pytest.raises(DataError, match=rf"1 records of .public. are in .{shared}. too"):
            check_apart(study.model_copy(update={"start": start}))


@pytest.mark.parametrize(
    ("metric", "change", "claim"),
    [
        ("accuracy", [0.1, 0.3], "better than"),
        ("accuracy", [-0.3, -0.1], "worse than"),
        ("accuracy", [-0.1, 0.1], "not told apart from"),
        ("loss", [0.1, 0.3], "worse than"),
        ("loss", [-0.3, -0.1], "better than"),
    ],
)
def test_the_report_says_whether_the_model_is_better(metric, change, claim):
    quality = {"metric": metric, "gain": {"records": 40, "change": change}}
    assert verdict(quality).startswith(claim) and "40 records" in verdict(quality)
    assert verdict({"metric": metric}) == ""
