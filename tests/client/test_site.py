"""A site decides for itself: policy before data, budget before every round."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from client.site import SiteWorker, Unprepared
from client.site import worker as site_worker
from fedtune.config import Site, Study
from fedtune.dp.accountant import Steps, epsilon
from fedtune.errors import BudgetExceeded, DataError, ModelError, PolicyRefused
from fedtune.models.start import Start, start
from tests.dp.conftest import study


def notes(folder: Path, patients: int = 12) -> Path:
    path = folder / "notes.jsonl"
    rows = [
        {"who": f"p{p}", "note": f"fever and cough, day {n}", "answer": "yes" if p % 2 else "no"}
        for p in range(patients)
        for n in range(1 + p % 3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_site(folder: Path, policy: dict[str, object] | None = None, **columns: str) -> Site:
    return Site.model_validate(
        {
            "site": {"name": "a", "declared_size": 12, "state": str(folder / "state")},
            "data": {
                "path": str(folder / "notes.jsonl"),
                "columns": {"prompt": "note", "completion": "answer"} | columns,
            },
            "policy": policy or {},
        },
        strict=False,
    )


def begun(base: Path, **changes: object) -> Start:
    privacy = {"epsilon": 6.0, "delta": 1e-4, "unit": "patient"}
    body: dict[str, object] = {"base": {"model": str(base), "dtype": "float32"}, "privacy": privacy}
    return start(study(**(body | changes)))


@pytest.fixture
def worker(tmp_path: Path) -> SiteWorker:
    notes(tmp_path)
    return SiteWorker(make_site(tmp_path, patient="who"))


def trains(worker: SiteWorker, made: Start, round_: int) -> dict[str, np.ndarray]:
    return worker.train(made.study.digest, round_, made.adapter).delta


def test_an_admitted_plan_trains_and_every_step_is_in_the_log(
    worker: SiteWorker, tiny_base: Path
) -> None:
    made = begun(tiny_base)
    assert worker.prepare(made.study, made.frozen).admitted
    for round_ in range(1, 5):
        update = worker.train(made.study.digest, round_, made.adapter)
    assert set(update.delta) == set(made.adapter)
    (event,) = update.events
    assert set(event) == {"sigma", "q", "max_grad_norm", "steps"}
    assert event["steps"] == len(worker.log.steps()) == 4
    assert epsilon([Steps(event["sigma"], event["q"], 4)], 1e-4) <= 6.0  # type: ignore[arg-type]


def test_more_rounds_than_planned_are_refused(worker: SiteWorker, tiny_base: Path) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    for round_ in (0, 5, -1):
        with pytest.raises(PolicyRefused, match="not in the plan"):
            trains(worker, made, round_)
    assert worker.log.steps() == []


def test_repeating_a_round_is_paid_for_until_the_ceiling(
    worker: SiteWorker, tiny_base: Path
) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    with pytest.raises(BudgetExceeded, match="max_epsilon"):
        for _ in range(20):
            trains(worker, made, 1)
    ran = worker.log.steps()
    spent = epsilon([Steps(s.noise_multiplier, s.sampling_rate, 1) for s in ran], 1e-4)
    assert 6.0 < spent <= 8.0


def test_a_restart_forgets_the_plan_and_keeps_the_budget(
    worker: SiteWorker, tiny_base: Path, tmp_path: Path
) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    for round_ in range(1, 5):
        trains(worker, made, round_)
    again = SiteWorker(make_site(tmp_path, patient="who"))
    with pytest.raises(Unprepared):
        trains(again, made, 1)
    other = begun(tiny_base, study={"name": "another"})
    refused = again.prepare(other.study, other.frozen)
    assert not refused.admitted
    assert "max_epsilon" in refused.reason


@pytest.mark.parametrize(
    ("policy", "changes", "rule"),
    [
        ({"objectives": ["classify"]}, {}, "policy.objectives"),
        ({"bases": ["sha256:" + "1" * 64]}, {}, "policy.bases"),
        ({"max_epsilon": 2.0}, {}, "policy.max_epsilon"),
        ({"max_delta": 1e-5}, {}, "policy.max_delta"),
        ({}, {"privacy": "off"}, 'privacy.unit = "patient"'),
        ({}, {"privacy": "off", "clipping": {"unit": "patient"}}, "allow_privacy_off"),
        ({}, {"privacy": {"epsilon": 6.0, "delta": 0.1, "unit": "patient"}}, "max_delta"),
        (
            {"max_delta": 0.5},
            {"privacy": {"epsilon": 6.0, "delta": 0.1, "unit": "patient"}},
            "size",
        ),
        ({}, {"privacy": {"epsilon": 6.0, "delta": 1e-4}}, 'privacy.unit = "patient"'),
    ],
)
def test_a_refusal_names_the_rule_before_data_is_read(
    tmp_path: Path,
    tiny_base: Path,
    policy: dict[str, object],
    changes: dict[str, object],
    rule: str,
) -> None:
    # There is no data file at all: reading it would be another error.
    worker = SiteWorker(make_site(tmp_path, policy, patient="who"))
    made = begun(tiny_base, **changes)
    refused = worker.prepare(made.study, made.frozen)
    assert not refused.admitted
    assert rule in refused.reason


def test_privacy_off_runs_only_where_the_site_says_so(tmp_path: Path, tiny_base: Path) -> None:
    notes(tmp_path)
    worker = SiteWorker(make_site(tmp_path, {"allow_privacy_off": True}))
    made = begun(tiny_base, privacy="off")
    assert worker.prepare(made.study, made.frozen).admitted
    one, two = trains(worker, made, 1), trains(worker, made, 1)
    assert all(np.array_equal(one[n], two[n]) for n in one)  # no noise
    assert worker.log.steps() == []


def test_noise_differs_between_runs(worker: SiteWorker, tiny_base: Path) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    one, two = trains(worker, made, 1), trains(worker, made, 2)
    assert not all(np.array_equal(one[n], two[n]) for n in one)


def test_another_base_than_the_plans_is_refused(worker: SiteWorker, tiny_base: Path) -> None:
    made = begun(tiny_base)
    other = made.study.base.model_copy(update={"digest": "sha256:" + "2" * 64})
    with pytest.raises(ModelError, match="digest"):
        worker.prepare(made.study.model_copy(update={"base": other}), made.frozen)


def test_another_frozen_factor_than_the_plans_is_refused(
    worker: SiteWorker, tiny_base: Path
) -> None:
    made = begun(tiny_base)
    assert made.study.lora is not None
    other = made.study.lora.model_copy(update={"a_digest": "sha256:" + "2" * 64})
    with pytest.raises(ModelError, match="frozen factor"):
        worker.prepare(made.study.model_copy(update={"lora": other}), made.frozen)


def test_missing_data_is_the_sites_own_error(tmp_path: Path, tiny_base: Path) -> None:
    worker = SiteWorker(make_site(tmp_path, patient="who"))
    made = begun(tiny_base)
    with pytest.raises(DataError, match=r"no such file|not found|does not exist"):
        worker.prepare(made.study, made.frozen)


def test_the_study_is_not_the_sites_business_to_change(tiny_base: Path) -> None:
    made = begun(tiny_base)
    assert isinstance(made.study, Study)
    with pytest.raises(Exception, match="frozen"):
        made.study.base = made.study.base  # type: ignore[misc]


SITE_TOML = """
[site]
name = "a"
declared_size = 12
[data]
path = "notes.jsonl"
columns = {{ prompt = "note", completion = "answer", patient = "who" }}
[policy]
max_epsilon = {ceiling}
"""


def test_a_tightened_policy_holds_from_the_next_round(tmp_path: Path, tiny_base: Path) -> None:
    notes(tmp_path)
    path = tmp_path / "site.toml"
    path.write_text(SITE_TOML.format(ceiling=8.0))
    worker = site_worker(str(path))
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    trains(worker, made, 1)
    path.write_text(SITE_TOML.format(ceiling=2.0))
    with pytest.raises(BudgetExceeded):
        trains(worker, made, 2)
    assert len(worker.log.steps()) == 1
