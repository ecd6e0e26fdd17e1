"""`fedtune tune`: settings searched on declared data alone, by records that judge nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.cli.tune import trials_table
from fedtune.core.config import Site, load_site
from fedtune.core.errors import ConfigError, PolicyRefused
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.launch import tune as module
from fedtune.launch.tune import Search, Trial, rank_trials, tune
from tests.cli_kit import run


@pytest.fixture
def declared(study: Path) -> Path:
    """The study of two sites whose data is declared, and records to choose by."""
    for name in ("north", "south"):
        path = Path(f"{name}/site.toml")
        path.write_text(path.read_text().replace("[data]", '[data]\ndeclared = "generated"'))
    rows = [
        json.dumps({"prompt": f"Choose {i}: is it so?", "completion": (" yes", " no")[i % 2]})
        for i in range(8)
    ]
    Path("choose.jsonl").write_text("\n".join(rows))
    return study


def sites() -> list[Site]:
    return [load_site(f"{name}/site.toml") for name in ("north", "south")]


def fake_runs(monkeypatch: pytest.MonkeyPatch, loss: dict[float, Any]) -> list[Any]:
    """Replace a trial's run by one whose report has the loss of its learning rate."""
    from fedtune.launch import simulate as launch

    ran: list[Any] = []

    def simulate(study: Any, sites: Any, out: Path, **options: Any) -> None:
        ran.append(study)
        result = loss[study.training.learning_rate]
        if isinstance(result, Exception):
            raise result
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.json").write_text(study.model_dump_json())
        quality = {"metric": "accuracy", "after": {"accuracy": result}}
        body = {"private": True, "study": "tiny", "privacy": {"sites": {}}, "quality": quality}
        (out / "report.json").write_text(json.dumps(body))

    monkeypatch.setattr(launch, "simulate", simulate)
    return ran


def test_private_data_is_refused_before_anything_runs(declared: Path) -> None:
    south = Path("south/site.toml")
    south.write_text(south.read_text().replace('declared = "generated"\n', ""))
    with pytest.raises(PolicyRefused, match="the data of south is private"):
        tune(declared, sites(), "t", ["training.learning_rate=1,2"], records=Path("choose.jsonl"))
    assert not Path("t").exists() and not Path("south/state").exists()


def test_records_that_judge_choose_nothing(declared: Path) -> None:
    with pytest.raises(ConfigError, match="no records by which to compare trials"):
        tune(declared, sites(), "t")


def test_a_search_runs_sorts_and_goes_on_where_it_was(
    declared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--sites", ".", "--records", "choose.jsonl", "--out", "t")
    first = run("tune", declared, *options, "--set", "training.learning_rate=0.1,5")
    assert first.exit_code == 0, first.output
    assert "use  --set training.learning_rate=" in first.output
    assert "chosen on choose.jsonl" in first.output
    assert "trial 2/2  training.learning_rate=5" in first.output
    reports = [Path(f"t/trial-0{n}/report.json") for n in (1, 2)]
    before = [path.stat().st_mtime_ns for path in reports]
    body = json.loads(reports[0].read_text())
    assert body["quality"]["gain"]["records"] == 8, "those that choose, not the 12 that judge"
    assert body["declared"] == {"north": "generated", "south": "generated"}
    # As in a process of its own, where nothing has run a site.
    monkeypatch.delitem(process_cache._clear, "workers")
    again = run("tune", declared, *options, "--set", "training.learning_rate=5,0.1", "--json")
    found = json.loads(again.stdout)
    assert {trial["folder"] for trial in found["trials"]} == {"trial-01", "trial-02"}
    assert [path.stat().st_mtime_ns for path in reports] == before, "read, not run again"
    assert found["best"]["value"] == max(trial["value"] for trial in found["trials"])
    for name in ("north", "south"):
        assert Ledger(Path(f"{name}/state")).spending() == []


def test_a_failed_trial_is_shown_and_the_others_go_on(
    declared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = ConfigError("the aggregate is not finite")
    fake_runs(monkeypatch, {0.5: 0.2, 1.0: broken, 2.0: 0.7})
    told: list[tuple[int, int]] = []
    found = tune(
        declared, sites(), "t", ["training.learning_rate=0.5,1.0,2.0"],
        records=Path("choose.jsonl"), on_trial=lambda n, of, trial: told.append((n, of)),
    )  # fmt: skip
    assert [trial.value for trial in found.trials] == [0.7, 0.2, None]
    assert "not finite" in found.trials[-1].error and told == [(1, 3), (2, 3), (3, 3)]
    assert found.best and found.best.settings == ("training.learning_rate=2.0",)


def test_the_learning_rate_is_searched_around_the_plans(
    declared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [0.01, 0.0316, 0.1, 0.316, 1.0]
    ran = fake_runs(monkeypatch, dict.fromkeys(rates, 0.5))
    found = tune(declared, sites(), "t", ["training.rounds=1"], records=Path("choose.jsonl"))
    assert [study.training.learning_rate for study in ran] == rates
    assert all(study.training.rounds == 1 for study in ran)
    assert found.records == "choose.jsonl"


def test_of_too_many_combinations_some_are_drawn_the_same_ones_each_time(
    declared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runs(monkeypatch, {1.0: 0.5, 2.0: 0.5})
    settings = ["training.learning_rate=1.0,2.0", "training.rounds=1,2,3"]
    drawn = [
        {t.settings for t in tune(declared, sites(), out, settings, 3, Path("choose.jsonl")).trials}
        for out in ("a", "b")
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3


def test_a_folder_that_holds_something_else_is_left_alone(declared: Path) -> None:
    with pytest.raises(ConfigError, match="not empty, and no search"):
        tune(declared, sites(), "north", records=Path("choose.jsonl"))


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("a=1,2", ["1", "2"]),
        ("a=[1,2]", ["[1,2]"]),
        ('a=["x","y"],["z"]', ['["x","y"]', '["z"]']),
        ("a='x,y', z", ["'x,y'", "z"]),
        ("a={ b = 1, c = 2 }", ["{ b = 1, c = 2 }"]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(
    setting: str, values: list[str]
) -> None:
    assert module._values(setting) == values


def test_a_trial_that_destroyed_the_text_is_not_the_best() -> None:
    """By the records that choose; the twin, a warning of other records, changes no order."""
    fine = Trial(("a",), "trial-01", 0.7, 1.0, loss=0.6)
    wrecked = Trial(
        ("b",), "trial-02", 0.9, 1.0, loss=9.0, warning="the better answers lost 7 nats"
    )
    failed = Trial(("c",), "trial-03", error="no")
    given = [failed, wrecked, fine]
    assert rank_trials(given, "preference", warned_last=True) == [fine, wrecked, failed]
    assert rank_trials(given, "preference", warned_last=False) == [wrecked, fine, failed]
    assert rank_trials(given, "loss", warned_last=True) == [fine, wrecked, failed]
    screen = io.StringIO()
    Console(width=160, file=screen).print(trials_table(Search("preference", "x", given)))
    assert f"warning: {wrecked.warning}" in screen.getvalue()
