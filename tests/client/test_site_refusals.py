"""What a site refuses, and by which rule."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.core.config import Site, Study, load_site
from fedtune.core.config.site import SiteEvaluation
from fedtune.core.data.records import unit_member
from fedtune.core.errors import (
    BudgetExceeded,
    ConfigError,
    DataError,
    ModelError,
    PolicyRefused,
)
from fedtune.core.ledger.entries import RULES, Charge
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.training.local_round import local_round
from fedtune.core.vault.policy import refusals
from fedtune.core.vault.prepared import Unprepared
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.vault.worker import worker as site_worker
from tests.client.site_kit import begun, make_site, notes, trains

pytestmark = pytest.mark.usefixtures("without_self_test")


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
    assert [step.noise_multiplier for step in worker.log.steps()] == [0.0, 0.0]
    private = begun(tiny_base, privacy={"epsilon": 6.0, "delta": 1e-5})
    refused = worker.prepare(private.study, private.frozen)
    assert not refused.admitted and "max_epsilon" in refused.reason  # the dataset's ε is infinite


def test_a_round_without_noise_is_remembered_by_a_restored_ledger(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Its backup is older than the round, and all that was charged before it had noise."""
    notes(tmp_path)
    worker = SiteWorker(make_site(tmp_path, {"allow_privacy_off": True}))
    private = begun(tiny_base, privacy={"epsilon": 6.0, "delta": 1e-5})
    bare = begun(tiny_base, privacy="off")
    assert worker.prepare(private.study, private.frozen).admitted
    trains(worker, private, 1)
    worker.ledger.backup(tmp_path / "backup")
    assert worker.prepare(bare.study, bare.frozen).admitted
    trains(worker, bare, 1)
    (worker.ledger.folder / "ledger.db").unlink()
    restored = Ledger.restore(worker.ledger.folder, tmp_path / "backup")
    without = [c.study for c in restored.charges("records") if c.noise_multiplier == 0]
    assert without == [bare.study.digest], "charged to no study, or as a round with noise"


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


def test_what_a_site_stated_when_it_joined_stands_until_it_is_started_again(
    tmp_path: Path, tiny_base: Path
) -> None:
    """The declared size: q, σ and every statement to the coordinator are of one reading of the
    file, and so are the records of both datasets. The policy alone is read anew."""
    notes(tmp_path)
    path = tmp_path / "site.toml"
    text = SITE_TOML.format(ceiling=8.0) + HELD_OUT
    path.write_text(text)
    made = begun(tiny_base, training=TRAINING)
    worker = SiteWorker(load_site(path), path)
    later = text.replace("size = 12", "size = 24").replace("held.jsonl", "other.jsonl")
    path.write_text(later.replace("max_epsilon = 8.0", "max_epsilon = 7.5"))
    admission = worker.prepare(made.study, made.frozen)
    trains(worker, made, 1)
    (charge,) = worker.ledger.charges("records")
    current = worker.current()
    assert admission.admitted and admission.declared_size == current.site.declared_size == 12
    assert charge.sampling_rate == 6 / 12 and worker.log.steps()[0].sampling_rate == 6 / 12
    assert (current.policy.max_epsilon, current.evaluation) == (7.5, worker.site.evaluation)
    again = SiteWorker(load_site(path), path)
    assert again.prepare(made.study, made.frozen).declared_size == 24
    trains(again, made, 2)
    assert again.ledger.charges("records")[1].sampling_rate == 6 / 24


def test_a_policy_that_fits_another_size_waits_for_a_restart(tmp_path: Path) -> None:
    """δ of everything that is composed stays below 1 / the declared size that the plan is for."""
    path = tmp_path / "site.toml"
    text = SITE_TOML.format(ceiling=8.0)
    path.write_text(text.replace("size = 12", "size = 400"))
    worker = SiteWorker(load_site(path), path)
    path.write_text(text + "max_delta = 0.01\n")
    with pytest.raises(PolicyRefused, match=r"policy\.max_delta .* does not fit the size"):
        worker.current()
    assert SiteWorker(load_site(path), path).current().policy.max_delta == 0.01


TRAINING = {"rounds": 4, "expected_batch": 6, "learning_rate": 0.1}
HELD_OUT = """
[evaluation]
path = "held.jsonl"
columns = { prompt = "note", completion = "answer", patient = "who" }
"""
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
    assert not refused.admitted and "at most 512 tokens" in refused.reason
    with pytest.raises(ConfigError, match="at most 512"):  # nor does a coordinator start it
        begun(tiny_base, objective={"name": "causal_lm", "max_length": 513})


def test_a_base_that_does_not_say_what_it_can_read_is_tried(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Network, "positions", None)
    with pytest.raises(ConfigError, match="= 600 tokens here") as refused:
        begun(tiny_encoder, lora=None, objective=HEAD | {"max_length": 600})
    assert "Error" not in str(refused.value), "its class would tell whether memory ran out"


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
        patch.setattr("fedtune.core.vault.worker.Charge", partial(Charge, rules=RULES - 1))
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

    monkeypatch.setattr("fedtune.core.vault.worker.local_round", spy)
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


def test_what_is_no_longer_called_disjoint_counts_with_the_next_order_of_either(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Also with that of a dataset whose own table did not say it. Twin: the statement stands."""
    made = begun(tiny_base)
    notes(tmp_path)
    site = make_site(tmp_path, patient="who")
    held_out = {"path": site.data.path, "columns": site.data.columns, "name": "held-out"}
    apart = SiteEvaluation.model_validate(held_out | {"disjoint_from": ("records",)})
    stated = site.model_copy(update={"evaluation": apart})
    worker = SiteWorker(stated)
    worker.declare(stated.data, made.study, stated)
    worker.declare(apart, made.study, stated)
    charge = Charge("", "a query", 1, 8.0, 1.0, 1, 1, 1.0, "patient", "first", 2.0)
    worker.ledger.reserve("held-out", charge, "query", lambda _: None)
    taken_back = site.model_copy(
        update={"evaluation": apart.model_copy(update={"disjoint_from": ()})}
    )
    gone = site.model_copy(update={"evaluation": None})
    for now, counted in ((stated, 0), (taken_back, 1), (gone, 1)):
        again = SiteWorker(now)
        again.declare(now.data, made.study, now)
        assert len(again.ledger.charges("records")) == counted


def test_a_withdrawn_patients_key_is_no_records(tmp_path: Path, tiny_base: Path) -> None:
    """A site whose file names no patient any more has no withdrawals to look for in it."""
    notes(tmp_path)
    worker = SiteWorker(make_site(tmp_path))
    for key in ("0", "1", "7"):
        worker.ledger.withdraw(unit_member(key))
    made = begun(tiny_base, privacy={"epsilon": 4.0, "delta": 1e-4})
    worker.prepare(made.study, made.frozen)
    network = build(made.study)
    assert worker.data_for(made.study, network, worker.site.data).dataset.n_units == 24


@pytest.mark.parametrize("table", ["data", "evaluation"])
def test_where_either_file_names_patients_single_records_are_no_unit(
    tiny_base: Path, tmp_path: Path, table: str
) -> None:
    """Consent is a patient's: one row would decide what becomes of that patient's other records."""
    privacy = {"epsilon": 6.0, "delta": 1e-4, "unit": "record"}
    study, site = begun(tiny_base, privacy=privacy).study, make_site(tmp_path)
    plain = site.data.model_copy(update={"path": tmp_path / "held-out.jsonl"})
    of_patients = plain.columns.model_copy(update={"patient": "who"})
    body = site.model_dump() | {"evaluation": {"path": plain.path, "columns": plain.columns}}
    body[table] |= {"columns": of_patients.model_dump()}
    named = Site.model_validate(body, strict=False)
    said = [str(refusal) for refusal in refusals(study, named, None)]
    assert any("this site names a patient column" in text for text in said)
