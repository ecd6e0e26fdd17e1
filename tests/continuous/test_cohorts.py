"""Who arrives late pays from then on, never less; who has spent everything is out, unseen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fedtune.core.vault.worker
from fedtune.core.config import load_site
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.records import unit_member
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.errors import Refused
from fedtune.core.ledger.account import Account
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.spending import find_heaviest_budget
from fedtune.server.store import load
from tests.continuous.world import DELTA, LIFE, SIGMA, lay_out, run, write
from tests.guarantee.test_wire_inventory import outside, shape
from tests.guarantee.world import Row, patients

TWO = "max_epsilon = 1.7"  # a policy that pays for two rounds of a patient's life


@dataclass
class Seen:
    """What the northern site really trained with: per round its units' keys and its divisor."""

    rounds: list[frozenset[bytes]] = field(default_factory=list)
    divisors: list[float] = field(default_factory=list)

    def times(self, patient: str) -> int:
        return sum(unit_member(patient) in units for units in self.rounds)


@contextmanager
def watched(folder: Path) -> Iterator[Seen]:
    seen, honest = Seen(), fedtune.core.vault.worker.local_round

    def local_round(study: Any, data: Any, plan: Any, log: Any, *rest: Any) -> Any:
        if log.path.parent == folder / "state-north":
            seen.rounds.append(frozenset(data.dataset.keys))
            seen.divisors.append(plan.plan.divisor)
        return honest(study, data, plan, log, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedtune.core.vault.worker, "local_round", local_round)
        yield seen


def paid(folder: Path, patient: str) -> int:
    """Noised steps that the northern ledger counts against the patient."""
    book = Ledger(folder / "state-north")
    arrival = book.arrival("records")(unit_member(patient))
    (cohort,) = [c for c in book.cohorts("records") if c.arrival == arrival]
    return sum(charge.steps for charge in cohort.charges)


def under_charged(folder: Path, seen: Seen, names: list[str]) -> list[str]:
    return [name for name in names if paid(folder, name) < seen.times(name)]


def named(*numbers: int) -> list[str]:
    return [f"patient-{n}" for n in numbers]


def growing(folder: Path, by: dict[int, list[Row]]) -> Callable[[int], None]:
    """After round n the northern file holds by[n]."""

    def on_round(number: int) -> None:
        if number in by:
            write(folder / "north.jsonl", by[number])

    return on_round


def test_a_late_patient_pays_from_the_arrival_only(tmp_path: Path, tiny_base: Path) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))
    with watched(tmp_path) as seen:
        run(study, 4, growing(tmp_path, {1: patients(13), 3: patients(15)}))
    assert [len(units) for units in seen.rounds] == [12, 13, 13, 15]
    everybody = named(*range(15))
    assert {name: paid(tmp_path, name) for name in everybody} == {
        name: seen.times(name) for name in everybody
    }
    assert [paid(tmp_path, name) for name in named(0, 12, 14)] == [4, 3, 1]
    site = load_site(tmp_path / "site-north.toml")
    spent = find_heaviest_budget(
        "records", Ledger(tmp_path / "state-north").cohorts("records"), site.policy
    )
    assert spent.epsilon == pytest.approx(epsilon([Steps(SIGMA, 1.0, 4)], DELTA))


def test_the_twin_that_charges_late_patients_nothing_is_caught(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))
    monkeypatch.setattr(Account, "_is_charged", lambda self, spent, dataset, arrival: arrival < 4)
    with watched(tmp_path) as seen:
        run(study, 2, growing(tmp_path, {1: patients(13)}))
    assert under_charged(tmp_path, seen, named(0, 12)) == ["patient-12"]


def test_who_has_spent_everything_is_out_and_the_others_go_on(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12), TWO)
    with watched(tmp_path) as seen:
        run(study, 4, growing(tmp_path, {1: patients(14)}))
    assert [seen.times(name) for name in named(0, 12)] == [2, 2]
    assert [len(units) for units in seen.rounds] == [12, 14, 2, 0]
    assert not under_charged(tmp_path, seen, named(*range(14)))
    for cohort in Ledger(tmp_path / "state-north").cohorts("records"):
        events = [charge.event for charge in cohort.charges]
        assert epsilon(events, DELTA) <= 1.7 < epsilon([*events, Steps(SIGMA, 1.0, 1)], DELTA)
    assert set(seen.divisors) == {20.0}  # q times the declared size, whoever is there


def test_the_twin_that_lets_the_spent_stay_is_caught(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dataset, "exclude_units", lambda self, out: self)
    study = lay_out(tmp_path, tiny_base, patients(12), TWO)
    with watched(tmp_path) as seen:
        run(study, 3)
    assert under_charged(tmp_path, seen, named(0)) == ["patient-0"]


def test_the_plans_own_lifetime_ends_it_where_the_policy_allows_more(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12), "max_epsilon = 8.0")
    with watched(tmp_path) as seen:
        run(study, LIFE + 1)
    assert [len(units) for units in seen.rounds] == [12] * LIFE + [0]


def test_another_dataset_of_the_site_ends_nobodys_study_but_keeps_its_own_ceiling(
    tmp_path: Path, tiny_base: Path
) -> None:
    """All rounds count against it, more than one patient's life; the policy's ceilings hold."""
    study = lay_out(tmp_path, tiny_base, patients(12), "max_epsilon = 3.5")
    book = Ledger(tmp_path / "state-north")
    book.declare("held-out", [])
    with watched(tmp_path) as seen:
        run(study, LIFE + 2, growing(tmp_path, {LIFE: patients(14)}))
    assert [len(units) for units in seen.rounds] == [12] * LIFE + [2] * 2
    with pytest.raises(Refused, match=r"policy\.max_epsilon"):
        run(study, LIFE + 3)
    charges = Ledger(tmp_path / "state-north").charges("held-out")
    spent = [epsilon([Steps(SIGMA, 1.0, steps)], DELTA) for steps in (len(charges), LIFE + 3)]
    assert len(charges) == LIFE + 2 and 3.0 < spent[0] <= 3.5 < spent[1]


def test_the_wire_looks_the_same_whoever_is_left(tmp_path: Path, tiny_base: Path) -> None:
    usual = run(lay_out(tmp_path / "usual", tiny_base, patients(12)), 3)
    assert outside(usual) == []
    worlds: dict[str, tuple[str, dict[int, list[Row]]]] = {
        "spent": (TWO, {}),
        "one arrives": ("", {1: patients(13)}),
        "many arrive": ("", {1: patients(40), 2: patients(60)}),
        "spent, and some arrive": (TWO, {2: patients(15)}),
        "everybody leaves": ("", {1: []}),
    }
    for name, (policy, by) in worlds.items():
        folder = tmp_path / name.replace(" ", "-")
        study = lay_out(folder, tiny_base, patients(12), policy or "max_epsilon = 3.0")
        assert shape(run(study, 3, growing(folder, by))) == shape(usual), name


def test_the_twin_that_refuses_for_the_spent_is_caught(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that says no when its first patients are out tells when they came."""
    honest = Ledger.reserve_for

    def reserve_for(self: Ledger, *given: Any, **permits: Any) -> Any:
        number, out = honest(self, *given, **permits)
        if out:
            raise Refused("policy.max_epsilon")
        return number, out

    monkeypatch.setattr(Ledger, "reserve_for", reserve_for)
    usual = run(lay_out(tmp_path / "usual", tiny_base, patients(12)), 3)
    study = lay_out(tmp_path / "spent", tiny_base, patients(12), TWO)
    with pytest.raises(Refused):
        assert shape(run(study, 3)) == shape(usual)


def test_who_arrived_when_is_told_by_keys_and_not_by_records(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Or two patients with one boilerplate note would decide about each other. That a person keeps
    one key is up to the site, and `fedtune doctor` shows newcomers with old texts."""
    study = lay_out(tmp_path, tiny_base, patients(12), TWO)
    renamed = [{**row, "who": f"again-{row['who']}"} for row in patients(12)]
    with watched(tmp_path) as seen:
        run(study, 3, growing(tmp_path, {2: renamed}))
    assert [len(units) for units in seen.rounds] == [12, 12, 12]
    arrival = Ledger(tmp_path / "state-north").arrival("records")
    assert arrival(unit_member("again-patient-1")) > arrival(unit_member("patient-1")) > 0


def test_more_records_are_no_new_patient_and_who_comes_back_is_known(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))
    by = {1: patients(6), 2: patients(12, records=3)}
    with watched(tmp_path) as seen:
        run(study, 3, growing(tmp_path, by))
    assert [len(units) for units in seen.rounds] == [12, 6, 12]
    (cohort,) = Ledger(tmp_path / "state-north").cohorts("records")
    assert cohort.units == 12 and paid(tmp_path, "patient-11") == 3 > seen.times("patient-11")


def test_where_nobody_could_take_part_the_plan_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12), "max_epsilon = 0.2")
    with pytest.raises(Refused, match=r"policy\.max_epsilon"):
        run(study, 1)
    assert Ledger(tmp_path / "state-north").spending() == []


def test_it_goes_on_after_a_restart_and_a_round_that_was_sent_is_not_paid_again(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))
    run(study, 2)
    run(study, 3, growing(tmp_path, {}))
    kept = load(tmp_path / "run", _study(study))
    assert kept is not None and [entry["slot"] for entry in kept.history] == sorted(
        {entry["slot"] for entry in kept.history}
    )
    charged = Counter(s.charge.round for s in Ledger(tmp_path / "state-north").spending())
    assert charged == {1: 1, 2: 1, 3: 1}


def _study(path: Path) -> Any:
    from fedtune.core.config import load_study

    return load_study(path)
