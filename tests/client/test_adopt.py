"""A site with a ledger of its own becomes a hospital's membership: nothing that was paid is lost,
wherever it is killed, and nobody who withdrew comes back."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import load_site
from fedtune.core.config.load import load_hospital
from fedtune.core.config.patient_columns import shorten_column
from fedtune.core.data.records import unit_member
from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import (
    ConfigError,
    FedtuneError,
    InfrastructureError,
    InputError,
    PolicyRefused,
    Refused,
)
from fedtune.core.ledger import audit_log, chain
from fedtune.core.ledger.adopted import ADOPTED
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.entries import EVERY, RULES, Charge
from fedtune.core.ledger.files import KEY, LedgerError, traces
from fedtune.core.ledger.ledger import Ledger, signing_key
from fedtune.core.ledger.spending import budget, share_of
from fedtune.core.processes import alone
from fedtune.core.vault import airlock, noted
from fedtune.core.vault.declared import declare
from fedtune.core.vault.prepared import Void
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire import seal
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import receipt
from fedtune.derive import label
from fedtune.homes.known_homes import path_of_notes
from fedtune.homes.opening import open_paying_ledger
from fedtune.officer import adopt as adoption
from fedtune.officer.adopt import Adoption, _keep_state, _take_away, adopt
from fedtune.officer.before_joining import check_before_joining
from fedtune.officer.closed_ledger import Closed
from fedtune.officer.doctor import examine
from fedtune.officer.freeze import freeze, lift, read_decisions
from fedtune.officer.leave import DISTRUST, check_trusted
from fedtune.officer.purge import listing
from fedtune.officer.withdraw import check_receipt, withdraw
from fedtune.server.store import Receipts
from tests.cli_kit import run
from tests.client.adoption_kit import (
    CHARGE,
    DELTA,
    exact_epsilon,
    hashes_of,
    kill_at,
    make_site,
    spend,
    write_notes,
)

PATIENTS = [f"p{n}" for n in range(12)]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two sites of the same notes, each with a ledger of its own and a patient who withdrew."""
    folder = tmp_path / "hospital"
    folder.mkdir()
    write_notes(folder / "notes.jsonl", PATIENTS)
    spend(make_site(folder, "cardio"), 3, withdrawn=["p3"])
    spend(make_site(folder, "onco"), 5, withdrawn=["p5"])
    return folder


def adopt_first(folder: Path) -> Adoption:
    return adopt(folder / "home", folder / "cardio.toml", "cardio")


def adopt_second(folder: Path) -> Adoption:
    return adopt(folder / "home", folder / "onco.toml", "onco")


def adopt_first_with_declared(folder: Path) -> None:
    """Adopt the first site, which once declared the dataset "tried" to be generated."""
    write_notes(folder / "tried.jsonl", ["q1", "q2"])
    more = 'declared = "generated"'
    declare(load_site(make_site(folder, "cardio", path="tried.jsonl", dataset="tried", more=more)))
    make_site(folder, "cardio")
    adopt_first(folder)


def charges(folder: Path) -> list[Charge]:
    return Ledger(folder / "home").charges("records")


def test_the_first_sites_ledger_becomes_the_hospitals(world: Path) -> None:
    before = Ledger(world / "cardio-state")
    head, public, hashed = before.head, before.key.public, before.withdrawn()
    made = adopt_first(world)
    book, site = Ledger(world / "home"), load_site(world / "cardio.toml")
    book.verify()
    assert (book.head, book.key.public) == (head, public) and book.withdrawn() == hashed
    assert site.home == world / "home" and site.policy.hospital and site.policy.hospital.earlier
    assert signing_key(site, book).public == public  # its coordinator knows it by this key
    assert traces(world / "cardio-state") == [KEY]
    acts = audit_log.verify(world / "home", public).entries
    assert [act["event"] for act in acts] == ["enroll", "withdraw", "adopt"]
    (receipt,) = (world / "home" / "withdrawals").glob("*.json")
    assert check_receipt(receipt, book)
    assert made.copy and Ledger(made.copy).head == head
    assert made.copy.stat().st_mode & 0o777 == 0o700
    assert "# a person's comment" in (world / "cardio.toml").read_text()
    assert made.site_copy and "[hospital]" not in made.site_copy.read_text()
    hospital = load_hospital(world / "home")
    assert hospital.policy.max_epsilon == 8.0 and [*hospital.datasets] == ["records"]
    share = share_of("records", book.cohorts("records"), site.policy)
    assert share.epsilon >= exact_epsilon(book.charges("records"), 2 * DELTA) > 0


def test_what_a_later_site_spent_is_in_the_total_of_an_independent_accountant(world: Path) -> None:
    spent = Ledger(world / "onco-state").charges("records")
    adopt_first(world)
    assert adopt_second(world).charges == len(spent) == 5
    book = Ledger(world / "home")
    book.verify()
    paid = book.charges("records")
    assert [c.membership for c in paid] == [""] * 3 + ["onco"] * 5
    assert [replace(c, membership="", adopted=False, patient="") for c in paid[3:]] == spent
    assert {c.patient for c in paid[3:]} == {"who"}  # of onco.toml, since its ledger names none
    policy = load_site(world / "onco.toml").policy
    total = budget("records", book.spending("records"), policy)
    every = exact_epsilon(paid, 2 * DELTA)
    assert total.epsilon >= every > exact_epsilon(paid[:3], 2 * DELTA)
    own = share_of("records", book.cohorts("records"), policy)
    assert every > own.epsilon >= exact_epsilon(spent, 2 * DELTA)
    shown = run("ledger", world / "onco.toml", "--json")
    assert json.loads(shown.stdout)["budget"]["epsilon"] == total.epsilon


def test_a_charge_that_is_not_carried_is_seen(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the total is below what an independent accountant gives."""
    spent = Ledger(world / "onco-state").charges("records")
    listed = Closed.list_earlier
    monkeypatch.setattr(Closed, "list_earlier", lambda *arguments: listed(*arguments)[:1])
    adopt_first(world)
    adopt_second(world)
    book = Ledger(world / "home")
    total = budget("records", book.spending("records"), load_site(world / "onco.toml").policy)
    assert total.epsilon < exact_epsilon(charges(world)[:3] + spent, 2 * DELTA)


def test_the_hospitals_ledger_restores_what_was_adopted(world: Path) -> None:
    """Its step log holds the later site's steps: a restore from a backup of before charges them."""
    adopt_first(world)
    Ledger(world / "home").backup(world / "backup")
    adopt_second(world)
    before = exact_epsilon(charges(world), 2 * DELTA)
    (world / "home" / "ledger.db").unlink()
    restored = Ledger.restore(world / "home", world / "backup")
    assert exact_epsilon(restored.charges("records"), 2 * DELTA) >= before


def test_unknown_stays_unknown_and_what_a_restore_entered_counts_for_newcomers(world: Path) -> None:
    """Among later arrivals may be a patient whose first arrival the restore lost."""
    book = Ledger(world / "onco-state")
    book.reserve("records", replace(CHARGE, study="old", rules=RULES - 1), "a", lambda _: None)
    book.accept("records", "officer")
    book.backup(world / "backup")
    spend(world / "onco.toml", 7)
    (world / "onco-state" / "ledger.db").unlink()
    restored = [
        s for s in Ledger.restore(book.folder, world / "backup").spending() if s.kind == "restore"
    ]
    adopt_first(world)
    with pytest.raises(PolicyRefused, match="a restore of the ledger"):
        adopt_second(world)  # some of its records may once have been declared public
    Ledger(book.folder).accept("records", "officer", declared=[EVERY])
    made = adopt_second(world)
    home = Ledger(world / "home")
    entered = [s.charge for s in home.spending() if s.charge.membership == "onco"]
    assert len(entered) == 6 + len(restored) and restored
    assert {s.charge.study for s in home.unknown("records", "patient")} >= {"old"}
    assert made.restored == len(restored)
    lost = [replace(s.charge, membership="onco", adopted=True) for s in restored]
    assert [charge for charge in home.newcomer("records") if charge in lost] == lost
    assert all(charge in [s.charge for s in home.unknown("records", "patient")] for charge in lost)


# ---------------------------------------------------------------------------------- withdrawals


def test_who_withdrew_from_either_stays_out_under_one_salt(world: Path) -> None:
    adopt_first(world)
    made = adopt_second(world)
    book = Ledger(world / "home")
    assert set(book.withdrawn()) == hashes_of(book, ["p3", "p5"])
    (receipt,) = made.receipts
    told = json.loads(receipt.read_text())
    assert check_receipt(receipt, book) and told["unit"] == book.hashed(unit_member("p5"))
    assert [release["rounds"] for release in told["releases"]] == [3, 5]


def test_a_new_receipt_lists_nothing_that_was_charged_after_the_withdrawal(world: Path) -> None:
    """Not of the adopted ledger, whose charges all get their entries at the adoption, and not of
    one that is adopted after it; also where the adoption is begun again after more rounds."""
    spend(world / "onco.toml", 7)
    spend(make_site(world, "lab"), 2, withdrawn=["p3", "p5"])
    adopt_first(world)
    with pytest.MonkeyPatch.context() as killed:
        killed.setattr(adoption, "withdraw", lambda *given, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adopt_second(world)
    spend(world / "onco.toml", 9, withdrawn=["p7"])
    receipts = {json.loads(path.read_text())["unit"]: path for path in adopt_second(world).receipts}
    book = Ledger(world / "home")
    rounds = {}
    for patient in ("p5", "p7"):
        path = receipts[book.hashed(unit_member(patient))]
        rounds[patient] = [
            release["rounds"] for release in json.loads(path.read_text())["releases"]
        ]
        assert check_receipt(path, book)
    assert rounds == {"p5": [3, 5], "p7": [3, 5, 7, 9]}
    given = {path: path.read_bytes() for path in (world / "home" / "withdrawals").iterdir()}
    assert len(given) == 3
    adopt(world / "home", world / "lab.toml", "lab")
    assert {path: path.read_bytes() for path in given} == given


def test_a_receipt_lists_what_a_restore_charged_whenever_the_patient_withdrew(world: Path) -> None:
    """The folder was put back to before a withdrawal, trained with the patient, and was restored
    from a copy that knows of the withdrawal: in it, the rounds come after the withdrawal."""
    file, state = make_site(world, "lab"), world / "lab-state"
    spend(file, 1)
    shutil.copytree(state, world / "before")
    spend(file, 5, withdrawn=["p7"])
    for key in ("a", "b", "c"):
        Ledger(state).withdraw(unit_member(key))
    shutil.copytree(state, world / "newer")
    shutil.rmtree(state)
    shutil.copytree(world / "before", state)
    spend(file, 4)
    book = Ledger.restore(state, world / "newer")
    again = withdraw(load_site(file), "p7", book)
    assert sorted(one["rounds"] for one in again.receipt["releases"]) == [1, 4, 5]
    adopt_first(world)
    book.accept("records", "officer", declared=[EVERY])
    adoption_ = adopt(world / "home", file, "lab", ["a", "b", "c"])
    receipts = [json.loads(path.read_text()) for path in adoption_.receipts]
    hospital = Ledger(world / "home")
    (ours,) = [one for one in receipts if one["unit"] == hospital.hashed(unit_member("p7"))]
    assert sorted(one["rounds"] for one in ours["releases"]) == [1, 3, 4, 5]


def test_a_like_charge_of_another_branch_is_no_charge_that_was_entered(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adopted site's folder and site file were put back to before its adoption, and the same
    one-round study ran again, with other noise. Adopted again, it has paid twice."""
    file, state = make_site(world, "lab"), world / "lab-state"
    adopt_first(world)
    text = file.read_text()
    spend(file, 2)
    shutil.copytree(state, world / "before")
    spend(file, 1)
    adopt(world / "home", file, "lab")
    shutil.rmtree(state)
    shutil.copytree(world / "before", state)
    file.write_text(text)
    later = time.time() + 60
    monkeypatch.setattr(chain.time, "time", lambda: later)
    spend(file, 1)
    with pytest.raises(LedgerError, match="has paid for other rounds here"):
        adopt(world / "home", file, "lab")


def test_a_withdrawal_without_a_record_is_refused_until_its_key_is_given(world: Path) -> None:
    adopt_first(world)
    write_notes(world / "notes.jsonl", [p for p in PATIENTS if p != "p5"])
    with pytest.raises(InputError, match=r"1 patients withdrew .* --withdrawn FILE"):
        adopt_second(world)
    assert load_site(world / "onco.toml").home == world / "onco-state"
    (world / "keys").write_text("p5\n")
    said = run("memberships", world / "home", "--adopt", world / "onco.toml",
               "--name", "onco", "--withdrawn", world / "keys")  # fmt: skip
    assert said.exit_code == 0, said.output
    book = Ledger(world / "home")
    assert set(book.withdrawn()) == hashes_of(book, ["p3", "p5"])
    assert set(book.withdrawn_by.values()) == {frozenset({"who"})}


def _restore_without(state: Path, *names: str) -> None:
    for name in names:
        (state / name).unlink()
    Ledger.restore(state, None, partial(read_decisions, state))


def test_a_site_that_lost_its_salt_is_adopted_with_those_withdrawn_again(world: Path) -> None:
    """No key matches what they are known by from before, and a receipt of then says so."""
    file, state = world / "onco.toml", world / "onco-state"
    (receipt,) = (state / "withdrawals").iterdir()
    assert "SALT" not in run("withdraw", file, "--check", receipt).output
    _restore_without(state, "ledger.db", "salt")
    said = run("withdraw", file, "--check", receipt)
    assert said.exit_code == 0 and "BY ANOTHER SALT: the ledger was restored" in said.output
    withdraw(load_site(file), "p5", Ledger(state))
    lift(load_site(file), "p5 is withdrawn again")
    Ledger(state).accept("records", "officer", declared=[EVERY])
    adopt_first(world)
    assert adopt_second(world).unrecognised == 1
    book = Ledger(world / "home")
    assert set(book.withdrawn()) == hashes_of(book, ["p3", "p5"])


def test_who_withdrew_before_a_restore_that_kept_the_salt_is_asked_for(world: Path) -> None:
    state = world / "onco-state"
    Ledger(state).backup(world / "backup")
    withdraw(load_site(world / "onco.toml"), "p6", Ledger(state))
    (state / "ledger.db").unlink()
    Ledger.restore(state, world / "backup", partial(read_decisions, state)).accept(
        "records", "officer", declared=[EVERY]
    )
    adopt_first(world)
    write_notes(world / "notes.jsonl", [p for p in PATIENTS if p not in ("p5", "p6")])
    with pytest.raises(InputError, match="2 patients withdrew"):
        adopt_second(world)


@pytest.mark.parametrize("left", [PATIENTS, PATIENTS[:-1]], ids=["all", "one is gone"])
def test_what_a_later_site_paid_counts_alike_whoever_is_in_its_files(
    world: Path, left: list[str]
) -> None:
    """Against every dataset, and for a newcomer too: among them may be one who left the files.
    Were it so only where somebody did, a refused plan would tell this."""
    write_notes(world / "notes.jsonl", left)
    adopt_first(world)
    made = adopt_second(world)
    assert made.charged == {"records": "onco/records"}
    book = Ledger(world / "home")
    assert len(book.charges("records")) == 8
    assert [c.membership for c in book.newcomer("records")] == ["onco"] * 5
    receipt = json.loads(made.receipts[0].read_text())
    assert [release["rounds"] for release in receipt["releases"]] == [3, 5]


# --------------------------------------------------------------------------------- several datasets


def test_one_place_gets_one_name_and_another_place_a_name_of_its_own(world: Path) -> None:
    adopt_first(world)
    make_site(world, "lab", dataset="letters")
    spend(world / "lab.toml", 2)
    assert adopt(world / "home", world / "lab.toml", "lab").datasets == {"letters": "records"}
    assert load_site(world / "lab.toml").data.name == "records"
    write_notes(world / "scans.jsonl", ["s1", "s2"])
    make_site(world, "scan", path="scans.jsonl")
    spend(world / "scan.toml", 2)
    made = adopt(world / "home", world / "scan.toml", "scan")
    assert made.datasets == {"records": "scan-records"}
    assert load_site(world / "scan.toml").data.name == "scan-records"
    assert len(charges(world)) == 3 + 2 + 2  # nobody declared that they share no patient


def test_what_a_later_site_paid_counts_against_disjoint_datasets_too(world: Path) -> None:
    """A patient in both datasets counted for one at the first site, perhaps for the other at the
    second, as neither ledger knew the other."""
    home = world / "home"
    adopt_first(world)
    write_notes(world / "scans.jsonl", ["s1", "s2"])
    with (home / "hospital.toml").open("a") as file:
        path = json.dumps(str(world / "scans.jsonl"))
        file.write(f'[datasets.scans]\npath = {path}\npatient = "who"\n')
        file.write('disjoint_from = ["records"]\n')
    make_site(world, "scan", path="scans.jsonl", dataset="scans")
    spend(world / "scan.toml", 2)
    made = adopt(home, world / "scan.toml", "scan")
    assert made.charged == {"scans": "scan/scans"}
    assert len(charges(world)) == 3 + 2


# ------------------------------------------------------------------------------------------ kills


def _check_whole(folder: Path, name: str, least: list[Charge]) -> None:
    """The site's own ledger is whole, or the hospital's is and holds all charges."""
    site = load_site(folder / f"{name}.toml", alone=True)
    if site.hospital is None:
        Ledger(site.site.state).verify()
        return
    home = Ledger(folder / "home")
    home.verify()
    paid = [
        replace(charge, membership="", adopted=False, patient="")
        for charge in home.charges("records")
    ]
    assert all(charge in paid for charge in least)


@pytest.mark.parametrize("which", ["first", "later"])
def test_killed_anywhere_it_is_finished_by_running_it_again(world: Path, which: str) -> None:
    act: Callable[[Path], Adoption] = adopt_first
    name = "cardio"
    if which == "later":
        adopt_first(world)
        act, name = adopt_second, "onco"
    least = Ledger(world / f"{name}-state").charges("records")
    template = world.with_name("template")
    world.rename(template)
    clean = None
    for step in range(0, 1000, 6):
        shutil.copytree(template, world)
        ended = kill_at(step, lambda: act(world))
        _check_whole(world, name, least)
        act(world) if not ended else None
        paid = [(c.study, c.round, c.membership) for c in charges(world)]
        withdrawn = len(Ledger(world / "home").withdrawn())
        clean = clean or (len(least) + (3 if which == "later" else 0), withdrawn)
        assert (len(paid), withdrawn) == clean and len(set(paid)) == len(paid)
        assert traces(world / f"{name}-state") == [KEY]
        shutil.rmtree(world)
        if ended:
            break
    assert step > 40  # each change to a file system was a place to be killed at


def test_a_ledger_that_goes_before_the_site_file_changes_is_seen(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: killed between the two, the site has no ledger at all."""
    template = world.with_name("template")
    world.rename(template)
    state = world / "cardio-state"
    monkeypatch.setattr("fedtune.officer.adopt._enter_act", lambda *_, **__: _take_away(state))
    found = False
    for step in range(0, 200, 2):
        shutil.copytree(template, world)
        ended = kill_at(step, lambda: adopt_first(world))
        try:
            _check_whole(world, "cardio", [])
        except LedgerError:
            found = True
        shutil.rmtree(world)
        if found or ended:
            break
    assert found


def test_a_site_that_went_on_after_a_kill_is_not_half_a_ledger(world: Path) -> None:
    """The first site: how to go back is said. A later one: what it spent since is entered too."""
    step = next(n for n in range(1, 1000) if _killed_with_home(world, n))
    assert step
    spend(world / "cardio.toml", 2)
    with pytest.raises(ConfigError, match=r"went on since.*delete"):
        adopt_first(world)
    shutil.rmtree(world / "home")
    adopt_first(world)
    assert len(charges(world)) == 5


def _killed_with_home(world: Path, step: int) -> bool:
    kill_at(step, lambda: adopt_first(world))
    assert load_site(world / "cardio.toml", alone=True).hospital is None
    return (world / "home" / "hospital.toml").exists()


def _put_back_after_both_were_adopted(folder: Path) -> None:
    """The first site's folder and site.toml are those of before its adoption; p7 withdrew since."""
    shutil.copytree(folder / "cardio-state", folder / "before")
    text = (folder / "cardio.toml").read_text()
    adopt_first(folder)
    adopt_second(folder)
    withdraw(load_site(folder / "cardio.toml"), "p7", Ledger(folder / "home"))
    shutil.rmtree(folder / "cardio-state")
    (folder / "before").rename(folder / "cardio-state")
    (folder / "cardio.toml").write_text(text)


def test_a_first_site_that_was_put_back_to_before_its_adoption_is_adopted_again(
    world: Path,
) -> None:
    """The hospital's ledger has all that the site's has, and stays with all that it got since."""
    _put_back_after_both_were_adopted(world)
    AuditLog(world / "cardio-state", Ledger(world / "cardio-state").key).add(
        "leave", DISTRUST, consortium="0123 4567", membership="", files=3
    )
    assert adopt_first(world).first
    book = Ledger(world / "home")
    assert len(charges(world)) == 8
    assert {*book.withdrawn()} == hashes_of(book, ["p3", "p5", "p7"])
    assert load_site(world / "cardio.toml").home == world / "home"
    assert traces(world / "cardio-state") == [KEY]
    with pytest.raises(Refused, match="trusted no more"):
        check_trusted(world / "home", "0123 4567")


def test_no_home_is_deleted_that_holds_what_the_site_lacks(world: Path) -> None:
    """The first site was put back and went on: what the error advises loses no charge."""
    _put_back_after_both_were_adopted(world)
    spend(world / "cardio.toml", 2)
    text, home, state = (world / "cardio.toml").read_text(), world / "home", world / "cardio-state"
    with pytest.raises(ConfigError, match=r"--restore --from .*Do not delete the home"):
        adopt_first(world)
    table = f'[hospital]\nhome = "{home}"\nmembership = "cardio"\n'
    (world / "cardio.toml").write_text(text + table)
    with pytest.raises(ConfigError, match="holds now what the hospital's lacks"):
        adopt_first(world)
    done = run("ledger", world / "cardio.toml", "--restore", "--from", state)
    assert done.exit_code == 0, done.output
    (world / "cardio.toml").write_text(text)
    adopt_first(world)
    assert len(charges(world)) == 10
    book = Ledger(home)
    assert {*book.withdrawn()} == hashes_of(book, ["p3", "p5", "p7"])
    assert traces(state) == [KEY]


def test_no_later_sites_ledger_is_taken_away_that_went_on(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second site's adoption was interrupted after its site file named the home. Twin: nothing
    was charged since, and the command completes the adoption."""
    adopt_first(world)
    state, file = world / "onco-state", world / "onco.toml"
    before = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(adoption, "move_notes", _killed)
        with suppress(KeyboardInterrupt):
            adopt_second(world)
    switched = file.read_text()
    assert "[hospital]" in switched and traces(state) != [KEY]
    copy = shutil.copytree(state, world / "onco-copy")
    file.write_text(before)
    spend(file, 2)
    file.write_text(switched)
    with pytest.raises(ConfigError, match="holds now what the hospital's lacks"):
        adopt_second(world)
    assert traces(state) != [KEY]
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    adopt_second(world)
    assert traces(state) == [KEY]


def test_a_later_site_that_was_put_back_is_adopted_again_by_what_the_error_says(
    world: Path,
) -> None:
    """The state folder alone was put back, so that the note of the adoption is gone. It is written
    again, and a coordinator's receipt for the old ledger is still known."""
    adopt_first(world)
    state, file = world / "onco-state", world / "onco.toml"
    before, copy = file.read_text(), shutil.copytree(state, world / "onco-copy")
    adopt_second(world)
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    with pytest.raises(ConfigError, match=r"take the table \[hospital\] out"):
        adopt_second(world)
    paid = len(charges(world))
    file.write_text(before)
    adopt_second(world)
    assert len(charges(world)) == paid
    assert traces(state) == [KEY] and (state / "adopted.json").exists()


def test_an_adoption_that_is_refused_joins_no_step_log(world: Path) -> None:
    """The site was put back to before its adoption and ran other rounds. Lines without a charge
    would make a later restore of the home too cheap."""
    adopt_first(world)
    state, file = world / "onco-state", world / "onco.toml"
    before, copy = file.read_text(), shutil.copytree(state, world / "onco-copy")
    spend(file, 2)
    adopt_second(world)
    log = (world / "home" / "steps.jsonl").read_bytes()
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    file.write_text(before)
    spend(file, 3, sigma=2.0)
    with pytest.raises(LedgerError, match="has paid for other rounds here"):
        adopt_second(world)
    assert (world / "home" / "steps.jsonl").read_bytes() == log


def test_a_home_takes_no_other_site_before_its_first_adoption_is_complete(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adoption, "_switch", _killed)
        with suppress(KeyboardInterrupt):
            adopt_first(world)
    with pytest.raises(ConfigError, match=r"first adoption is complete.*--name cardio"):
        adopt_second(world)
    assert len(charges(world)) == 3 and traces(world / "onco-state") != [KEY]
    adopt_first(world)
    assert adopt_second(world).charges == 5


def test_a_later_site_that_went_on_after_a_kill_pays_for_the_rest(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt_first(world)
    with monkeypatch.context() as patch:
        patch.setattr("fedtune.officer.adopt._enter_act", _killed)
        with suppress(KeyboardInterrupt):
            adopt_second(world)
    assert len(charges(world)) == 8
    spend(world / "onco.toml", 2)
    assert adopt_second(world).charges == 2
    assert len(charges(world)) == 10


def _killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_who_waited_for_the_old_ledger_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A withdrawal that another process would enter in the ledger that is going away."""
    book = Ledger(world / "cardio-state")
    adopt_first(world)
    with pytest.raises(FedtuneError):
        book.withdraw(unit_member("p7"))
    assert traces(world / "cardio-state") == [KEY], "an empty ledger, for which no client joins"
    with pytest.raises(LedgerError, match="missing"):
        Ledger(world / "cardio-state")


def _two_of_one_plan(folder: Path) -> None:
    """Two sites that ran one plan with the same figures, so that their step logs are alike."""
    folder.mkdir()
    write_notes(folder / "notes.jsonl", PATIENTS)
    for name in ("cardio", "onco"):
        spend(make_site(folder, name), 5)
    adopt_first(folder)


def test_two_sites_that_ran_one_plan_have_two_lots_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the second is adopted; the twin joins no line that is there already."""
    for folder in (tmp_path / "whole", tmp_path / "twin"):
        _two_of_one_plan(folder)
        Ledger(folder / "home").backup(folder / "backup")
        with monkeypatch.context() as patch:
            if folder.name == "twin":
                patch.setattr(StepLog, "_named", lambda log, line: line)
            patch.setattr("fedtune.officer.adopt._enter_act", _killed)
            with suppress(KeyboardInterrupt):
                adopt_second(folder)
            patch.undo()
            if folder.name == "twin":
                patch.setattr(StepLog, "_named", lambda log, line: line)
            adopt_second(folder)
        paid = exact_epsilon(charges(folder), 2 * DELTA)
        steps = StepLog(folder / "home" / "steps.jsonl").steps()
        (folder / "home" / "ledger.db").unlink()
        restored = Ledger.restore(folder / "home", folder / "backup").charges("records")
        is_whole = (len(steps), exact_epsilon(restored, 2 * DELTA) >= paid) == (20, True)
        assert is_whole == (folder.name == "whole")


@pytest.mark.parametrize("name", ["cardio", "onco"])
def test_a_refusal_for_good_and_what_was_sent_come_along(world: Path, name: str) -> None:
    """Of a site that was adopted first, and of a later one."""
    path, study = world / f"{name}.toml", "sha256:" + "0f" * 32
    book = Ledger(world / f"{name}-state")
    for round_, sent in ((7, b"refused"), (8, b"sent before")):
        charge = replace(CHARGE, study=study, round=round_)
        book.release(book.reserve("records", charge, "adapter", lambda _: None), sent)
    book.refuse((study, 7, "adapter"), "ada")
    book.let_go((study, 9, "a draw"), "ada")
    adopt_first(world)
    if name == "onco":
        adopt_second(world)
    worker = SiteWorker(load_site(path), path)
    with pytest.raises(Void):
        airlock.check_not_refused(worker.ledger, worker.slot(study, 7, "adapter"))
    airlock.check_not_refused(worker.ledger, worker.slot(study, 8, "adapter"))
    assert worker.ledger.released(*worker.slot(study, 8, "adapter")) == b"sent before"
    assert worker.ledger.is_let_go(worker.slot(study, 9, "a draw")) == (name == "cardio")
    assert worker.slot(study, 10, "adapter") == (study, 10, f"adapter@{name}")
    assert not worker.ledger.is_refused((study, 7, "adapter@lab")), "nobody else's is refused"
    if name == "onco":  # a later site's refusals are in the home's log too, for a restore
        kept = read_decisions(world / "home", worker.ledger.key.public).refused
        assert worker.slot(study, 7, "adapter") in kept


# --------------------------------------------------------------------------------------- refused


def test_a_change_of_the_hospitals_file_meanwhile_is_not_overwritten(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt_first(world)
    file, keep = world / "home" / "hospital.toml", "fedtune.officer.adopt._keep_state"

    def lower(state: Path) -> Path | None:
        file.write_text(file.read_text().replace("max_epsilon = 8.0", "max_epsilon = 2.0", 1))
        return _keep_state(state)

    with monkeypatch.context() as patch:
        patch.setattr(keep, lower)
        with pytest.raises(ConfigError, match="was changed while"):
            adopt_second(world)
    assert load_hospital(world / "home").policy.max_epsilon == 2.0
    assert len(charges(world)) == 3
    assert adopt_second(world).charges == 5
    assert load_hospital(world / "home").policy.max_epsilon == 2.0


@pytest.mark.parametrize("lock", ["flower", "ranks"])
def test_a_ledger_is_not_restored_while_another_membership_may_pay(world: Path, lock: str) -> None:
    adopt_first(world)
    adopt_second(world)
    head = Ledger(world / "home").head
    with alone(world / "cardio-state" / lock, "fedtune client"):
        refused = run("ledger", world / "onco.toml", "--restore")
        assert refused.exit_code == InfrastructureError.exit_code
        assert "another" in refused.output and Ledger(world / "home").head == head
    assert run("ledger", world / "onco.toml", "--restore").exit_code == 0
    alone_site = make_site(world, "lab")
    spend(alone_site, 1)
    with alone(world / "lab-state" / lock, "fedtune client"):
        assert run("ledger", alone_site, "--restore").exit_code == InfrastructureError.exit_code
    assert run("ledger", alone_site, "--restore").exit_code == 0


def test_it_is_refused_while_a_client_runs(world: Path) -> None:
    with (
        alone(world / "cardio-state" / "flower", "fedtune client"),
        pytest.raises(InfrastructureError, match="another fedtune client"),
    ):
        adopt_first(world)
    assert not (world / "home").exists()
    adopt_first(world)
    with (
        alone(world / "cardio-state" / "ranks", "the vault of a client"),
        pytest.raises(InfrastructureError, match="another the vault"),
    ):
        adopt_second(world)  # of any membership: its order would be in the midst


def test_a_ledger_that_was_never_adopted_is_not_taken_away(world: Path) -> None:
    """Somebody wrote the table [hospital] by hand."""
    adopt_first(world)
    hospital = world / "home" / "hospital.toml"
    hospital.write_text(hospital.read_text() + f'[memberships.onco]\nsite = "{world}/onco.toml"\n')
    site = world / "onco.toml"
    site.write_text(site.read_text() + f'[hospital]\nhome = "{world}/home"\nmembership = "onco"\n')
    with pytest.raises(ConfigError, match="never adopted"):
        adopt_second(world)
    assert len(Ledger(world / "onco-state").charges("records")) == 5


def _by_link(path: Path, outside: Path) -> None:
    """Leave a link where a file or a folder was, to where it is now."""
    moved = outside / f"moved-{path.name}"
    path.rename(moved)
    path.symlink_to(moved)


@pytest.mark.parametrize(
    "which", ["audit.jsonl", "salt", "site.key", "withdrawals", "withdrawals/*"]
)
def test_a_ledger_with_a_link_is_not_adopted(world: Path, which: str) -> None:
    """What a link stands for would be in neither the home nor the copy."""
    (path,) = (world / "cardio-state").glob(which)
    _by_link(path, world)
    with pytest.raises(InputError, match="a symbolic link in place of a file of the ledger"):
        adopt_first(world)
    assert path.is_symlink() and path.exists()
    assert not (world / "home").exists() and not list(world.glob("cardio-state*before*"))
    assert len(Ledger(world / "cardio-state").charges("records")) == 3


def test_without_the_check_a_file_behind_a_link_is_lost(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (receipt,) = (world / "cardio-state").glob("withdrawals/*")
    _by_link(receipt, world)
    monkeypatch.setattr("fedtune.officer.adopt._files_of", lambda state: iter(()))
    copy = adopt_first(world).copy
    assert copy is not None
    for folder in (world / "home", world / "cardio-state", copy):
        assert not (folder / "withdrawals" / receipt.name).exists()


def test_consent_that_differs_is_settled_by_a_person_first(world: Path) -> None:
    adopt_first(world)
    site = make_site(world, "lab", more='consent = { column = "agreed" }')
    Ledger(load_site(site).home)
    with pytest.raises(ConfigError, match="consent of 'records'"):
        adopt(world / "home", site, "lab")


def test_a_site_that_reads_keys_otherwise_is_not_adopted(world: Path) -> None:
    adopt_first(world)
    text = (world / "home" / "hospital.toml").read_text()
    other = 'source = "jsonl"\noptions = { encoding = "latin-1" }'
    (world / "onco.toml").write_text(
        (world / "onco.toml").read_text().replace("[data]", "[data]\n" + other)
    )
    with pytest.raises(ConfigError, match="encoding 'iso8859-1' and 'utf-8'"):
        adopt_second(world)
    assert (world / "home" / "hospital.toml").read_text() == text and len(charges(world)) == 3


def test_the_hospitals_column_of_patients_is_the_first_sites(world: Path) -> None:
    adopt_first(world)
    assert load_hospital(world / "home").datasets["records"].patient == "who"
    second = world / "onco.toml"
    text = second.read_text()
    for other in ("", ', patient = "note"'):
        second.write_text(text.replace(', patient = "who"', other))
        with pytest.raises(ConfigError, match="one column of patients"):
            adopt_second(world)
    assert not load_hospital(world / "home").memberships.keys() - {"cardio"}
    second.write_text(text)
    adopt_second(world)


def test_a_second_site_file_of_the_same_ledger_is_the_same_membership(world: Path) -> None:
    """As of another study: its ledger is not missing, to be restored, but the hospital's."""
    other = world / "other.toml"
    other.write_text((world / "cardio.toml").read_text())
    adopt_first(world)
    with pytest.raises(ConfigError, match="use that file"):
        adopt(world / "home", other, "other")
    table = (world / "cardio.toml").read_text().partition("[hospital]")
    other.write_text(other.read_text() + "".join(table[1:]))
    with pytest.raises(ConfigError, match="is not the site file of membership 'cardio'"):
        load_site(other)


def test_a_copy_of_the_homes_ledger_is_not_adopted(world: Path) -> None:
    """Each of its charges would count twice."""
    shutil.copytree(world / "cardio-state", world / "copy")
    text = (world / "cardio.toml").read_text()
    assert "cardio-state" in text
    (world / "copy.toml").write_text(text.replace("cardio-state", "copy"))
    adopt_first(world)
    spent = charges(world)
    said = ""
    try:
        adopt(world / "home", world / "copy.toml", "again")
    except ConfigError as error:
        said = str(error)
    assert "a copy of the ledger that is the hospital's already" in said
    assert "its charges are in the hospital's ledger" in said
    assert charges(world) == spent and traces(world / "copy")
    with pytest.MonkeyPatch.context() as patch:  # the twin
        patch.setattr(adoption, "_check_no_copy", lambda *_: None)
        adopt(world / "home", world / "copy.toml", "again")
    assert len(charges(world)) == 2 * len(spent)


def test_a_copy_that_went_on_is_not_said_to_be_in_the_homes_ledger(world: Path) -> None:
    """What the error advises enters its charges."""
    shutil.copytree(world / "cardio-state", world / "copy")
    file = world / "copy.toml"
    file.write_text((world / "cardio.toml").read_text().replace("cardio-state", "copy"))
    spend(file, 2)
    adopt_first(world)
    for todo in ("lacks charges that it has", "its charges are in the hospital's ledger"):
        with pytest.raises(ConfigError, match=todo):
            adopt(world / "home", file, "again")
        done = run("ledger", world / "cardio.toml", "--restore", "--from", world / "copy")
        assert done.exit_code == 0, done.output
    assert len(charges(world)) == 5


@pytest.mark.parametrize("insists", [True, False])
def test_a_site_that_released_without_noise_is_adopted_only_if_a_person_insists(
    world: Path, monkeypatch: pytest.MonkeyPatch, insists: bool
) -> None:
    """No private study of the hospital is possible afterwards, for what a later site paid counts
    against every dataset. Twin: without the check the adoption ends them without a word."""
    adopt_first(world)
    file = make_site(world, "trial")
    spend(file, 1, sigma=0.0)
    text, spent = (world / "home" / "hospital.toml").read_text(), charges(world)
    refused = run("memberships", world / "home", "--adopt", file, "--name", "trial")
    assert refused.exit_code == 2 and "--anyway" in refused.output
    assert (world / "home" / "hospital.toml").read_text() == text and charges(world) == spent
    assert traces(world / "trial-state") and "[hospital]" not in file.read_text()
    if insists:
        more = ("--anyway",)
    else:
        more = ()
        monkeypatch.setattr(adoption, "_check_budget_remains", lambda *_: None)
    made = run("memberships", world / "home", "--adopt", file, "--name", "trial", *more)
    assert made.exit_code == 0, made.output
    policy = load_site(file).policy
    book = Ledger(world / "home")
    assert math.isinf(budget("records", book.spending("records"), policy).epsilon)


def test_a_name_that_paid_before_is_not_given_again(world: Path) -> None:
    adopt_first(world)
    adopt_second(world)
    assert run("memberships", world / "home", "--end", "onco", "--yes").exit_code == 0
    spend(make_site(world, "other"), 1)
    with pytest.raises(ConfigError, match="has paid from the ledger"):
        adopt(world / "home", world / "other.toml", "onco")


def test_nothing_is_adopted_while_a_ledger_is_frozen(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site's own, be it the first, a later one, or frozen while it is being adopted; or the
    hospital's. What lies there may be evidence, and stays as it is. Twin: after a lift it goes."""
    sites = {name: load_site(world / f"{name}.toml") for name in ("cardio", "onco")}

    def refused(act: Callable[[Path], Adoption], frozen: str, *, by: Path | None = None) -> None:
        there = traces(by or sites[frozen].site.state)
        with pytest.raises(Refused, match="nothing is adopted"):
            act(world)
        assert traces(by or sites[frozen].site.state) == there != [KEY]

    freeze(sites["cardio"], "a leak")
    refused(adopt_first, "cardio")
    assert not (world / "home").exists()
    lift(sites["cardio"], "it was none")
    adopt_first(world)

    with monkeypatch.context() as patch:
        patch.setattr(
            "fedtune.officer.adopt._check_nothing_waits",
            lambda *_: freeze(sites["onco"], "a leak"),
        )
        refused(adopt_second, "onco")
    refused(adopt_second, "onco")
    lift(sites["onco"], "it was none")
    freeze(load_site(world / "cardio.toml"), "a leak")
    refused(adopt_second, "onco", by=world / "home")
    lift(load_site(world / "cardio.toml"), "it was none")
    adopt_second(world)


def test_a_consortium_that_a_later_site_distrusts_is_trusted_no_more(world: Path) -> None:
    """Its own audit log is taken away with its ledger. Twin: one that it only left, and another."""
    book = Ledger(world / "onco-state")
    acts = AuditLog(book.folder, book.key)
    for rule, consortium in ((DISTRUST, "0123 4567"), ("", "89ab cdef")):
        acts.add("leave", rule, consortium=consortium, membership="", files=3)
    adopt_first(world)
    adopt_second(world)
    home = load_site(world / "onco.toml").home
    with pytest.raises(Refused, match="trusted no more"):
        check_trusted(home, "0123 4567")
    check_trusted(home, "89ab cdef")
    audit_log.verify(home, Ledger(home).key.public)


def test_the_log_of_a_ledger_that_was_adopted_does_not_count_as_taken_away(world: Path) -> None:
    """Also where the adoption was killed after the log itself was removed."""
    adopt_first(world)
    adopt_second(world)
    states = [world / f"{name}-state" for name in ("cardio", "onco")]
    assert [audit_log.was_begun(state) for state in states] == [False, False]
    (states[1] / audit_log.LOCK).write_bytes(b"\0")
    adopt_second(world)
    assert not audit_log.was_begun(states[1])
    assert audit_log.was_begun(world / "home")


def test_what_a_later_site_declared_is_accepted_before_it_is_adopted(world: Path) -> None:
    """The home does not recognise such records. None of them is in the site's files: they may come
    later, and a refusal must not follow from a record."""
    write_notes(world / "tried.jsonl", ["q1", "q2"])
    more = 'declared = "generated"'
    declare(load_site(make_site(world, "onco", path="tried.jsonl", dataset="tried", more=more)))
    file = make_site(world, "onco")
    adopt_first(world)
    with pytest.raises(PolicyRefused, match=r"in 'tried'; .*--accept records --accept-declared"):
        adopt_second(world)
    accept = "ledger", file, "--accept", "records", "--accept-declared"
    assert run(*accept, "other", "--reason", "none").exit_code == 2
    said = run(*accept, "tried", "--reason", "they are private")
    assert said.exit_code == 0 and "private ones of records: those of tried" in said.output
    assert run(*accept, "tried", "--reason", "they are private").exit_code == 2
    adopt_second(world)


@pytest.mark.parametrize("has_study", [True, False])
def test_what_the_home_declared_is_accepted_before_a_site_with_a_study_is_adopted(
    world: Path, has_study: bool
) -> None:
    """A client joins while a study is under way, whatever its records are; else it asks first."""
    adopt_first_with_declared(world)
    begun = world / "onco-state" / "studies" / f"{'05' * 32}.json"
    begun.parent.mkdir()
    if has_study:
        begun.write_text(json.dumps({"plan": f"sha256:{'05' * 32}", "study": "winter"}))
        with pytest.raises(PolicyRefused, match=r"in 'tried', and a study .*: winter\. .*--accept"):
            adopt_second(world)
        assert len(charges(world)) == 3
        accept = "--accept", "records", "--accept-declared", "tried", "--reason", "private"
        said = run("ledger", world / "cardio.toml", *accept)
        assert said.exit_code == 0, said.output
    adopt_second(world)


def test_what_the_home_declared_is_accepted_for_a_dataset_that_only_the_site_has(
    world: Path,
) -> None:
    adopt_first_with_declared(world)
    write_notes(world / "scans.jsonl", ["s1", "s2"])
    spend(make_site(world, "scan", path="scans.jsonl", dataset="scans"), 2)
    (world / "scan-state" / "studies").mkdir()
    (world / "scan-state" / "studies" / "02.json").write_text("{}")
    with pytest.raises(PolicyRefused, match="--accept scans --accept-declared tried"):
        adopt(world / "home", world / "scan.toml", "scan")
    accept = "--accept", "scans", "--accept-declared", "tried", "--reason", "private"
    assert run("ledger", world / "cardio.toml", *accept).exit_code == 0
    adopt(world / "home", world / "scan.toml", "scan")


# ------------------------------------------------------------------- receipts given before


def receive(file: Path, receipt: dict[str, Any], coordinator: SigningKey) -> None:
    """Take an order's receipt as the site does before each order."""
    noted.accept(SiteWorker(load_site(file), file), json.dumps(receipt), coordinator.public)


def is_taken(file: Path, receipt: dict[str, Any], coordinator: SigningKey) -> bool:
    with suppress(LedgerError):
        receive(file, receipt, coordinator)
        return True
    return False


def give_receipt(file: Path, coordinator: SigningKey, kept: Receipts) -> str:
    """Sign what the site's answer stated, as a coordinator does, and store it by the site's key."""
    worker = SiteWorker(load_site(file), file)
    statement = worker.home.head_statement(noted.acts(worker).head, worker.site.policy.membership)
    public = signing_key(worker.site, worker.home).public
    kept.keep({public: seal.receipt(coordinator, statement)})
    return public


@pytest.mark.parametrize("restored", [False, True])
def test_a_receipt_from_before_an_adoption_is_one_of_the_adopted_ledger(
    world: Path, restored: bool
) -> None:
    """The coordinator's next study sends it with every order, also one for an entry that a restore
    had charged for. The answer then has a receipt of the hospital's ledger."""
    coordinator, kept = SigningKey(), Receipts(world / "receipts.json")
    files = {name: world / f"{name}.toml" for name in ("cardio", "onco")}
    if restored:
        Ledger(world / "onco-state").backup(world / "backup")
        spend(files["onco"], 7)
    keys = {name: give_receipt(file, coordinator, kept) for name, file in files.items()}
    if restored:
        (world / "onco-state" / "ledger.db").unlink()
        Ledger.restore(world / "onco-state", world / "backup").accept(
            "records", "officer", declared=[EVERY]
        )
    adopt_first(world)
    adopt_second(world)
    book = Ledger(world / "home")
    for name, file in files.items():
        before, acts = book.head, len(audit_log.verify(world / "home", book.key.public).entries)
        assert is_taken(file, kept.read()[keys[name]], coordinator)
        assert book.head == before
        assert len(audit_log.verify(world / "home", book.key.public).entries) == acts
        assert give_receipt(file, coordinator, kept) == keys[name]  # it answers
        assert is_taken(file, kept.read()[keys[name]], coordinator)
    with pytest.raises(LedgerError, match="not one for this site's ledger"):
        receive(files["onco"], kept.read()[keys["onco"]], SigningKey())


def test_an_adopted_ledgers_receipt_is_refused_where_the_home_lost_the_adoption(
    world: Path,
) -> None:
    """Its files were put back to a copy from before; hospital.toml names the membership still."""
    coordinator, kept, file = SigningKey(), Receipts(world / "receipts.json"), world / "onco.toml"
    public = give_receipt(file, coordinator, kept)
    adopt_first(world)
    shutil.copytree(world / "home", world / "before")
    adopt_second(world)
    for path in (world / "before").glob("ledger.*"):
        shutil.copy(path, world / "home")
    with pytest.raises(LedgerError, match=r"before it adopted the ledger.* without one, "):
        receive(file, kept.read()[public], coordinator)


@pytest.mark.parametrize("later", [1, 0], ids=["gap", "named"])
def test_a_restored_home_that_lost_an_adoption_goes_on_no_more(world: Path, later: int) -> None:
    """It was put back to before the adoption. Another coordinator's receipt led to a restore, which
    charges for the lost entries: for the adoption as one of many, or by its hash. Then whoever had
    withdrawn at the adopted site is in no ledger."""
    coordinator, kept, file = SigningKey(), Receipts(world / "receipts.json"), world / "onco.toml"
    if later:  # whoever withdrew is known to the home all the same
        withdraw(load_site(world / "cardio.toml"), "p5", Ledger(world / "cardio-state"))
    public = give_receipt(file, coordinator, kept)
    adopt_first(world)
    shutil.copytree(world / "home", world / "before")
    adopt_second(world)
    other, book = SigningKey(), Ledger(world / "home")
    for _ in range(later):
        book.withdraw(b"a patient of the home")
    newest = receipt(other, book.head_statement(membership="cardio"))
    for path in (world / "before").glob("ledger.*"):
        shutil.copy(path, world / "home")
    with pytest.raises(LedgerError, match="rolled back"):
        Ledger(world / "home").accept_receipt(newest, other.public, ("cardio", ""))
    (world / "home" / "steps.jsonl").unlink()
    assert Ledger.restore(world / "home", None).members_lost
    with pytest.raises(LedgerError, match=r"before it adopted the ledger.* without one, "):
        receive(file, kept.read()[public], coordinator)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("shown", ["nothing", "a receipt of the home"])
def test_no_membership_goes_on_whose_home_lost_the_adoption(
    world: Path, shown: str, restored: bool
) -> None:
    """Whatever a coordinator sends: it may be new to the site, or have a receipt for an answer that
    the home's ledger paid for. Else whoever had withdrawn at the adopted site would take part."""
    coordinator, kept, file = SigningKey(), Receipts(world / "receipts.json"), world / "onco.toml"
    adopt_first(world)
    shutil.copytree(world / "home", world / "before")
    adopt_second(world)
    check_before_joining(load_site(file))
    public = give_receipt(file, coordinator, kept)

    def receives() -> None:
        given = json.dumps(kept.read()[public]) if shown != "nothing" else ""
        noted.accept(SiteWorker(load_site(file), file), given, coordinator.public)

    receives()
    shutil.copy(world / "home" / "hospital.toml", world / "before")
    path_of_notes().unlink()  # as on another machine: else they show that the home was put back
    shutil.rmtree(world / "home")
    shutil.copytree(world / "before", world / "home")
    if restored:
        with suppress(LedgerError):
            receives()
        Ledger.restore(world / "home", None).accept("records", "officer", declared=[EVERY])
    assert not hashes_of(Ledger(world / "home"), ["p5"]) <= {*Ledger(world / "home").withdrawn()}
    site = load_site(file)
    asked = [receives, partial(adopt_second, world)]
    asked += [partial(ask, site) for ask in (check_before_joining, open_paying_ledger)]
    asked += [partial(label._file_and_exclusion, site)]
    for ask in asked:
        with pytest.raises(FedtuneError) as refused:
            ask()
        assert "before it adopted the ledger" in str(refused.value)
    (found,) = [each.says for each in examine(file) if each.name == "ledger"]
    assert "before it adopted" in found


def test_a_key_withdrawn_again_has_no_column_in_which_it_does_not_stand(world: Path) -> None:
    """The site's held-out records tell patients apart by another column, in which it is not."""
    file, book = world / "cardio.toml", Ledger(world / "cardio-state")
    text = (world / "notes.jsonl").read_text().replace('"who"', '"nhs"').replace('"p', '"n')
    (world / "held.jsonl").write_text(text)
    columns = '{ prompt = "note", completion = "answer", patient = "nhs" }'
    table = f'[evaluation]\npath = "held.jsonl"\nname = "held"\ncolumns = {columns}\n'
    file.write_text(file.read_text() + table)
    withdraw(load_site(file), "p3", book)
    (unit,) = hashes_of(book, ["p3"])
    assert book.withdrawn_by[unit] == {"who"}


def test_a_key_withdrawn_again_has_its_columns_name_as_the_ledger_has_it(world: Path) -> None:
    """A long name is entered by its hash, and is compared by it."""
    file, book, column = world / "cardio.toml", Ledger(world / "cardio-state"), "w" * 80
    for path in (file, world / "notes.jsonl"):
        path.write_text(path.read_text().replace('"who"', f'"{column}"'))
    for _ in range(2):
        withdraw(load_site(file), "p7", book)
    (unit,) = hashes_of(book, ["p7"])
    assert book.withdrawn_by[unit] == {shorten_column(column)}


def test_a_purge_knows_the_note_of_an_adopted_ledger(world: Path) -> None:
    adopt_first(world)
    adopt_second(world)
    assert (world / "onco-state" / ADOPTED).exists()
    assert listing(load_site(world / "onco.toml")).unknown == []


@pytest.mark.parametrize("rounds", [2, 9])
def test_a_receipt_for_what_an_adopted_ledger_lacked_is_refused(world: Path, rounds: int) -> None:
    """The site's folder had been put back, and may have gone on beyond the entry since."""
    coordinator, kept, file = SigningKey(), Receipts(world / "receipts.json"), world / "onco.toml"
    shutil.copytree(world / "onco-state", world / "snapshot")
    spend(file, 7)
    public = give_receipt(file, coordinator, kept)
    shutil.rmtree(world / "onco-state")
    shutil.copytree(world / "snapshot", world / "onco-state")
    spend(file, rounds)
    adopt_first(world)
    adopt_second(world)
    with pytest.raises(LedgerError, match="charges are in no ledger"):
        receive(file, kept.read()[public], coordinator)
    (world / "onco-state" / ADOPTED).write_text("{}")
    with pytest.raises(LedgerError, match=r"damaged.* without one, .* end this membership"):
        receive(file, kept.read()[public], coordinator)
