"""A site decides for itself: policy before data, budget before every round."""

from __future__ import annotations

import gc
import json
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.client.review import read_plan, review
from fedtune.client.site import SiteWorker, Unprepared
from fedtune.client.site import worker as site_worker
from fedtune.client.withdraw import UnknownPatient, withdraw
from fedtune.config import Site, Study
from fedtune.data.records import unit_member
from fedtune.dp import noise
from fedtune.dp.accountant import Steps, epsilon
from fedtune.dp.filter import best_order
from fedtune.dp.plan import plan_for_site
from fedtune.errors import BudgetExceeded, ConfigError, DataError, ModelError, PolicyRefused
from fedtune.ledger.entries import RULES, Charge
from fedtune.models.cache import CachedDataset
from fedtune.models.lora import digest as arrays_digest
from fedtune.models.network import Network, build
from fedtune.models.prefix_store import PREFIX_STORE
from fedtune.models.start import Start, start
from fedtune.training.local_round import local_round
from fedtune.wire.codec import layout, shapes
from fedtune.wire.keys import SigningKey
from fedtune.wire.seal import receipt
from tests.dp.conftest import study


def notes(folder: Path, patients: int = 12) -> Path:
    folder.mkdir(exist_ok=True)
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
            "policy": {"bases": "any", "max_delta": 1e-4} | (policy or {}),
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
    sent = {n: (a.dtype.name, a.shape) for n, a in update.delta.items()}
    assert sent == layout(shapes(made.adapter), "int8")
    (event,) = update.events
    assert set(event) == {"sigma", "q", "max_grad_norm", "records", "steps"}
    assert event["steps"] == len(worker.log.steps()) == 4
    assert epsilon([Steps(event["sigma"], event["q"], 4)], 1e-4) <= 6.0  # type: ignore[arg-type]


def test_more_rounds_than_planned_are_refused(worker: SiteWorker, tiny_base: Path) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    for round_ in (0, 5, -1):
        with pytest.raises(PolicyRefused, match="not in the plan"):
            trains(worker, made, round_)
    assert worker.log.steps() == []


def test_a_round_asked_for_again_is_sent_again_and_not_paid_again(
    worker: SiteWorker, tiny_base: Path, tmp_path: Path
) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    first = worker.train(made.study.digest, 1, made.adapter)
    restarted = SiteWorker(worker.site)
    restarted.prepare(made.study, made.frozen)
    for site in (worker, restarted):
        again = site.train(made.study.digest, 1, made.adapter)
        assert all(np.array_equal(first.delta[n], again.delta[n]) for n in first.delta)
        assert again.events == first.events
    assert len(worker.log.steps()) == len(worker.ledger.charges("records")) == 1


def test_a_receipt_of_a_later_round_ends_the_keeping_of_earlier_updates(
    worker: SiteWorker, tiny_base: Path
) -> None:
    made, coordinator = begun(tiny_base), SigningKey()
    worker.prepare(made.study, made.frozen, coordinator.public)
    given, text = (made.study.digest, made.adapter), ""
    for round_ in (1, 2, 3):
        last = worker.train(given[0], round_, given[1], text)
        text = json.dumps(receipt(coordinator, worker.ledger.head_statement()))
    assert worker.ledger.released(given[0], 1, arrays_digest(made.adapter)) is None
    again = worker.train(given[0], 3, given[1], text)  # lost on the way: sent again, for nothing
    assert all(np.array_equal(last.delta[n], again.delta[n]) for n in last.delta)
    assert len(worker.ledger.charges("records")) == len(worker.log.steps()) == 3
    worker.train(given[0], 1, given[1])  # gone: paid again
    assert len(worker.ledger.charges("records")) == len(worker.log.steps()) == 4


def test_a_study_whose_budget_is_spent_is_still_sent_again(
    worker: SiteWorker, tiny_base: Path
) -> None:
    """The coordinator may have lost the last update after the site had paid for it."""
    made = begun(tiny_base, privacy={"epsilon": 8.0, "delta": 1e-4, "unit": "patient"})
    worker.prepare(made.study, made.frozen)
    last = [trains(worker, made, round_) for round_ in (1, 2, 3, 4)][-1]
    again = SiteWorker(worker.site)
    assert again.prepare(made.study, made.frozen).admitted
    sent = trains(again, made, 4)
    assert all(np.array_equal(last[n], sent[n]) for n in last)
    with pytest.raises(BudgetExceeded):
        again.train(made.study.digest, 4, {k: v + 1 for k, v in made.adapter.items()})
    assert len(again.ledger.charges("records")) == 4


def test_a_round_from_another_adapter_is_paid_for_until_the_ceiling(
    worker: SiteWorker, tiny_base: Path
) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    with pytest.raises(BudgetExceeded, match="max_epsilon"):
        for n in range(20):
            worker.train(made.study.digest, 1, {k: v + n for k, v in made.adapter.items()})
    ran = worker.log.steps()
    spent = epsilon([Steps(s.noise_multiplier, s.sampling_rate, 1) for s in ran], 1e-4)
    assert 6.0 < spent <= 8.0
    assert len(worker.ledger.charges("records")) == len(ran)


def test_a_second_study_is_held_to_the_first_ones_order(
    worker: SiteWorker, tiny_base: Path
) -> None:
    """The filter's order is fixed before any result is seen, whatever a later study would like."""
    small = {"epsilon": 1.0, "delta": 1e-4, "unit": "patient"}
    first = begun(tiny_base, privacy=small)
    worker.prepare(first.study, first.frozen)
    trains(worker, first, 1)
    (order,) = {charge.order for charge in worker.ledger.charges("records")}
    sampled = {"rounds": 4, "sampling_rate": 0.2, "learning_rate": 0.1}
    other = begun(tiny_base, privacy=small, study={"name": "other"}, training=sampled)
    assert worker.prepare(other.study, other.frozen).admitted
    trains(worker, other, 1)
    charges = worker.ledger.charges("records")
    assert [charge.order for charge in charges] == [order, order]
    plan = plan_for_site(other.study, 12)
    assert best_order(plan.events(plan.steps), 8.0, 1e-4) != order  # what it would have liked


def test_a_crash_between_reservation_and_release_is_charged(
    worker: SiteWorker, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fedtune.client.site.local_round", crash)
        trains(worker, made, 1)
    trains(worker, made, 1)
    charges = worker.ledger.charges("records")
    assert [charge.round for charge in charges] == [1, 1] and len(worker.log.steps()) == 1


def test_a_signed_admission_is_for_one_plan(tmp_path: Path, tiny_base: Path) -> None:
    notes(tmp_path)
    worker = SiteWorker(make_site(tmp_path, {"admission": "signed"}, patient="who"))
    made = begun(tiny_base)
    refused = worker.prepare(made.study, made.frozen)
    assert not refused.admitted and "nobody at the site has signed" in refused.reason
    (waiting,) = (tmp_path / "state" / "plans").glob("*.json")
    plan = read_plan(waiting, worker.site)
    assert plan.digest == made.study.digest
    seen = review(plan, worker.site, worker.ledger)
    assert seen.refusals == [] and seen.digest == plan.digest
    words = " ".join(line for _, lines in seen.sections for line in lines)
    assert "ε = 5.99" in words and "as installed here" in words
    worker.ledger.admit(seen.digest, "officer")
    assert worker.prepare(made.study, made.frozen).admitted
    other = begun(tiny_base, study={"name": "another"})
    assert not worker.prepare(other.study, other.frozen).admitted


def test_a_withdrawn_patient_is_in_no_later_round(
    worker: SiteWorker, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[CachedDataset]] = []
    sizes: list[int] = []

    def spy(study: Study, data: CachedDataset, *rest: Any) -> dict[str, np.ndarray]:
        sizes.append(data.dataset.n_units)
        seen.append(weakref.ref(data))
        return local_round(study, data, *rest)

    monkeypatch.setattr("fedtune.client.site.local_round", spy)
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    trains(worker, made, 1)
    found = withdraw(worker.site, "p4", worker.ledger)
    assert found.seen and found.in_file == 2
    ((release),) = found.releases
    assert (release.rounds, release.digest) == (1, made.study.digest)
    trains(worker, made, 2)
    assert sizes == [12, 11]
    gc.collect()
    assert seen[0]() is None and seen[1]() is not None  # nor are the old states in memory
    again = SiteWorker(worker.site)  # and not after a restart either
    again.prepare(made.study, made.frozen)
    trains(again, made, 3)
    assert sizes == [12, 11, 11]
    with pytest.raises(UnknownPatient) as raised:
        withdraw(worker.site, "stranger", worker.ledger)
    assert "stranger" not in str(raised.value) and len(worker.ledger.withdrawn()) == 1
    never = withdraw(worker.site, "stranger", worker.ledger, unseen=True)
    assert (never.seen, never.in_file, never.releases) == (False, 0, [])


@pytest.mark.parametrize("memory", [None, 0.0])
def test_a_withdrawn_patients_states_are_erased_and_the_others_kept(
    tmp_path: Path, tiny_base: Path, memory: float | None
) -> None:
    """In memory, and in the file."""
    site_worker.cache_clear()  # nobody else's states are counted
    gc.collect()
    with notes(tmp_path).open("a") as file:
        file.write(json.dumps({"who": "p4", "note": "a rare finding", "answer": "no"}) + "\n")
    site = make_site(tmp_path, patient="who")
    table = site.site.model_copy(update={"cache_memory": memory})
    worker = SiteWorker(site.model_copy(update={"site": table}))
    lora = {"rank": 4, "alpha": 8.0, "modules": ["q_proj"], "last_layers": 2}
    made = begun(tiny_base, lora=lora)
    worker.prepare(made.study, made.frozen)
    trains(worker, made, 1)
    states = build(made.study).states
    everyone, size = set(states), PREFIX_STORE.in_memory + PREFIX_STORE.on_disk
    assert size > 0 and (PREFIX_STORE.on_disk > 0) == (memory == 0)
    withdraw(worker.site, "p4", worker.ledger)
    trains(worker, made, 2)
    gc.collect()
    (gone,) = everyone - set(states)  # p4's other notes read as other patients' do
    assert set(states) == everyone - {gone} and PREFIX_STORE.in_memory + PREFIX_STORE.on_disk < size


def test_each_study_must_learn_before_it_costs_anything_and_is_tried_once(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.client.site._trains", set())
    tried: list[str] = []

    def check(study: Study, *_: object) -> None:
        tried.append(study.digest)
        if study.training.learning_rate != 0.1:
            raise ModelError("a step did not lower the loss")

    monkeypatch.setattr("fedtune.client.site.check_trains", check)
    good = begun(tiny_base)
    training = {"rounds": 2, "sampling_rate": 0.5, "learning_rate": 0.2}
    bad = begun(tiny_base, training=training)
    for number in range(2):
        notes(tmp_path / str(number))
        worker = SiteWorker(make_site(tmp_path / str(number), patient="who"))
        assert worker.prepare(good.study, good.frozen).admitted
        with pytest.raises(ModelError):
            worker.prepare(bad.study, bad.frozen)
    assert tried == [good.study.digest, bad.study.digest, bad.study.digest]


def test_a_failed_self_test_refuses_the_round(
    worker: SiteWorker, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.client.site._tested", set())
    honest = noise.gaussian_on_grid
    monkeypatch.setattr(noise, "gaussian_on_grid", lambda d, std, grid: honest(d, std * 0.9, grid))
    made = begun(tiny_base)
    refused = worker.prepare(made.study, made.frozen)
    assert not refused.admitted and "self-test" in refused.reason
    with pytest.raises(Unprepared):
        trains(worker, made, 1)
    assert worker.log.steps() == []


@pytest.mark.parametrize(
    ("policy", "changes", "rule"),
    [
        ({"strategies": []}, {}, "policy.strategies"),
        ({"modules": ["o_proj"]}, {}, "policy.modules"),
        ({"max_rank": 2}, {}, "policy.max_rank"),
        ({"max_steps": 3}, {}, "policy.max_steps"),
        ({"max_sampling_rate": 0.5}, {}, "policy.max_sampling_rate"),
        ({"max_grad_norm": 0.5}, {}, "policy.max_grad_norm"),
        ({"min_units": 13}, {}, "policy.min_units"),
        ({"min_noise_multiplier": 50.0}, {}, "policy.min_noise_multiplier"),
        ({"max_epsilon_per_study": 5.0}, {}, "policy.max_epsilon_per_study"),
        ({"coordinators": ["0" * 64]}, {}, "policy.coordinators"),
        ({"bases": []}, {}, "policy.bases"),
    ],
)
def test_every_bound_of_the_policy_refuses_by_name(
    tmp_path: Path,
    tiny_base: Path,
    policy: dict[str, object],
    changes: dict[str, object],
    rule: str,
) -> None:
    worker = SiteWorker(make_site(tmp_path, policy, patient="who"))
    made = begun(tiny_base, **changes)
    refused = worker.prepare(made.study, made.frozen, "1" * 64)
    assert not refused.admitted and rule in refused.reason
    assert not (tmp_path / "notes.jsonl").exists()  # no record was there to be read


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
    assert all(np.array_equal(one[n], two[n]) for n in one)
    assert not (tmp_path / "state" / "outbox").exists()  # nothing un-noised on disk
    other = SiteWorker(make_site(tmp_path / "other", {"allow_privacy_off": True}))
    notes(tmp_path / "other")
    other.prepare(made.study, made.frozen)
    twin = trains(other, made, 1)
    assert all(np.array_equal(one[n], twin[n]) for n in one)  # no noise
    assert worker.log.steps() == []
    private = begun(tiny_base, privacy={"epsilon": 6.0, "delta": 1e-5})
    refused = worker.prepare(private.study, private.frozen)
    assert not refused.admitted and "max_epsilon" in refused.reason  # the dataset's ε is infinite


@pytest.mark.parametrize("value", [float("inf"), 1e9])
def test_an_adapter_that_is_refused_costs_nothing(
    worker: SiteWorker, tiny_base: Path, value: float
) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    given = {name: np.full_like(array, value) for name, array in made.adapter.items()}
    with pytest.raises(ModelError):
        worker.train(made.study.digest, 1, given)
    assert worker.ledger.charges("records") == []


def test_noise_differs_between_runs(worker: SiteWorker, tiny_base: Path) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    one, two = trains(worker, made, 1), trains(worker, made, 2)
    assert not all(np.array_equal(one[n], two[n]) for n in one)


def test_another_base_than_the_plans_is_refused(worker: SiteWorker, tiny_base: Path) -> None:
    made = begun(tiny_base)
    other = made.study.base.model_copy(update={"digest": "sha256:" + "2" * 64})
    refused = worker.prepare(made.study.model_copy(update={"base": other}), made.frozen)
    assert not refused.admitted and "does not have the plan's base" in refused.reason


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
bases = "any"
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


HEAD = {"name": "classify", "labels": ["yes", "no"], "max_length": 64}


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_a_length_that_the_base_cannot_read_is_refused_before_any_record_is_read(
    tmp_path: Path, tiny_base: Path, tiny_encoder: Path, kind: str
) -> None:
    """Else the longest record would tell by an error how long it is."""
    notes(tmp_path)
    worker = SiteWorker(make_site(tmp_path, patient="who"))
    made = begun(tiny_base)
    if kind == "encoder":
        made = begun(tiny_encoder, lora=None, objective=HEAD)
    objective = made.study.objective.model_copy(update={"max_length": 513})
    refused = worker.prepare(made.study.model_copy(update={"objective": objective}), made.frozen)
    assert not refused.admitted and "at most 512, its positions" in refused.reason
    with pytest.raises(ConfigError, match="at most 512"):  # nor does a coordinator start it
        begun(tiny_base, objective={"name": "causal_lm", "max_length": 513})


def test_a_base_that_does_not_say_what_it_can_read_is_tried(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "positions", None)
    with pytest.raises(ConfigError, match="= 600 tokens here"):
        begun(tiny_encoder, lora=None, objective=HEAD | {"max_length": 600})


def test_what_was_charged_for_another_unit_is_not_composed_with_a_study(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Before there was a patient column: what one patient spent then is not known."""
    notes(tmp_path)
    records = begun(tiny_base, privacy={"epsilon": 4.0, "delta": 1e-4})
    before = SiteWorker(make_site(tmp_path))
    assert before.prepare(records.study, records.frozen).admitted
    trains(before, records, 1)
    worker = SiteWorker(make_site(tmp_path, patient="who"))
    made = begun(tiny_base)
    refused = worker.prepare(made.study, made.frozen)
    assert not refused.admitted and "they were charged per record" in refused.reason
    assert len(worker.ledger.charges("records")) == 1
    worker.ledger.accept("records", "officer")
    assert worker.prepare(made.study, made.frozen).admitted


def test_nothing_runs_on_top_of_what_an_earlier_release_charged_until_the_site_signs(
    worker: SiteWorker, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    with monkeypatch.context() as patch:
        patch.setattr("fedtune.client.site.Charge", partial(Charge, rules=RULES - 1))
        trains(worker, made, 1)
    with pytest.raises(BudgetExceeded, match="an earlier release charged them"):
        trains(worker, made, 2)
    worker.ledger.accept("records", "officer")
    trains(worker, made, 2)
    trains(worker, made, 3)
    assert len(worker.ledger.charges("records")) == 3


@pytest.mark.parametrize("shared", [False, True])
def test_a_patient_in_two_disjoint_datasets_is_left_out_of_the_later_and_nothing_is_said(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Nor does the old dataset's spending count, whose patients are not in the new."""
    units: list[int] = []

    def spy(study: Study, data: CachedDataset, *rest: Any) -> dict[str, np.ndarray]:
        units.append(data.dataset.n_units)
        return local_round(study, data, *rest)

    monkeypatch.setattr("fedtune.client.site.local_round", spy)
    made = begun(tiny_base, privacy={"epsilon": 7.9, "delta": 1e-4, "unit": "patient"})
    notes(tmp_path)
    first = SiteWorker(make_site(tmp_path, patient="who"))
    first.prepare(made.study, made.frozen)
    for round_ in range(1, 5):
        trains(first, made, round_)
    rows = [{"who": f"new{n}", "note": "fever and cough, day 0", "answer": "no"} for n in range(6)]
    rows += [{"who": "p4", "note": "another note", "answer": "no"}] * shared
    (tmp_path / "later.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site = make_site(tmp_path, patient="who")
    table = {"path": tmp_path / "later.jsonl", "name": "later", "disjoint_from": ("records",)}
    later = SiteWorker(site.model_copy(update={"data": site.data.model_copy(update=table)}))
    privacy = {"epsilon": 7.9, "delta": 1e-4, "unit": "patient"}
    second = begun(tiny_base, privacy=privacy, study={"name": "second"})
    assert later.prepare(second.study, second.frozen).admitted
    trains(later, second, 1)
    assert units == [12, 12, 12, 12, 6]
    assert len(later.ledger.charges("later")) == 1


def test_a_withdrawn_patients_key_is_no_records(tmp_path: Path, tiny_base: Path) -> None:
    """A site whose file names no patient any more has no withdrawals to look for in it."""
    notes(tmp_path)
    worker = SiteWorker(make_site(tmp_path))
    for key in ("0", "1", "7"):
        worker.ledger.withdraw(unit_member(key))
    made = begun(tiny_base, privacy={"epsilon": 4.0, "delta": 1e-4})
    worker.prepare(made.study, made.frozen)
    network = build(made.study)
    assert worker.seen(made.study, network).dataset.n_units == 24
