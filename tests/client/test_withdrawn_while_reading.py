"""Whoever withdraws while a site's records are read takes no part in what is charged afterwards:
the receipt, which the patient keeps, says that no later round reads the patient's records."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import load_study
from fedtune.core.config.site import ConsentTable
from fedtune.core.data.records import unit_member
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import digest as arrays_digest
from fedtune.core.training.local_round import local_round
from fedtune.core.vault import evaluation, worker
from fedtune.core.vault.evaluation import UnitRows
from fedtune.core.vault.worker import SiteWorker
from fedtune.officer.withdraw import withdraw
from fedtune.public.start import start
from tests.client.site_kit import begun, make_site, notes, trains
from tests.continuous.world import lay_out
from tests.guarantee.world import patients
from tests.private_evaluation_kit import WILLING, world

LEAVING = "p4"


def while_reading(
    monkeypatch: pytest.MonkeyPatch, site: SiteWorker, leaving: str, after: int = 1
) -> list[int]:
    """Have a patient withdraw when the site has its records for the `after`-th time, and charges
    them next. Return the list that gets the number of the ledger's entry."""
    times, entered = [0], list[int]()
    read = SiteWorker.data_in_study

    def long(self: SiteWorker, *given: Any) -> CachedDataset:
        data = read(self, *given)
        times[0] += 1
        if times[0] == after:
            found = withdraw(site.site, leaving, site.home)
            entered.append(site.home.withdrawn()[found.receipt["unit"]].seq)
            assert not any(release.rounds >= after for release in found.releases)
        return data

    monkeypatch.setattr(SiteWorker, "data_in_study", long)
    return entered


def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, ...]]:
    """The keys of the units with which each round trains."""
    seen = list[tuple[bytes, ...]]()

    def spy(study: Any, data: CachedDataset, *rest: Any) -> Any:
        seen.append(data.dataset.keys)
        return local_round(study, data, *rest)

    monkeypatch.setattr(worker, "local_round", spy)
    return seen


def forget_the_charge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the list of those who withdrew is not asked again after the charge."""
    monkeypatch.setattr(SiteWorker, "who_remain", lambda self, data, read: read)


@pytest.mark.parametrize("round_", [1, 2])
@pytest.mark.parametrize("consent", [False, True])
def test_a_round_is_without_who_withdrew_before_its_charge(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, round_: int, consent: bool
) -> None:
    """When the files are read for the first time, from memory, and anew with data.consent."""
    notes(tmp_path)
    (tmp_path / "opted-out").touch(mode=0o600)
    site = make_site(tmp_path, patient="who")
    if consent:
        table = ConsentTable(opt_outs=tmp_path / "opted-out")
        site = site.model_copy(update={"data": site.data.model_copy(update={"consent": table})})
    here, made = SiteWorker(site), begun(tiny_base)
    here.prepare(made.study, made.frozen)
    seen, entered = trained_on(monkeypatch), while_reading(monkeypatch, here, LEAVING, round_)
    for number in range(1, 4):
        trains(here, made, number)
    assert entered[0] < here.ledger.spending()[round_ - 1].seq
    assert [unit_member(LEAVING) in keys for keys in seen] == [n < round_ for n in range(1, 4)]
    assert [len(keys) for keys in seen] == [12 if n < round_ else 11 for n in range(1, 4)]


def test_without_asking_after_the_charge_the_patient_trains(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes(tmp_path)
    here, made = SiteWorker(make_site(tmp_path, patient="who")), begun(tiny_base)
    here.prepare(made.study, made.frozen)
    seen, entered = trained_on(monkeypatch), while_reading(monkeypatch, here, LEAVING)
    forget_the_charge(monkeypatch)
    trains(here, made, 1)
    assert entered[0] < here.ledger.spending()[-1].seq
    assert unit_member(LEAVING) in seen[0]


def test_so_it_is_in_a_study_without_a_last_round(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a round is charged to cohorts."""
    study = load_study(lay_out(tmp_path, tiny_base, patients(12)))
    here, made = worker.worker(str(tmp_path / "site-north.toml")), start(study)
    assert here.prepare(made.study, made.frozen).admitted
    seen = trained_on(monkeypatch)
    leaving = str(patients(12)[3]["who"])
    while_reading(monkeypatch, here, leaving)
    trains(here, made, 1)
    assert unit_member(leaving) not in seen[0] and len(seen[0]) == 11


def test_so_it_is_in_a_query(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ceilings = "max_epsilon = 1e9\nmax_epsilon_per_study = 1e9\nmin_noise_multiplier = 0.0\n"
    made = start(load_study(world(tmp_path, tiny_base, 1e-3, policy=WILLING + ceilings)))
    here = worker.worker(str(tmp_path / "site-north.toml"))
    assert here.prepare(made.study, made.frozen).admitted
    counted = list[int]()

    def spy(study: Any, data: CachedDataset) -> UnitRows:
        counted.append(data.dataset.n_units)
        return UnitRows(study, data)

    monkeypatch.setattr(evaluation, "_rows_or_none", spy)
    while_reading(monkeypatch, here, "held-out-3")
    for round_ in (2, 3):
        here.evaluate(made.study.digest, round_, made.adapter)
    assert counted == [11, 11]


def test_if_nobody_can_be_left_out_the_answer_is_noise_alone(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as for want of memory, which follows from how many records there are: the round is
    charged and answered all the same."""
    notes(tmp_path)
    here, made = SiteWorker(make_site(tmp_path, patient="who")), begun(tiny_base)
    here.prepare(made.study, made.frozen)
    seen = trained_on(monkeypatch)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(worker, "without_withdrawn", full)
    with suppress(MemoryError):
        trains(here, made, 1)
    assert seen == [()] and len(here.ledger.spending()) == 1
    assert here.ledger.released(*here.slot(made.study.digest, 1, arrays_digest(made.adapter)))
