"""`fedtune init --task … --colluding N`: a recipe whose sites share one dose of noise."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.core.config import Study, load_study
from fedtune.core.dp.accountant import epsilon
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.errors import ConfigError
from fedtune.officer.site_files import load_sites
from fedtune.presets import Records, rate, write
from fedtune.presets._sites import EPSILON

SITES = 5


def table(path: Path, rows: int, target: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", target])
        for n in range(rows):
            answer = f"class {n % 3}" if target == "label" else f"It is {n}."
            writer.writerow([f"What of {n}?", answer])
    return path


def records(folder: Path, task: str, **changes: object) -> Records:
    folder.mkdir(parents=True)
    target = "label" if task == "classify" else "answer"
    given = {
        "prompt": "question",
        "target": target,
        "data": tuple(table(folder / f"s{n}.csv", 20, target) for n in range(SITES)),
        "evaluation": table(folder / "public.csv", 150, target),
        "size": 100,
        "colluding": 1,
    }
    return Records(**(given | changes))  # type: ignore[arg-type]


def study_of(folder: Path, task: str, **changes: object) -> Study:
    return load_study(write(folder / "own", task, records(folder / "in", task, **changes))[0])


@pytest.mark.parametrize("task", ["answer", "classify"])
def test_all_sites_share_one_dose_of_noise(tmp_path: Path, task: str) -> None:
    """Twin: at the same ε each site's own noise."""
    shared = study_of(tmp_path / "a", task, epsilon=1.0)
    own = study_of(tmp_path / "b", task, epsilon=1.0, colluding=None)
    assert shared.strategy.min_sites == SITES and own.secure_aggregation is None
    of_shared, of_own = plan_for_site(shared, 100), plan_for_site(own, 100)
    assert of_shared.noise_multiplier == of_own.noise_multiplier
    assert of_shared.own_noise == pytest.approx(of_own.own_noise / math.sqrt(SITES - 1))


@pytest.mark.parametrize("changes", [{}, {"sizes": (50, 100, 100, 100, 200)}, {"colluding": 3}])
def test_the_step_follows_the_shared_noise(tmp_path: Path, changes: dict[str, object]) -> None:
    """Twin: with each site's own noise in its place, the plan warns."""
    study = study_of(tmp_path / "a", "answer", epsilon=1.0, **changes)
    sizes = changes.get("sizes") or (100,) * SITES
    assert rate.rate_note(study, sizes) == ""  # type: ignore[arg-type]
    assert "WARNING" in rate.rate_note(study.changed(secure_aggregation=None), [100] * SITES)


@pytest.mark.parametrize("task", ["answer", "classify"])
@pytest.mark.parametrize("size", [10, 100, 1000])
def test_by_default_a_void_attempt_fits_whatever_happens(
    tmp_path: Path, task: str, size: int
) -> None:
    """Twin: a tenth of ε more does not, or is more than the recipe's ε."""
    study = study_of(tmp_path / "a", task, size=size)
    most = load_sites(tmp_path / "a" / "own" / "sites")[0].policy.max_epsilon

    def costs(asked: Study) -> float:
        plan = plan_for_site(asked, size)
        return epsilon(plan.fallback_events(2 * plan.steps), plan.delta)

    assert costs(study) <= most
    more = round(study.privacy.epsilon + 0.1, 1)
    assert more > EPSILON or costs(study.changed(privacy={"epsilon": more})) > most


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"colluding": 4}, "--colluding 4.*the study has 5"),
        ({"role": "site", "data": ()}, "--colluding is for the coordinator"),
    ],
)
def test_too_few_sites_or_a_site_alone_is_refused(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    given = replace(records(tmp_path / "in", "answer"), **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=told):
        write(tmp_path / "own", "answer", given)
    assert not (tmp_path / "own").exists()
