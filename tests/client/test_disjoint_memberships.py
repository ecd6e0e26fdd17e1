"""Two memberships of one hospital train on datasets that are declared disjoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import load_site
from fedtune.core.data.records import unit_member
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault import worker as module
from fedtune.core.vault.prepared import Unprepared
from fedtune.core.vault.worker import SiteWorker
from fedtune.public.start import Start
from tests.client.hospital_kit import make_apart, study_of
from tests.client.site_kit import trains
from tests.expected import raises_nothing

pytestmark = pytest.mark.usefixtures("without_self_test")
BOTH = unit_member("p-both")


def begin(files: dict[str, Path], base: Path) -> tuple[dict[str, SiteWorker], dict[str, Start]]:
    """Have a vault of each membership admit a study of its own."""
    vaults = {name: SiteWorker(load_site(path), path) for name, path in files.items()}
    made = {name: study_of(name, base, epsilon=3.0) for name in files}
    for name, vault in vaults.items():
        admission = vault.prepare(made[name].study, made[name].frozen, "c" * 64)
        assert admission.admitted, admission.reason
    return vaults, made


def kept_by(vaults: dict[str, SiteWorker]) -> list[str]:
    """List the memberships that train on the patient who is in both files."""
    cached = {name: next(iter(vault._cached.values()))[1] for name, vault in vaults.items()}
    return [name for name, data in cached.items() if BOTH in data.dataset.keys]


def test_a_correction_of_what_is_disjoint_counts_for_whoever_runs(
    tmp_path: Path, tiny_base: Path
) -> None:
    """cardio's vault, which declared it, goes on or has ended; onco's asks for the next round."""
    home = tmp_path / "home"
    files = make_apart(home)
    vaults, made = begin(files, tiny_base)
    trains(vaults["cardio"], made["cardio"], 1)
    trains(vaults["onco"], made["onco"], 1)
    ledger = Ledger(home)
    assert ledger.disjoint == [("clinic", "records")] and len(ledger.charges("clinic")) == 1
    hospital = home / "hospital.toml"
    hospital.write_text(hospital.read_text().replace('disjoint_from = ["clinic"]\n', ""))
    with raises_nothing():
        trains(vaults["onco"], made["onco"], 2)
    assert not ledger.disjoint and len(ledger.charges("clinic")) == 3
    with raises_nothing():
        trains(vaults["cardio"], made["cardio"], 2)
    assert not ledger.disjoint and len(ledger.charges("records")) == 4
    entries = ledger.head.seq
    for vault, start in zip(vaults.values(), made.values(), strict=True):
        assert vault.prepare(start.study, start.frozen, "c" * 64).admitted
    assert ledger.head.seq == entries, "the two do not declare in turns"


def test_a_dataset_that_is_registered_no_more_is_apart_from_none(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Its last declaration stays in the ledger, and its charges would count against no other."""
    home = tmp_path / "home"
    files = make_apart(home)
    vaults, made = begin(files, tiny_base)
    for name, vault in vaults.items():
        trains(vault, made[name], 1)
    ledger = Ledger(home)
    assert len(ledger.charges("records")) == len(ledger.charges("clinic")) == 1
    before, _, rest = (home / "hospital.toml").read_text().partition("[datasets.records]")
    (home / "hospital.toml").write_text(before + rest[rest.index("\n[") :])
    with raises_nothing():
        trains(vaults["onco"], made["onco"], 2)
    assert not ledger.disjoint and len(ledger.charges("clinic")) == 3


def test_who_is_in_two_datasets_that_become_disjoint_is_in_neither(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Also of a vault that read its files before, and goes on."""
    home = tmp_path / "home"
    files, hospital = make_apart(home), home / "hospital.toml"
    apart = hospital.read_text()
    hospital.write_text(apart.replace('disjoint_from = ["clinic"]\n', ""))
    vaults, made = begin(files, tiny_base)
    for name, vault in vaults.items():
        trains(vault, made[name], 1)
    assert kept_by(vaults) == ["cardio", "onco"]
    hospital.write_text(apart)
    for name, vault in vaults.items():
        trains(vault, made[name], 2)
    assert not kept_by(vaults)


def test_of_two_vaults_that_read_at_once_one_keeps_a_patient_of_both(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onco reads, charges and answers a whole round between the moment in which cardio has read its
    files and that in which it enters the patients' keys."""
    vaults, made = begin(make_apart(tmp_path / "home"), tiny_base)
    keep_counts = module.keep_counts

    def meanwhile(*given: Any) -> None:
        monkeypatch.setattr(module, "keep_counts", keep_counts)
        keep_counts(*given)
        trains(vaults["onco"], made["onco"], 1)

    monkeypatch.setattr(module, "keep_counts", meanwhile)
    trains(vaults["cardio"], made["cardio"], 1)
    ledger = Ledger(tmp_path / "home")
    assert kept_by(vaults) == ["onco"]
    assert [name for name in ("records", "clinic") if ledger.holds(name, BOTH)] == ["clinic"]
    assert ledger.overlap("records", "clinic"), "texts that both have are still remembered"


def test_a_stale_declaration_permits_no_round_of_another_vault(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cardio's vault has read that the two are disjoint; a person takes that back, and onco's
    declares it; cardio's declares what it had read, before onco's is charged."""
    home = tmp_path / "home"
    files, hospital = make_apart(home), home / "hospital.toml"
    vaults, made = begin(files, tiny_base)
    declare, keep_counts = SiteWorker.declare, module.keep_counts
    read = list[Any]()  # what cardio's vault is about to declare
    said = list[str]()  # to onco's coordinator

    def late(vault: SiteWorker, *given: Any) -> None:
        if vault is vaults["cardio"] and not read:
            read.extend(given)
            hospital.write_text(hospital.read_text().replace('disjoint_from = ["clinic"]\n', ""))
            with pytest.raises(Unprepared) as refused:
                trains(vaults["onco"], made["onco"], 1)
            said.append(str(refused.value))
        declare(vault, *given)

    def between(*given: Any) -> None:
        declare(vaults["cardio"], *read)
        keep_counts(*given)

    monkeypatch.setattr(SiteWorker, "declare", late)
    monkeypatch.setattr(module, "keep_counts", between)
    trains(vaults["cardio"], made["cardio"], 1)
    ledger = Ledger(home)
    assert [charge.membership for charge in ledger.charges("records")] == ["cardio"]
    start, restarted = made["onco"], SiteWorker(load_site(files["onco"]), files["onco"])
    with pytest.raises(Unprepared) as refused:
        trains(restarted, start, 1)
    assert said == [str(refused.value)], "onco's coordinator learns that there is another"
    assert vaults["onco"].prepare(start.study, start.frozen, "c" * 64).admitted
    trains(vaults["onco"], start, 1)
    assert not ledger.disjoint and len(ledger.charges("records")) == 2
