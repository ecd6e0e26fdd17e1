"""Several memberships of one hospital pay from one ledger, and nothing else of them meets."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import load_site
from fedtune.core.data.records import read_records, unit_member
from fedtune.core.dp.accountant import epsilon
from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import (
    BudgetExceeded,
    ConfigError,
    InfrastructureError,
    InputError,
    PolicyRefused,
)
from fedtune.core.files.room import ROOM, between_orders
from fedtune.core.ledger.audit_log import verify
from fedtune.core.ledger.entries import EVERY, Charge
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.ledger.spending import facts
from fedtune.core.registry.reasons import reason_of
from fedtune.core.vault import airlock, process
from fedtune.core.vault.budget import Budget
from fedtune.core.vault.prepared import Held, Void
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.seal import receipt
from fedtune.courier.process import list_private, list_readable
from fedtune.evidence import incident
from fedtune.officer.let_go import decide, list_waiting
from fedtune.officer.memberships import still
from fedtune.officer.purge import listing, purge
from fedtune.officer.withdraw import withdraw
from fedtune.public.start import Start
from tests.cli_kit import run as command
from tests.client.hospital_kit import NAMES, load, make_hospital, study_of
from tests.client.site_kit import trains
from tests.expected import raises_nothing


def workers(home: Path, **given: object) -> dict[str, SiteWorker]:
    files = make_hospital(home, **given)  # type: ignore[arg-type]
    return {name: SiteWorker(load_site(path), path) for name, path in files.items()}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def run(worker: SiteWorker, made: Start, rounds: int) -> None:
    admission = worker.prepare(made.study, made.frozen, "c" * 64)
    assert admission.admitted, admission.reason
    for round_ in range(1, rounds + 1):
        trains(worker, made, round_)


# ---------------------------------------------------------------------------------- settings

TWICE = '[datasets.again]\npath = "notes.jsonl"\n[memberships.onco]'


def test_a_membership_is_under_the_ceilings_and_within_its_share(tmp_path: Path) -> None:
    sites = load(tmp_path / "home", ceiling=5.0, shares=(3.0, 8.0))
    assert [site.policy.max_epsilon for site in sites.values()] == [3.0, 8.0]
    assert {site.policy.ceiling for site in sites.values()} == {5.0}
    assert {site.home for site in sites.values()} == {tmp_path / "home"}
    assert len({site.site.state for site in sites.values()}) == 2


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("hospital.toml", "[memberships.onco]", "[memberships.other]", "no membership 'onco'"),
        ("hospital.toml", "[datasets.records]", "[datasets.notes]", "no dataset 'records'"),
        ("hospital.toml", 'path = "notes.jsonl"', 'path = "others.jsonl"', "is not where"),
        ("hospital.toml", "declared_size = 12", "declared_size = 11", "more than the hospital"),
        ("hospital.toml", "max_delta = 1e-4", "max_delta = 0.1", "1 / hospital.declared_size"),
        ("hospital.toml", 'site = "onco', 'sight = "onco', "did you mean site"),
        (
            "hospital.toml",
            'site = "onco',
            'site = "moved',
            "not the site file of membership 'onco'",
        ),
        ("hospital.toml", "[memberships.onco]", TWICE, "are the same place"),
        ("hospital.toml", 'patient = "who"\n', "", "columns.patient of 'records': is 'who'"),
        ("onco/site.toml", 'patient = "who"', 'patient = "answer"', "columns.patient of"),
        ("onco/site.toml", ', patient = "who"', "", "columns.patient of 'records': is None"),
        ("hospital.toml", "[policy]", "[polici]", "did you mean policy"),
        (
            "hospital.toml",
            "[memberships.onco]",
            "[memberships.officer]",
            "is reserved for withdrawals",
        ),
        ("onco/site.toml", "[policy]", 'disjoint_from = ["x"]\n[policy]', "differs from what"),
        ("onco/site.toml", "[policy]", 'declared = "public"\n[policy]', "not a hospital's"),
        ("onco/site.toml", '[hospital]\nhome = ".."\nmembership = "onco"\n', "", None),
    ],
)
def test_what_the_two_files_must_agree_on(
    tmp_path: Path, file: str, old: str, new: str, says: str | None
) -> None:
    home = tmp_path / "home"
    path = make_hospital(home)["onco"]
    edit(home / file, old, new)
    if says is None:
        assert load_site(path).home == load_site(path).site.state
        return
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_site(path)


def test_a_membership_keeps_its_stricter_delta(tmp_path: Path, tiny_base: Path) -> None:
    """A plan is held to it, and the ledger of all is composed at the hospital's."""
    made = workers(tmp_path / "home")
    edit(tmp_path / "home" / "onco" / "site.toml", "[policy]", "[policy]\nmax_delta = 1e-6")
    policies = {name: worker.current().policy for name, worker in made.items()}
    assert {name: policy.max_delta for name, policy in policies.items()} == {
        "cardio": 1e-4,
        "onco": 1e-6,
    }
    assert {policy.delta for policy in policies.values()} == {1e-4}
    assert "policy.max_delta" in refusal(made["onco"], study_of("onco", tiny_base))
    run(made["cardio"], study_of("cardio", tiny_base), 1)
    ledger = made["cardio"].ledger
    totals = {facts(ledger, "records", policy)["budget"]["epsilon"] for policy in policies.values()}
    assert len(totals) == 1


def test_a_vault_is_seen_though_its_site_file_was_moved(tmp_path: Path) -> None:
    """A restore beside it would lose what it pays."""
    home = tmp_path / "home"
    sites = {name: load_site(path) for name, path in make_hospital(home).items()}
    with process._alone(sites["onco"]):
        (home / "onco").rename(home / "moved")
        refused = pytest.raises(InfrastructureError, match="another vault of membership 'onco'")
        with refused, still(home, sites["cardio"]):
            pass
    with still(home, sites["cardio"]):
        pass


def test_a_site_file_cannot_grant_itself_a_share(tmp_path: Path) -> None:
    path = make_hospital(tmp_path / "home")["onco"]
    share = (
        'membership = "onco", max_epsilon = 99.0, max_fallback_epsilon = 99.0, earlier = true, '
        "declared_size = 9, max_rounds = 9, memberships = [], max_delta = 1e-3, "
        "disjoint_from = {}"
    )
    edit(path, 'bases = "any"', f'bases = "any"\nhospital = {{ {share} }}')
    assert load_site(path).policy.ceiling == 8.0
    edit(path, '[hospital]\nhome = ".."\nmembership = "onco"\n', "")
    with pytest.raises(ConfigError, match=re.escape("policy.hospital")):
        load_site(path)


def test_the_same_records_by_a_link_are_the_same_dataset(tmp_path: Path) -> None:
    home = tmp_path / "home"
    path = make_hospital(home)["onco"]
    (home / "onco" / "link.jsonl").symlink_to(home / "notes.jsonl")
    edit(path, '"../notes.jsonl"', '"link.jsonl"')
    assert load_site(path).data.path.name == "link.jsonl"


# ------------------------------------------------------------------------------------ budget


def spent(worker: SiteWorker) -> list[Charge]:
    return worker.home.charges("records")


def alone(charges: list[Charge]) -> float:
    """Return ε of charges as an accountant of their own composes them."""
    return epsilon([charge.event for charge in charges], 1e-4)


def test_each_pays_from_the_same_ledger_and_is_told_the_total(
    tmp_path: Path, tiny_base: Path
) -> None:
    made = workers(tmp_path / "home", ceiling=20.0, shares=(20.0, 20.0))
    run(made["onco"], study_of("onco", tiny_base), 2)
    run(made["cardio"], study_of("cardio", tiny_base), 2)
    charges = spent(made["onco"])
    assert charges == spent(made["cardio"])
    assert [charge.membership for charge in charges] == ["onco"] * 2 + ["cardio"] * 2
    plans = [
        worker._prepared[charge.study]
        for worker in made.values()
        for charge in charges
        if charge.study in worker._prepared
    ]
    for worker, prepared in zip((*made.values(),), (plans[0], plans[-1]), strict=True):
        assert prepared.private is not None
        budget = Budget(worker.current().policy, prepared.private, charges)
        assert budget.total(0).epsilon >= alone(charges)
        own = [
            charge for charge in charges if charge.membership == worker.current().policy.membership
        ]
        assert budget.share.charges == own and len(own) == 2


def refusal(worker: SiteWorker, made: Start) -> str:
    admission = worker.prepare(made.study, made.frozen, "c" * 64)
    assert not admission.admitted
    return admission.reason


def test_what_one_consortium_spent_is_not_there_for_the_other(
    tmp_path: Path, tiny_base: Path
) -> None:
    made = workers(tmp_path / "home", ceiling=5.0)
    run(made["onco"], study_of("onco", tiny_base), 4)
    said = refusal(made["cardio"], study_of("cardio", tiny_base))
    assert reason_of(said) == "of all its consortia together"
    assert not re.search(r"\d", said), "a figure tells the one what the other spent"
    assert len(spent(made["cardio"])) == 4


def test_nor_in_the_midst_of_a_study(tmp_path: Path, tiny_base: Path) -> None:
    """Both were admitted while there was room for either."""
    made = workers(tmp_path / "home", ceiling=5.0)
    studies = {name: study_of(name, tiny_base) for name in NAMES}
    for name in NAMES:
        assert made[name].prepare(studies[name].study, studies[name].frozen, "c" * 64).admitted
    with pytest.raises(BudgetExceeded, match="of all its consortia together"):
        for round_ in range(1, 5):
            for name in NAMES:
                trains(made[name], studies[name], round_)
    assert 2 <= len(spent(made["onco"])) < 8
    assert alone(spent(made["onco"])) <= 5.0


def test_a_share_is_a_ceiling_of_its_own(tmp_path: Path, tiny_base: Path) -> None:
    made = workers(tmp_path / "home", ceiling=20.0, shares=(3.0, 20.0))
    said = refusal(made["cardio"], study_of("cardio", tiny_base))
    assert reason_of(said) == "policy.max_epsilon" and "3.0" in said
    run(made["onco"], study_of("onco", tiny_base), 4)
    run(made["cardio"], study_of("small", tiny_base, epsilon=2.0), 4)
    assert alone(spent(made["onco"])) > 3.0, "the other's charges are none of its share"


def test_a_charge_that_a_restore_entered_is_everybodys(tmp_path: Path, tiny_base: Path) -> None:
    made = workers(tmp_path / "home")
    run(made["onco"], study_of("onco", tiny_base), 1)
    (charge,) = spent(made["onco"])
    prepared = made["onco"]._prepared[charge.study]
    assert prepared.private is not None
    for membership, counted in (("onco", 1), (EVERY, 1), ("cardio", 0), ("", 0)):
        charges = [Charge.read(charge.fields(), membership)]
        policy = made["onco"].current().policy
        assert len(Budget(policy, prepared.private, charges).share.charges) == counted
    earlier = policy.model_copy(
        update={"hospital": policy.hospital.model_copy(update={"earlier": True})}
    )
    charges = [Charge.read(charge.fields())]
    assert len(Budget(earlier, prepared.private, charges).share.charges) == 1


def test_a_ceiling_that_is_lowered_applies_from_the_next_round(
    tmp_path: Path, tiny_base: Path
) -> None:
    home = tmp_path / "home"
    made = workers(home)
    study = study_of("onco", tiny_base)
    run(made["onco"], study, 1)
    edit(
        home / "hospital.toml", "max_epsilon = 8.0\nmax_fallback", "max_epsilon = 2.0\nmax_fallback"
    )
    with pytest.raises(BudgetExceeded):
        trains(made["onco"], study, 2)
    edit(home / "hospital.toml", "[memberships.onco]", "[memberships.gone]")
    with pytest.raises(ConfigError, match="no membership"):
        trains(made["onco"], study, 2)
    assert len(spent(made["onco"])) == 1


# ------------------------------------------------------------------------- what is shared, or not


@pytest.mark.parametrize("table", ["", '[hospital]\nhome = ".."\nmembership = "cardio"\n'])
def test_a_running_membership_does_not_change_whose_ceilings_hold(
    tmp_path: Path, tiny_base: Path, table: str
) -> None:
    made = workers(tmp_path / "home", ceiling=4.0)
    study = study_of("onco", tiny_base)
    run(made["onco"], study, 1)
    site = tmp_path / "home" / "onco" / "site.toml"
    edit(site, '[hospital]\nhome = ".."\nmembership = "onco"\n', table)
    if table:
        edit(tmp_path / "home" / "hospital.toml", "cardio/site.toml", "onco/site.toml")
    with pytest.raises(PolicyRefused, match=r"the table \[hospital\] was changed"):
        trains(made["onco"], study, 2)
    assert len(spent(made["onco"])) == 1


def test_each_signs_with_a_key_of_its_own(tmp_path: Path, tiny_base: Path) -> None:
    made = workers(tmp_path / "home")
    keys = {made[name].key.public for name in NAMES} | {made["onco"].home.key.public}
    assert len(keys) == 3
    study = study_of("onco", tiny_base)
    run(made["onco"], study, 1)
    sealed = made["onco"].sealed(study.study.digest, 1, "0" * 32, "d" * 64)
    for key in keys - {made["onco"].key.public}:
        assert key not in json.dumps(sealed), "another membership's, or the hospital's"


def test_a_membership_that_lost_its_key_keeps_evidence_with_the_hospitals(
    tmp_path: Path, tiny_base: Path
) -> None:
    """A new key would be nobody's. Twin: with its own key, that one signs."""
    made = workers(tmp_path / "home")
    run(made["onco"], study_of("onco", tiny_base), 1)
    site = made["onco"].current()
    own, key = site.site.state / "site.key", made["onco"].key
    assert incident.keep_of_site(site, tmp_path / "kept").signer == key.public
    own.unlink()
    signer = incident.keep_of_site(site, tmp_path / "again").signer
    assert signer == made["onco"].home.key.public and not own.exists()


def test_one_plan_in_two_consortia_is_trained_signed_and_paid_for_twice(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Two coordinators that agree on a plan do not get the same bytes, nor one person's signature
    for both."""
    made = workers(tmp_path / "home", ceiling=20.0)
    study = study_of("both", tiny_base)
    for worker in made.values():
        run(worker, study, 1)
    sent = [trains(worker, study, 1) for worker in made.values()]
    assert len(spent(made["onco"])) == 2, "each is sent again as it was"
    assert any((sent[0][name] != sent[1][name]).any() for name in sent[0])
    digest, policy = study.study.digest, made["onco"].current().policy
    made["onco"].home.admit(digest, "ada", "onco")
    assert made["onco"].home.admitted(digest, policy.own_memberships)
    assert not made["cardio"].home.admitted(digest, made["cardio"].current().policy.own_memberships)


def test_with_shared_noise_a_hospital_takes_part_in_a_plan_once(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Two of its sites in one sum would move it by 2 C under one dose of noise."""
    made = workers(tmp_path / "home", ceiling=20.0)
    run(made["onco"], study_of("both", tiny_base), 1)
    (charge,) = spent(made["onco"])
    plan = made["onco"]._prepared[charge.study].private
    assert plan is not None
    shared = replace(plan, sites=3, colluding=1)
    policies = {name: made[name].current().policy for name in NAMES}
    Budget(policies["onco"], shared, [charge]).check(1)
    with pytest.raises(BudgetExceeded, match="takes part in a plan once") as refused:
        Budget(policies["cardio"], shared, [charge]).check(1)
    restored = [Charge.read(charge.fields(), EVERY)]
    for policy in policies.values():  # whose it was is not known any more
        with pytest.raises(BudgetExceeded, match="takes part in a plan once"):
            Budget(policy, shared, restored).check(1)
    Budget(policies["onco"].model_copy(update={"hospital": None}), shared, restored).check(1)
    assert not re.search(r"\d", str(refused.value))
    Budget(policies["cardio"], plan, [charge]).check(1)


def test_the_limit_of_a_study_holds_for_all_memberships_together(
    tmp_path: Path, tiny_base: Path
) -> None:
    """One plan in two consortia is one study for the people that it trains on."""
    made = workers(tmp_path / "home", ceiling=20.0)
    for name in NAMES:
        limit = "[policy]\nmax_epsilon_per_study = 4.0"
        edit(tmp_path / "home" / name / "site.toml", "[policy]", limit)
    study = study_of("both", tiny_base)
    run(made["cardio"], study, 4)
    told = refusal(made["onco"], study)
    assert "of all its consortia together" in told and not re.search(r"\d", told)
    assert made["cardio"].prepare(study.study, study.frozen, "c" * 64).admitted
    other = study_of("other", tiny_base, epsilon=6.0)
    assert "policy.max_epsilon_per_study" in refusal(made["onco"], other)
    run(made["onco"], study_of("own", tiny_base), 1)


def test_a_patients_lifetime_in_a_plan_is_one_for_all_memberships(
    tmp_path: Path, tiny_base: Path
) -> None:
    made = workers(tmp_path / "home", ceiling=20.0)
    run(made["cardio"], study_of("both", tiny_base), 4)
    charges = spent(made["cardio"])
    plan = made["cardio"]._prepared[charges[0].study].private
    assert plan is not None
    lifelong = replace(plan, lifetime=4.1)
    policies = {name: made[name].current().policy for name in NAMES}
    with pytest.raises(BudgetExceeded, match=r"privacy\.epsilon"):
        Budget(policies["cardio"], lifelong, charges).check(5)
    with pytest.raises(BudgetExceeded, match="of all its consortia together"):
        Budget(policies["onco"], lifelong, charges).check(5)
    Budget(policies["onco"], lifelong, charges[:1]).check(5)


def test_what_is_paid_for_another_unit_meanwhile_is_seen(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another membership charges a round per record while this one reads its records."""
    made = workers(tmp_path / "home")
    study = study_of("onco", tiny_base)
    run(made["onco"], study, 1)
    other, read = spent(made["onco"])[0], SiteWorker.data_in_study

    def meanwhile(self: SiteWorker, *given: Any) -> Any:
        ledger = Ledger(tmp_path / "home")
        ledger.reserve("records", replace(other, unit="record", study="x"), "y", lambda _: None)
        return read(self, *given)

    monkeypatch.setattr(SiteWorker, "data_in_study", meanwhile)
    with pytest.raises(BudgetExceeded, match="is unknown for one patient") as refused:
        trains(made["onco"], study, 2)
    assert "record" not in str(refused.value), "what another's study protects, or a name of both"


def test_the_number_of_rounds_is_shared_without_a_figure(tmp_path: Path, tiny_base: Path) -> None:
    home = tmp_path / "home"
    files = make_hospital(home, ceiling=20.0)
    edit(home / "hospital.toml", "max_delta = 1e-4", "max_delta = 1e-4\nmax_rounds = 5")
    edit(home / "hospital.toml", "[memberships.cardio]", "[memberships.cardio]\nmax_rounds = 1")
    made = {name: SiteWorker(load_site(path), path) for name, path in files.items()}
    studies = {name: study_of(name, tiny_base) for name in NAMES}
    assert made["onco"].room == made["cardio"].room.of("onco")
    run(made["cardio"], studies["cardio"], 1)
    with pytest.raises(BudgetExceeded, match=re.escape("policy.max_rounds")):
        trains(made["cardio"], studies["cardio"], 2)
    run(made["onco"], studies["onco"], 4)
    said = refusal(made["onco"], study_of("more", tiny_base, epsilon=1.0))
    assert reason_of(said) == "of all its consortia together" and not re.search(r"\d", said)


def test_no_receipt_tells_that_two_sites_are_one_hospital(tmp_path: Path, tiny_base: Path) -> None:
    from fedtune.core.wire.keys import SigningKey

    made, coordinator = workers(tmp_path / "home"), SigningKey()
    for name in NAMES:
        study = study_of(name, tiny_base)
        assert made[name].prepare(study.study, study.frozen, coordinator.public).admitted
        trains(made[name], study, 1)
    sealed = made["cardio"].sealed(
        study_of("cardio", tiny_base).study.digest, 1, "0" * 32, "d" * 64
    )
    given = receipt(coordinator, json.loads(sealed["header"])["ledger"])
    with pytest.raises(LedgerError, match="is not one for this site's ledger"):
        made["onco"].begin(study_of("onco", tiny_base).study.digest, 2, json.dumps(given))
    made["cardio"].begin(study_of("cardio", tiny_base).study.digest, 2, json.dumps(given))


def test_what_one_consortium_is_told_holds_no_round_of_another(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both run one plan: what a site states it ran is of its own membership. The twin reads the
    whole log of the hospital."""
    made, study = workers(tmp_path / "home", ceiling=20.0), study_of("both", tiny_base)
    with raises_nothing():
        run(made["cardio"], study, 3)
        run(made["onco"], study, 1)
    prepared = {name: made[name]._require(study.study.digest) for name in NAMES}
    per_round = study.study.training.local_steps

    def stated(name: str) -> int:
        return sum(event["steps"] for event in made[name].events(prepared[name]))

    assert (stated("cardio"), stated("onco")) == (3 * per_round, per_round)
    edit(tmp_path / "home" / "hospital.toml", 'onco/site.toml"', 'onco/site.toml"\nearlier = true')
    log = tmp_path / "home" / "steps.jsonl"
    log.write_text(log.read_text().replace('"membership": "onco", ', ""))  # before it had a home
    path = tmp_path / "home" / "onco" / "site.toml"
    assert len(SiteWorker(load_site(path)).events_of(study.study.digest)) == 1
    with pytest.raises(LedgerError, match="has no steps of round 1 of"):
        stated("onco")  # another membership's earlier steps are not its own
    lines = StepLog.attempts
    monkeypatch.setattr(StepLog, "attempts", lambda log, _=None: lines(log, None))
    assert stated("onco") == 4 * per_round


def test_each_takes_a_receipt_of_its_own_coordinator(tmp_path: Path, tiny_base: Path) -> None:
    from fedtune.core.wire.keys import SigningKey

    made, coordinators = workers(tmp_path / "home"), {name: SigningKey() for name in NAMES}
    for name in NAMES:
        study = study_of(name, tiny_base)
        assert made[name].prepare(study.study, study.frozen, coordinators[name].public).admitted
        trains(made[name], study, 1)
        sealed = made[name].sealed(study.study.digest, 1, "0" * 32, "d" * 64)
        given = receipt(coordinators[name], json.loads(sealed["header"])["ledger"])
        made[name].begin(study.study.digest, 2, json.dumps(given))


def test_a_withdrawal_acts_in_every_membership(tmp_path: Path, tiny_base: Path) -> None:
    made = workers(tmp_path / "home")
    studies = {name: study_of(name, tiny_base) for name in NAMES}
    for name in NAMES:
        run(made[name], studies[name], 1)
    done = withdraw(made["onco"].site, "p5", Ledger(made["onco"].site.home))
    assert done.trained_on and {release.name for release in done.releases} == {*NAMES}
    assert done.receipt_file.parent == tmp_path / "home" / "withdrawals"
    for name in NAMES:
        trains(made[name], studies[name], 2)
        data = made[name]._cached["records"][1].dataset
        assert data.n_units == 11


CP1252 = '"../notes.csv"\nsource = "csv"\noptions = { encoding = "cp1252" }'
READ = [  # keys of [data] in onco's file, and what says that they differ
    ('source = "csv"\noptions = { encoding = "cp1252" }', "encoding 'cp1252' and 'utf-8'"),
    ('source = "csv"\noptions = { delimiter = ";" }', "delimiter ';' and ','"),
    ('source = "fhir"', "source 'fhir' and 'rows'"),
    ('source = "csv"\noptions = { encoding = "UTF8" }', ""),
    ('convert = { name = "notes" }\nfilter = { note = "fever" }', ""),
]


@pytest.mark.parametrize(("keys", "says"), READ)
def test_every_membership_reads_a_patients_key_alike(tmp_path: Path, keys: str, says: str) -> None:
    files = make_hospital(tmp_path)
    edit(files["onco"], '"../notes.jsonl"', f'"../notes.jsonl"\n{keys}')
    for path in files.values():
        if not says:
            load_site(path)
            continue
        with pytest.raises(ConfigError, match="read 'records' differently") as refused:
            load_site(path)
        assert all(str(file) in str(refused.value) for file in files.values())
    if says:
        with pytest.raises(ConfigError, match=re.escape(says)):
            load_site(files["onco"])


def test_a_withdrawn_patient_is_not_read_under_another_key(tmp_path: Path) -> None:
    """onco would read Müller as MÃ¼ller, whom nobody withdrew."""
    files = make_hospital(tmp_path)
    rows = [f"{who},fever,yes\n" for who in ("Müller", "b", "c")]
    (tmp_path / "notes.csv").write_text("who,note,answer\n" + "".join(rows), encoding="utf-8")
    for path in (tmp_path / "hospital.toml", *files.values()):
        path.write_text(path.read_text().replace("notes.jsonl", "notes.csv"))
    book = Ledger(tmp_path)
    withdraw(load_site(files["cardio"]), "Müller", book)

    def left_out(name: str) -> list[str]:
        records, _ = read_records(load_site(files[name]).data, unit="patient")
        out = [one.unit for one in records if book.hashed(unit_member(one.unit)) in withdrawn]
        assert len(records) == 3
        return out

    withdrawn = book.withdrawn()
    assert left_out("cardio") == left_out("onco") == ["Müller"]
    edit(files["onco"], '"../notes.csv"', CP1252)
    with pytest.raises(ConfigError, match="read 'records' differently"):
        left_out("onco")


def test_a_purge_takes_what_is_the_memberships_own(tmp_path: Path, tiny_base: Path) -> None:
    made = workers(tmp_path / "home")
    for name in NAMES:
        run(made[name], study_of(name, tiny_base), 1)
    outbox = sorted((tmp_path / "home" / "outbox").glob("*.bin"))
    listed = [p for p in listing(made["onco"].site).files if p.parent.name == "outbox"]
    assert len(outbox) == 2 and len(listed) == 1 and listed[0] in outbox


def test_a_purge_leaves_what_another_membership_may_send_again(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Both ran one plan; each also waits for a draw of it."""
    made, study = workers(tmp_path / "home", ceiling=20.0), study_of("both", tiny_base)
    for name in NAMES:
        run(made[name], study, 1)
        slot = made[name].slot(study.study.digest, 2, "draw")
        with pytest.raises(Held):
            airlock.hold_draw(made[name], slot, spent(made[name])[0], 1)
    purge(listing(made["cardio"].site))
    assert len(list((tmp_path / "home" / "asked").glob("*.json"))) == 1
    trains(made["onco"], study, 1)
    assert len(spent(made["onco"])) == 2, "it was sent again as it was"
    trains(made["cardio"], study, 1)
    assert len(spent(made["onco"])) == 3


@pytest.mark.parametrize("refuse", [False, True])
def test_a_person_decides_about_one_memberships_answers(
    tmp_path: Path, tiny_base: Path, refuse: bool
) -> None:
    """Each membership has an answer and a draw that wait; cardio's officer decides about both."""
    home, files = tmp_path / "home", make_hospital(tmp_path / "home", ceiling=20.0)
    study = study_of("both", tiny_base)
    for path in files.values():
        edit(path, "[policy]", '[policy]\nanswers = "held"')
    made = {name: SiteWorker(load_site(path), path) for name, path in files.items()}
    for worker in made.values():
        with pytest.raises(Held):
            run(worker, study, 1)
        slot = worker.slot(study.study.digest, 2, "draw")
        with pytest.raises(Held):
            airlock.hold_draw(worker, slot, spent(worker)[0], 1)
    waiting = {name: list_waiting(worker.site) for name, worker in made.items()}
    assert {name: {one.membership for one in found} for name, found in waiting.items()} == {
        name: {name} for name in NAMES
    }
    assert "for cardio" in command("let-go", files["cardio"]).output
    with pytest.raises(InputError, match="nothing waits here under"):
        decide(made["cardio"].site, [waiting["onco"][0].name], refuse=refuse)
    assert len(decide(made["cardio"].site, [], refuse=refuse, every=True)) == 2
    assert list_waiting(made["cardio"].site) == []
    assert list_waiting(made["onco"].site) == waiting["onco"]
    with pytest.raises(Void if refuse else AssertionError):
        trains(made["cardio"], study, 1)
        raise AssertionError("it was sent")
    with pytest.raises(Held):
        trains(made["onco"], study, 1)
    event = "refuse" if refuse else "let-go"
    acts = verify(home, made["onco"].home.key.public).entries
    said = [act["facts"]["membership"] for act in acts if act["event"] == event]
    assert said == ["cardio", "cardio"]


def test_the_courier_reads_nothing_of_the_home(tmp_path: Path) -> None:
    site = load_site(make_hospital(tmp_path / "home")["onco"], alone=True)
    home = tmp_path / "home"
    assert {home / "ledger.db", home / "hospital.toml"} <= {*list_private(site)}
    assert not any(home.is_relative_to(path) or path == home for path in list_readable(site))


# -------------------------------------------------------------------------------------- disk


def size_of(home: Path) -> int:
    return sum(path.stat().st_size for path in home.glob(f"{ROOM}*") if path.suffix != ".lock")


def test_orders_of_two_memberships_are_answered_at_once(tmp_path: Path) -> None:
    """Each gives up space of its own, and what the ledger grows by leaves what all share."""
    rooms = [site.room for site in load(tmp_path / "home").values()]
    one, other = rooms
    assert one.size == other.size == 3 * one.of_an_answer + one.of_growth
    with one.give_up():
        with other.give_up():
            (tmp_path / "home" / "ledger.db").write_bytes(bytes(8192))
            assert size_of(tmp_path / "home") == one.of_growth
            with between_orders(tmp_path / "home") as is_now:
                assert not is_now
        assert size_of(tmp_path / "home") == one.of_growth - 8192 + one.of_an_answer
        with between_orders(tmp_path / "home") as is_now:
            assert not is_now, "the other's order has ended, and this one's has not"
    assert size_of(tmp_path / "home") + 8192 == one.of_growth + 2 * one.of_an_answer
    with between_orders(tmp_path / "home") as is_now:
        assert is_now


def test_the_same_membership_answers_one_order_at_a_time(tmp_path: Path) -> None:
    import fcntl

    room = load(tmp_path / "home")["onco"].room
    with room.give_up():
        descriptor = os.open(tmp_path / "home" / "orders-onco.lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


@pytest.mark.parametrize("of", ["cardio", "officer"])
def test_somebody_elses_space_is_not_given_up(tmp_path: Path, of: str) -> None:
    room = load(tmp_path / "home")["onco"].room
    with room.of(of).give_up():
        pass
    with room.give_up():
        path = tmp_path / "home" / f"{ROOM}-{of}"
        assert path.stat().st_size == room.of_an_answer


def test_what_the_hospital_declares_of_a_dataset_holds_for_every_membership(tmp_path: Path) -> None:
    home = tmp_path / "home"
    files = make_hospital(home)
    said = 'patient = "who"\ncohort = "second"\n[datasets.records.consent]\ncolumn = "ok"\n'
    edit(home / "hospital.toml", 'patient = "who"\n', said)
    for path in files.values():
        data = load_site(path).data
        assert data.cohort == "second" and data.consent is not None and data.consent.column == "ok"
