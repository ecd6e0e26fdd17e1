"""A site decides for itself: policy before data, budget before every round."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.config import Study
from fedtune.core.config.site import ConsentTable
from fedtune.core.dp import noise
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.dp.filter import best_order
from fedtune.core.errors import BudgetExceeded, DataError, ModelError, PolicyRefused
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays
from fedtune.core.models.lora import digest as arrays_digest
from fedtune.core.models.prefix_store import PREFIX_STORE
from fedtune.core.registry import process_cache
from fedtune.core.training.local_round import local_round
from fedtune.core.training.shared_records import fingerprint
from fedtune.core.vault.budget import MOST_ATTEMPTS
from fedtune.core.vault.prepared import Unprepared
from fedtune.core.vault.site_checks import self_test
from fedtune.core.vault.waiting_plans import keep_plan
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.codec import layout, shapes
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import receipt
from fedtune.officer.review import read_plan, review
from fedtune.officer.withdraw import UnknownPatient, withdraw
from tests.client.site_kit import begun, make_site, notes, trains


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


def test_a_round_whose_records_are_gone_is_noise_alone_and_charged(
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever becomes of the records in mid-study, the coordinator gets an update."""
    notes(tmp_path)
    site = make_site(tmp_path, patient="who")
    (tmp_path / "no").touch(0o600)
    data = site.data.model_copy(update={"consent": ConsentTable(opt_outs=tmp_path / "no")})
    worker, made = (
        SiteWorker(site.model_copy(update={"data": data})),
        begun(tiny_base, wire={"update": "float32"}),
    )
    assert worker.prepare(made.study, made.frozen).admitted
    monkeypatch.setattr(noise, "gaussian_on_grid", lambda d, *_: torch.zeros(d).long())
    assert any(array.any() for array in trains(worker, made, 1).values())
    site.data.path.unlink()
    second: Arrays = {}
    with contextlib.suppress(DataError):
        second = trains(worker, made, 2)
    assert second and not any(array.any() for array in second.values())
    assert "noise alone until" in caplog.text
    assert [charge.round for charge in worker.ledger.charges("records")] == [1, 2]


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


@pytest.mark.parametrize("simulated", [False, True])
def test_a_later_round_ends_the_keeping_of_earlier_updates(
    worker: SiteWorker, tiny_base: Path, simulated: bool
) -> None:
    """But for a simulation's, which may be run again for nothing."""
    made, coordinator = begun(tiny_base), SigningKey()
    worker.simulated = simulated
    worker.prepare(made.study, made.frozen, coordinator.public)
    given, text = (made.study.digest, made.adapter), ""
    for round_ in (1, 2, 3):
        last = worker.train(given[0], round_, given[1], text)
        text = json.dumps(receipt(coordinator, worker.ledger.head_statement()))
    first = worker.ledger.released(given[0], 1, arrays_digest(made.adapter))
    assert (first is None) is not simulated
    again = worker.train(given[0], 3, given[1], text)  # lost on the way: sent again, for nothing
    assert all(np.array_equal(last.delta[n], again.delta[n]) for n in last.delta)
    assert len(worker.ledger.charges("records")) == len(worker.log.steps()) == 3
    worker.train(given[0], 1, given[1])  # where it is gone: paid again
    paid = 3 if simulated else 4
    assert len(worker.ledger.charges("records")) == len(worker.log.steps()) == paid


def test_a_plan_is_not_trained_from_as_many_adapters_as_a_coordinator_sends(
    worker: SiteWorker, tiny_base: Path
) -> None:
    """Each is another release, and paid for; a person read the plan's own ε, not the site's
    ceiling."""
    privacy = {"noise_multiplier": 60.0, "delta": 1e-4, "unit": "patient"}
    made = begun(tiny_base, privacy=privacy)
    worker.prepare(made.study, made.frozen)

    def adapter(number: int) -> Arrays:
        return {name: values + np.float32(number) / 100 for name, values in made.adapter.items()}

    for number in range(MOST_ATTEMPTS):
        worker.train(made.study.digest, 1, adapter(number))
    with pytest.raises(BudgetExceeded, match=f"was paid for {MOST_ATTEMPTS} times"):
        worker.train(made.study.digest, 1, adapter(MOST_ATTEMPTS))
    worker.train(made.study.digest, 1, adapter(MOST_ATTEMPTS - 1))  # again
    assert len(worker.ledger.charges("records")) == MOST_ATTEMPTS
    worker.train(made.study.digest, 2, adapter(0))


def test_a_round_of_a_study_with_a_schedule_is_not_ordered_without_end(
    worker: SiteWorker, tiny_base: Path
) -> None:
    """Also where the budget of everybody there is used up: each order is an entry of the ledger.
    Twin: another round."""
    privacy = {"epsilon": 8.0, "noise_multiplier": 9.0, "delta": 1e-4, "unit": "patient"}
    columns = {"prompt": "q", "completion": "a"}
    made = begun(
        tiny_base,
        privacy=privacy,
        schedule={"every": "1h"},
        training={"learning_rate": 0.1, "local_steps": 1, "sampling_rate": 1.0},
        evaluation={"path": "public.jsonl", "columns": columns},
    )
    worker.prepare(made.study, made.frozen)

    def train(round_: int, number: int) -> None:
        changed = {name: value + np.float32(number) for name, value in made.adapter.items()}
        worker.train(made.study.digest, round_, changed)

    for number in range(MOST_ATTEMPTS):
        train(1, number)
    with pytest.raises(BudgetExceeded, match=f"was paid for {MOST_ATTEMPTS} times"):
        train(1, MOST_ATTEMPTS)
    assert len(worker.ledger.charges("records")) == MOST_ATTEMPTS
    train(2, 0)


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
    assert order == best_order(8.0, 1e-4)


def test_a_crash_between_reservation_and_release_is_charged(
    worker: SiteWorker, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fedtune.core.vault.worker.local_round", crash)
        trains(worker, made, 1)
    trains(worker, made, 1)
    charges = worker.ledger.charges("records")
    assert [charge.round for charge in charges] == [1, 1] and len(worker.log.steps()) == 1


@pytest.mark.parametrize("rule", ["reviewed", "signed"])
def test_a_plan_that_nobody_signed_waits_and_a_signature_is_for_one_plan(
    tmp_path: Path, tiny_base: Path, rule: str
) -> None:
    """Twin: under "standing" it is admitted."""
    notes(tmp_path)
    worker = SiteWorker(make_site(tmp_path, {"admission": rule}, patient="who"))
    made = begun(tiny_base)
    refused = worker.prepare(made.study, made.frozen)
    assert refused.waits and not (tmp_path / "state" / "counts.json").exists()  # no record read
    assert not refused.admitted and "nobody at the site has signed" in refused.reason
    plan = read_plan(keep_plan(worker.site, made.study), worker.site)
    assert plan.digest == made.study.digest
    seen = review(plan, worker.site, worker.ledger)
    assert seen.refusals == [] and seen.digest == plan.digest
    words = " ".join(line for _, lines in seen.sections for line in lines)
    assert "ε = 5.99" in words and "as installed here" in words
    worker.ledger.admit(seen.digest, "officer")
    assert worker.prepare(made.study, made.frozen).admitted
    other = begun(tiny_base, study={"name": "another"})
    assert worker.prepare(other.study, other.frozen).waits
    assert not worker.ledger.charges("records")
    standing = SiteWorker(make_site(tmp_path, {}, patient="who"))
    assert standing.prepare(other.study, other.frozen).admitted


def test_who_simulates_has_reviewed_the_plan(tmp_path: Path, tiny_base: Path) -> None:
    """Twin: "signed" asks for a signature in a simulation too."""
    notes(tmp_path)
    made = begun(tiny_base)
    for rule, admitted in {"reviewed": True, "signed": False}.items():
        worker = SiteWorker(make_site(tmp_path, {"admission": rule}, patient="who"))
        worker.simulated = True
        assert worker.prepare(made.study, made.frozen).admitted is admitted


def test_a_withdrawn_patient_is_in_no_later_round(
    worker: SiteWorker, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[CachedDataset]] = []
    sizes: list[int] = []

    def spy(study: Study, data: CachedDataset, *rest: Any) -> dict[str, np.ndarray]:
        sizes.append(data.dataset.n_units)
        seen.append(weakref.ref(data))
        return local_round(study, data, *rest)

    monkeypatch.setattr("fedtune.core.vault.worker.local_round", spy)
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    trains(worker, made, 1)
    found = withdraw(worker.site, "p4", worker.ledger)
    assert found.trained_on and found.in_file == 2
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
    assert (never.trained_on, never.in_file, never.releases) == (False, 0, [])


def test_a_withdrawal_lets_nobody_elses_new_rows_in(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that grew in mid-study is read at the next study, whoever withdraws meanwhile: else
    the other patients' records would tell of the withdrawal. The twin is the site without her."""
    made, read = begun(tiny_base), dict[str, str]()
    for name in ("withdraws", "never there"):
        path = notes(tmp_path / name)
        if name == "never there":
            rows = [line for line in path.read_text().splitlines() if '"p4"' not in line]
            path.write_text("".join(line + "\n" for line in rows))
        worker = SiteWorker(make_site(tmp_path / name, patient="who"))
        worker.prepare(made.study, made.frozen)
        trains(worker, made, 1)
        with path.open("a") as file:
            file.write(json.dumps({"who": "p99", "note": "came later", "answer": "no"}) + "\n")
        if name == "withdraws":
            withdraw(worker.site, "p4", worker.ledger)

        def spy(study: Study, data: CachedDataset, *rest: Any, name: str = name) -> Any:
            read[name] = fingerprint(data.dataset)
            return local_round(study, data, *rest)

        monkeypatch.setattr("fedtune.core.vault.worker.local_round", spy)
        trains(worker, made, 2)
        monkeypatch.undo()
    assert read["withdraws"] == read["never there"]


@pytest.mark.parametrize("memory", [None, 0.0])
def test_a_withdrawn_patients_states_are_erased_and_the_others_kept(
    tmp_path: Path, tiny_base: Path, memory: float | None
) -> None:
    """In memory, and in the file."""
    process_cache.clear("workers")  # nobody else's states are counted
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
    process_cache.clear("training checks")
    tried: list[str] = []

    def check(study: Study, *_: object) -> None:
        tried.append(study.digest)
        if study.training.learning_rate != 0.1:
            raise ModelError("a step did not lower the loss")

    monkeypatch.setattr("fedtune.core.vault.site_checks.check_trains", check)
    good = begun(tiny_base)
    training = {"rounds": 2, "sampling_rate": 1.0, "learning_rate": 0.2}
    bad = begun(tiny_base, training=training)
    for number in range(2):
        notes(tmp_path / str(number))
        worker = SiteWorker(make_site(tmp_path / str(number), patient="who"))
        assert worker.prepare(good.study, good.frozen).admitted
        with pytest.raises(ModelError):
            worker.prepare(bad.study, bad.frozen)
    assert tried == [good.study.digest, bad.study.digest, bad.study.digest]


def test_a_plan_of_another_kind_of_noise_is_tested_for_itself(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared noise lies on a grid of its own, by how many sites share it."""
    process_cache.clear("self-tests")
    tested: list[Study] = []
    monkeypatch.setattr(
        "fedtune.core.vault.site_checks.selftest.require",
        lambda study, *_: tested.append(study),
    )
    alone = begun(tiny_base, strategy={"min_sites": 3}).study
    shared = [
        begun(tiny_base, secure_aggregation={}, strategy={"min_sites": sites}).study
        for sites in (3, 4)
    ]
    for plan in (alone, alone.changed(study={"name": "another"}), *shared, *shared):
        self_test(plan, build(alone), 20, None)
    assert tested == [alone, *shared]


def test_a_failed_self_test_refuses_the_round(
    worker: SiteWorker, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process_cache.clear("self-tests")
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
