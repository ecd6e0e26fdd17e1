"""What a plan can make a site compute before the site's policy has said no: next to nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Study, study_from_json
from fedtune.core.dp import accountant
from fedtune.core.dp.accountant import Steps, affordable_steps, at_least, calibrate, epsilon
from fedtune.core.errors import ConfigError, PolicyRefused
from fedtune.core.vault.policy import compute_plan
from fedtune.core.vault.worker import SiteWorker
from tests.client.test_site import begun, make_site, notes

DELTA = {"delta": 1e-4, "unit": "patient"}


def training(**changes: object) -> dict[str, object]:
    table = {"rounds": 4, "local_steps": 1, "sampling_rate": 0.5, "learning_rate": 0.1} | changes
    return {"training": {key: value for key, value in table.items() if value is not None}}


def altered(study: Study, changes: dict[str, Any]) -> Study:
    """The plan as somebody sends it who writes what he likes."""
    return Study.model_validate(study.model_dump() | changes, strict=False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The distributions that were computed."""
    made: list[str] = []
    composed = accountant._compose_distributions

    def noted(events: tuple[Steps, ...]) -> Any:
        made.append(str(events))
        return composed(events)

    accountant._epsilon.cache_clear()
    monkeypatch.setattr(accountant, "_compose_distributions", noted)
    yield made
    accountant._epsilon.cache_clear()


ORDINARY: dict[str, Any] = {"privacy": DELTA | {"noise_multiplier": 4.0}} | training()
COSTLY: list[tuple[str, dict[str, Any]]] = [
    (
        "training.rounds open",
        {"privacy": DELTA | {"epsilon": 8.0, "noise_multiplier": 1.0}}
        | training(rounds=None, sampling_rate=1e-6),
    ),
    ("max_steps", {"privacy": DELTA | {"epsilon": 1e-6}} | training(rounds=10**6)),
    ("max_steps", {"privacy": DELTA | {"noise_multiplier": 1.0}} | training(local_steps=10**5)),
    ("max_epsilon_per_study", {"privacy": DELTA | {"epsilon": 1e6}} | training(rounds=10**4)),
    (
        "max_epsilon_per_study",
        {"privacy": DELTA | {"noise_multiplier": 0.3}} | training(rounds=10**4, sampling_rate=0.99),
    ),
]


@pytest.mark.parametrize(("rule", "changes"), COSTLY)
def test_a_costly_plan_is_refused_before_anything_is_computed(
    tmp_path: Path, tiny_base: Path, counted: list[str], rule: str, changes: dict[str, Any]
) -> None:
    notes(tmp_path)
    made = begun(tiny_base)
    study = altered(made.study, changes)
    worker = SiteWorker(make_site(tmp_path, patient="who"))
    counted.clear()
    answer = worker.prepare(study, made.frozen)
    assert not answer.admitted and rule in answer.reason, answer.reason
    assert not counted
    # the twin: what counts the distributions sees those of a plan that may cost something
    assert worker.prepare(altered(made.study, ORDINARY), made.frozen).admitted
    assert counted


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy": DELTA | {"epsilon": 8.0, "sampling": "record"}}, "max_records_per_unit"),
        ({"privacy": DELTA | {"noise_multiplier": 1e-300}}, "noise_multiplier"),
        ({"privacy": DELTA | {"noise_multiplier": 1e300}}, "noise_multiplier"),
        (training(rounds=10**18), "rounds"),
    ],
)
def test_a_figure_of_no_use_is_no_plan(tiny_base: Path, changes: dict[str, Any], says: str) -> None:
    plan = begun(tiny_base).study.model_dump(mode="json") | training()
    privacy = changes.get("privacy")
    if privacy and "sampling" in privacy:
        study_from_json(_json(plan | {"privacy": privacy | {"max_records_per_unit": 1000}}))
        changes = {"privacy": privacy | {"max_records_per_unit": 10**9}}
    with pytest.raises(ConfigError, match=says):
        study_from_json(_json(plan | changes))


def _json(plan: dict[str, Any]) -> str:
    return json.dumps(plan)


def test_a_study_without_end_counts_no_more_steps_than_the_policy_has(
    tmp_path: Path, tiny_base: Path, counted: list[str]
) -> None:
    """Each unit's lifetime would pay for some 10⁷ steps here."""
    made = begun(tiny_base).study
    changes = {
        "privacy": DELTA | {"epsilon": 8.0, "noise_multiplier": 2.0},
        "schedule": {"every": 60},
        "evaluation": {
            "path": tmp_path / "x.jsonl", "columns": {"prompt": "note", "completion": "answer"}
        },
    }  # fmt: skip
    study = altered(made, changes | training(rounds=None, sampling_rate=1e-4))
    with pytest.raises(PolicyRefused, match="more than 10000 steps"):
        compute_plan(study, make_site(tmp_path, patient="who"))
    assert len(counted) < 4


@pytest.mark.parametrize("sigma", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("rate", [1e-3, 0.1, 0.9])
@pytest.mark.parametrize(("steps", "k"), [(1, 1), (300, 1), (30, 5)])
def test_the_quick_figure_is_never_above_epsilon(
    sigma: float, rate: float, steps: int, k: int
) -> None:
    event = Steps(sigma, rate, steps, k)
    assert at_least(event, 1e-5) <= epsilon([event], 1e-5)


def test_the_quick_figure_says_something() -> None:
    """The twin of the above: a bound that is always 0 would pass it."""
    event = Steps(1.0, 0.5, 1000)
    assert at_least(event, 1e-5) > 0.25 * epsilon([event], 1e-5) > 50


def test_what_no_noise_reaches_is_said(counted: list[str]) -> None:
    with pytest.raises(ConfigError, match="no noise_multiplier up to 100000 reaches"):
        calibrate(1e-6, 1e-5, 0.5, 10_000)
    assert len(counted) < 4
    with pytest.raises(ConfigError, match="pays for more than 50 steps"):
        affordable_steps(8.0, 1e-5, 0.01, 1.0, most=50)
    assert affordable_steps(8.0, 1e-5, 0.5, 1.0, most=50) < 50
