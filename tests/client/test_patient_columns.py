"""A charge per patient says which column told patients apart. If another column does so later, what
one patient spent is not known, until a person at the site accepts it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedtune.cli.status_view import BudgetView
from fedtune.core.config import load_site
from fedtune.core.config.patient_columns import LONGEST, patient_columns, shorten_column
from fedtune.core.data.records import unit_member
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.errors import BudgetExceeded, PolicyRefused
from fedtune.core.ledger import ledger as ledger_module
from fedtune.core.ledger.entries import Accepted, Charge, Earlier, Spent
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.spending import (
    budget,
    charges_with_columns,
    known_epsilon,
    membership_lines,
)
from fedtune.core.vault.budget import check_known
from fedtune.core.vault.prepared import Unprepared
from fedtune.core.vault.worker import SiteWorker
from fedtune.officer import adopt as adoption
from fedtune.officer.adopt import adopt
from fedtune.officer.closed_ledger import NO_COLUMN, closed
from fedtune.officer.memberships import list_memberships
from fedtune.officer.review import cost_refusals, review
from fedtune.officer.withdraw import check_receipt, withdraw
from tests.cli_kit import run
from tests.client import adoption_kit
from tests.client.hospital_kit import make_hospital, study_of
from tests.client.site_kit import begun, trains
from tests.expected import raises_nothing

COLUMNS = 'prompt = "note", completion = "answer"'
SITE = """
[site]
name = "north"
declared_size = 12
state = "state"
[data]
path = "notes.jsonl"
name = "{name}"
columns = {{ {columns}, patient = "{patient}" }}
[policy]
bases = "any"
"""
PER_PATIENT = SimpleNamespace(unit="patient")
CHARGE = Charge("sha256:" + "a" * 64, "t", 1, 1.5, 1.0, 1, 1, 1.0, "patient", "first", 2.0)
VISITS = 5  # of each patient


def write_site(
    folder: Path, patient: str, name: str = "records", also: str = "", columns: str = COLUMNS
) -> Path:
    """Lay out a site of twelve patients with five visits each; return its file."""
    rows = [
        {"note": f"fever {n}", "visit": f"v{n}", "pid": f"p{n // VISITS}", "answer": "yes"}
        for n in range(12 * VISITS)
    ]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "site.toml"
    file.write_text(SITE.format(name=name, columns=columns, patient=patient) + also)
    return file


def start(folder: Path, patient: str, name: str = "records", also: str = "") -> SiteWorker:
    """Start the site anew, with this column of patients in its file."""
    file = write_site(folder, patient, name, also)
    return SiteWorker(load_site(file), file)


def declare(worker: SiteWorker) -> None:
    """As before each charge. Errors: BudgetExceeded."""
    worker.declare(worker.site.data, PER_PATIENT, worker.current())  # type: ignore[arg-type]


def pay(worker: SiteWorker, label: str = "adapter") -> None:
    declare(worker)
    made = replace(CHARGE, patient=worker.site.data.columns.patient or "")
    worker.ledger.reserve(worker.site.data.name, made, label, lambda _: None)


def refusal(worker: SiteWorker) -> str:
    """Return why the site refuses; "" if it does not."""
    try:
        declare(worker)
    except (BudgetExceeded, PolicyRefused) as refused:
        return str(refused)
    return ""


def accept(worker: SiteWorker) -> None:
    columns = patient_columns(worker.current())
    worker.ledger.accept(worker.site.data.name, "officer", "", columns)


def enter(ledger: Ledger, dataset: str, charge: Charge) -> None:
    """Enter a charge whose update was released; to "MEMBERSHIP/DATASET" as an adoption does."""
    membership = dataset.rpartition("/")[0]
    if membership:
        adopted = replace(charge, membership=membership, adopted=True)
        earlier = [Earlier(dataset, adopted, f"a@{membership}", "0" * 64)]
        ledger.enter_earlier(membership, earlier, {}, [], "officer")
    else:
        ledger.release(ledger.reserve(dataset, charge, "a", lambda _: None), b"x")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break what is tested: neither charges nor declarations name a column."""
    monkeypatch.setattr("fedtune.core.vault.worker.patient_column", lambda data: "")
    monkeypatch.setattr(ledger_module, "_with_column", lambda *given: {})


@pytest.mark.parametrize("broken", [False, True])
def test_an_epsilon_per_visit_is_not_taken_for_a_patients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """Twin: with the column nowhere, the site goes on at ε = 1.912 where 15.15 is true."""
    if broken:
        forget(monkeypatch)
    before = start(tmp_path, "visit")
    declare(before)
    column = "" if broken else "visit"
    before.ledger.reserve("records", replace(CHARGE, patient=column), "t", lambda _: None)
    after = start(tmp_path, "pid")
    stated = budget("records", after.ledger.spending("records"), after.site.policy).epsilon
    true = epsilon([Steps(1.5, 1.0, 1, VISITS)], 1e-3)
    assert stated == pytest.approx(1.912, abs=0.001) and true == pytest.approx(15.15, abs=0.01)
    assert bool(refusal(after)) is not broken


def test_a_study_waits_for_the_acceptance_and_its_coordinator_learns_no_column(
    tmp_path: Path, tiny_base: Path
) -> None:
    made = begun(tiny_base, privacy={"epsilon": 2.0, "delta": 1e-4, "unit": "patient"})
    before = start(tmp_path, "visit")
    assert before.prepare(made.study, made.frozen).admitted
    trains(before, made, 1)
    (paid,) = before.ledger.charges("records")
    assert paid.patient == "visit"
    worker = start(tmp_path, "pid")
    told = worker.prepare(made.study, made.frozen)
    assert not told.admitted
    assert "they were charged for another unit, or by an earlier release" in told.reason
    assert "visit" not in told.reason and "pid" not in told.reason
    accept(worker)
    assert worker.prepare(made.study, made.frozen).admitted
    trains(worker, made, 2)
    assert [each.patient for each in worker.ledger.charges("records")] == ["visit", "pid"]
    assert refusal(worker) == ""


def test_a_coordinator_learns_no_name_of_a_dataset_and_a_person_at_the_site_does(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Whether the site has a ledger of its own or is in a hospital's home."""
    made = begun(tiny_base, privacy={"epsilon": 2.0, "delta": 1e-4, "unit": "patient"})
    pay(start(tmp_path, "visit", "renal-2019"))
    worker = start(tmp_path, "pid", "renal-2019")
    told = worker.prepare(made.study, made.frozen)
    assert not told.admitted and "--accept DATASET" in told.reason
    assert "renal-2019" not in told.reason
    unknown = worker.ledger.unknown("renal-2019", "patient")
    with pytest.raises(BudgetExceeded, match="--accept renal-2019"):
        check_known("renal-2019", "patient", unknown, at_site=True)
    (refused,) = cost_refusals(made.study, worker.site, None, worker.ledger)
    assert "--accept renal-2019" in str(refused)


def test_a_running_site_reads_by_one_column_alone(tmp_path: Path) -> None:
    """Another column in its file counts when the site is started again, as for what it reads. Until
    then it is refused, since whoever withdraws does so by the column in the file."""
    worker = start(tmp_path, "visit")
    pay(worker)
    write_site(tmp_path, "pid")
    assert "columns.patient was changed while this site takes part" in refusal(worker)
    again = SiteWorker(load_site(tmp_path / "site.toml"), tmp_path / "site.toml")
    assert len(again.ledger.spending("records")) == 1
    assert "cost of earlier rounds" in refusal(again)
    write_site(tmp_path, "visit")
    assert refusal(worker) == ""


def test_an_acceptance_holds_for_the_column_that_the_person_saw(tmp_path: Path) -> None:
    worker = start(tmp_path, "visit")
    pay(worker)
    accept(worker)  # of something else: nothing is unknown by this column
    corrected = start(tmp_path, "pid")
    assert refusal(corrected)
    accept(corrected)
    assert refusal(corrected) == ""
    pay(corrected)
    again = start(tmp_path, "visit")
    assert [one.charge.patient for one in again.ledger.unknown("records", "patient")] == []
    assert refusal(again)  # what was paid by the other column is not known for this one
    assert [one.charge.patient for one in again.ledger.unknown("records", "patient")] == ["pid"]
    assert refusal(start(tmp_path, "pid")) == ""
    assert refusal(start(tmp_path, "who"))  # a third one, which nobody has seen


def test_a_correction_under_another_name_is_seen(tmp_path: Path) -> None:
    """The charges of a dataset that no table has any more are by the column of the one that
    counts them. Twin: another name alone."""
    pay(start(tmp_path, "visit"))
    assert refusal(start(tmp_path, "visit", "newer")) == ""
    corrected = start(tmp_path, "pid", "newest")
    assert refusal(corrected)
    accept(corrected)
    assert refusal(corrected) == ""


def test_another_dataset_has_its_own_column(tmp_path: Path) -> None:
    """Held-out records whose column has another name are known, until that one is corrected."""
    table = (
        '[evaluation]\npath = "held-out.jsonl"\n'
        'columns = {{ prompt = "note", completion = "answer", patient = "{}" }}\n'
    )
    worker = start(tmp_path, "pid", also=table.format("person"))
    assert worker.site.evaluation
    worker.declare(worker.site.evaluation, PER_PATIENT, worker.site)  # type: ignore[arg-type]
    asked = replace(CHARGE, patient="person")
    worker.ledger.reserve(worker.site.evaluation.name, asked, "t", lambda _: None)
    assert refusal(worker) == ""
    assert refusal(start(tmp_path, "pid", also=table.format("patient")))


@pytest.mark.parametrize("first", ["visit", "pid"])
def test_charges_of_an_earlier_release_are_by_the_first_column_that_is_declared(
    tmp_path: Path, first: str
) -> None:
    """A ledger without columns: nothing is asked before one is declared, or as long as it stays."""
    write_site(tmp_path, first)
    book = Ledger(tmp_path / "state")
    book.declare("records", [])
    book.reserve("records", CHARGE, "t", lambda _: None)
    head = book.head.seq
    worker = start(tmp_path, first)
    assert refusal(worker) == "" and worker.ledger.head.seq == head + 1
    assert refusal(worker) == "" and worker.ledger.head.seq == head + 1
    assert bool(refusal(start(tmp_path, "pid"))) is (first == "visit")


@pytest.mark.parametrize("base", ["a backup", "what is left"])
def test_what_a_restore_entered_is_not_known_until_a_person_accepts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """What was lost may have been for any unit, by any column, and a declaration of another column
    may be lost, too. Twin: if a restored charge counts as known, a corrected column goes unseen."""
    worker = start(tmp_path, "visit")
    if base == "a backup":
        worker.ledger.backup(tmp_path / "backup")
    pay(worker)
    StepLog(worker.ledger.folder / "steps.jsonl").append(
        Step(CHARGE.study, 1, CHARGE.noise_multiplier, 1.0, 1.0, "patient"), 1
    )
    state = tmp_path / "state"
    (state / "ledger.db").unlink()
    restored = Ledger.restore(state, tmp_path / "backup" if base == "a backup" else None)
    entered = [spent for spent in restored.spending() if spent.kind == "restore"]
    assert entered and {spent.seq for spent in restored.unknown("records", "record")} == {
        spent.seq for spent in entered
    }
    told = refusal(start(tmp_path, "pid"))
    assert "by an earlier release" in told and "restored" not in told and "visit" not in told
    with monkeypatch.context() as twin:
        twin.setattr(Spent, "is_known_for", lambda spent, unit: not spent.has_other_column)
        assert refusal(start(tmp_path, "pid")) == ""
    same = start(tmp_path, "visit")
    assert refusal(same)
    shown = run("ledger", tmp_path / "site.toml")
    assert "were lost before the ledger was" in " ".join(shown.output.split())
    accept(same)
    assert refusal(same) == "" and len(same.ledger.newcomer("records")) == len(entered)
    assert refusal(start(tmp_path, "pid"))  # the person decided by another column


def test_rounds_per_record_count_for_patients_who_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key of a patient is known from them. Twin: everybody arrives now, and has paid nothing."""
    worker = start(tmp_path, "pid")
    book = worker.ledger
    book.declare("records", [], "hash", [b"row"], columns={})
    for round_ in range(3):
        paid = replace(CHARGE, unit="record", round=round_)
        book.reserve("records", paid, "adapter", lambda _: None)
    assert refusal(worker)
    accept(worker)
    assert refusal(worker) == ""
    book.declare("records", [], "hash", [b"p1"], "first", [b"p1"])
    assert len(book.newcomer("records")) == 3
    assert [len(cohort.spent) for cohort in book.cohorts("records")] == [3]
    monkeypatch.setattr(Spent, "is_known_for", lambda spent, unit: not spent.has_other_column)
    assert book.newcomer("records") == []


def test_what_was_accepted_for_one_column_is_not_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever made the rounds unknown: a person who accepted few records of a visit did not
    accept many of a patient. Twin: an acceptance that asks for its number alone."""
    worker = start(tmp_path, "visit")
    worker.ledger.declare("records", [], "hash", [b"row"], columns={})
    worker.ledger.reserve("records", replace(CHARGE, unit="record"), "adapter", lambda _: None)
    assert refusal(worker)
    accept(worker)
    assert refusal(worker) == ""
    assert refusal(start(tmp_path, "pid"))
    monkeypatch.setattr(Accepted, "covers", lambda accepted, spent, _: accepted.upto >= spent.seq)
    assert refusal(start(tmp_path, "pid")) == ""


def test_an_acceptance_holds_for_the_charges_that_counted_then(tmp_path: Path) -> None:
    """Rounds per record of a dataset that was disjoint were not shown. Twin: an acceptance of an
    earlier release, which did not say for which charges it was."""
    ledger = Ledger(tmp_path)
    ledger.declare("B", (), columns={"B": ""})
    ledger.reserve("B", replace(CHARGE, unit="record", patient=""), "b", lambda _: None)
    ledger.declare("A", ["B"], columns={"A": "visit", "B": ""})
    ledger.reserve("A", replace(CHARGE, patient="visit"), "a", lambda _: None)
    columns = {"A": "pid", "B": ""}
    ledger.declare("A", ["B"], columns=columns)
    assert [spent.dataset for spent in ledger.unknown("A", "patient", columns)] == ["A"]
    ledger.accept("A", "me", "the column was renamed", columns)
    assert ledger.unknown("A", "patient", columns) == []
    ledger.declare("A", [], columns=columns)
    assert [spent.dataset for spent in ledger.unknown("A", "patient")] == ["B"]
    (accepted,) = ledger.accepted("A")
    charge = ledger.unknown("A", "patient")[0]
    assert replace(accepted, against=None).covers(charge, "A")
    assert not accepted.covers(charge, "A")
    ledger.accept("A", "me", "now with B", columns)
    assert ledger.unknown("A", "patient") == []


def test_who_takes_disjoint_from_back_is_shown_and_accepts_what_counts_then(
    tmp_path: Path,
) -> None:
    """Before any plan is admitted, by which the ledger would have it declared."""
    worker, site = start(tmp_path, "pid"), tmp_path / "site.toml"
    charge = replace(CHARGE, unit="record", patient="")
    worker.ledger.declare("others", (), columns={"others": ""})
    worker.ledger.declare("records", ["others"], columns={"records": "pid"})
    enter(worker.ledger, "others", charge)
    site.write_text(site.read_text().replace("[data]", '[data]\ndisjoint_from = ["others"]'))
    assert "not known" not in run("ledger", site).output
    worker = start(tmp_path, "pid")
    study = SimpleNamespace(unit="patient", continuous=False, digest="sha256:" + "b" * 64)
    assert cost_refusals(study, worker.site, None, worker.ledger)  # type: ignore[arg-type]
    assert "others" in run("ledger", site).output
    told = run("ledger", site, "--accept", "records", "--reason", "few share patients")
    assert told.exit_code == 0, told.output + told.stderr
    assert not cost_refusals(study, worker.site, None, worker.ledger)  # type: ignore[arg-type]


def test_a_patient_who_arrives_under_a_new_key_has_paid_what_was_paid_before(
    tmp_path: Path,
) -> None:
    """In a study with a schedule every patient of the corrected column is new by the key. Twin:
    one who arrives while the column stays."""
    worker = start(tmp_path, "visit")
    declare(worker)
    book = worker.ledger
    book.declare("records", [], "hash", [b"v1"], "first", [b"v1"])
    pay(worker)
    assert book.newcomer("records") == []
    corrected = start(tmp_path, "pid")
    accept(corrected)
    assert refusal(corrected) == ""
    assert len(book.newcomer("records")) == 1
    corrected.ledger.declare("records", [], "hash", [b"p1"], "second", [b"p1"])
    assert [len(cohort.spent) for cohort in corrected.ledger.cohorts("records")] == [1, 1]


# ------------------------------------------------------------------------------- a hospital's home


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_correction_in_a_home_holds_for_every_membership_at_once(
    tmp_path: Path, tiny_base: Path
) -> None:
    """One that is not started again reads its records by the old column: it is refused."""
    files = make_hospital(tmp_path)
    made = study_of("heart", tiny_base)
    running = SiteWorker(load_site(files["cardio"]), files["cardio"])
    assert running.prepare(made.study, made.frozen).admitted
    trains(running, made, 1)
    for file in (tmp_path / "hospital.toml", *files.values()):
        edit(file, 'patient = "who"', 'patient = "person"')
    other = SiteWorker(load_site(files["onco"]), files["onco"])
    assert "was changed while this site takes part" in refusal(running)
    told = refusal(other)
    assert "they were charged for another unit, or by an earlier release" in told
    assert "who" not in told.split() and "person at the site" in told
    assert "'person'" not in told and "records" not in told
    head = other.ledger.head
    assert refusal(running) and refusal(other)
    assert other.ledger.head == head  # neither enters its column over the other's
    accept(other)
    assert refusal(other) == ""
    with pytest.raises(PolicyRefused, match="was changed") as told_running:
        trains(running, made, 2)  # not even before another membership pays by the new column
    assert "who" not in str(told_running.value).split()
    pay(other)
    with pytest.raises(BudgetExceeded, match="cost of earlier rounds"):
        running.ledger.reserve(  # it had asked before
            "records",
            replace(CHARGE, patient="who", membership="cardio"),
            "t",
            lambda _: None,
            permit_unknown=partial(check_known, "records", "patient"),
        )


def test_under_the_lock_no_round_is_charged_by_a_column_of_before(
    tmp_path: Path, tiny_base: Path
) -> None:
    """The settings that an order read may be newer than those by which this vault reads records.
    Twin: a vault that was started with them."""
    files = make_hospital(tmp_path)
    made = study_of("heart", tiny_base)
    running = SiteWorker(load_site(files["cardio"]), files["cardio"])
    assert running.prepare(made.study, made.frozen).admitted
    for file in (tmp_path / "hospital.toml", *files.values()):
        edit(file, 'patient = "who"', 'patient = "person"')
    read = load_site(files["cardio"])
    apart, columns = {"records": list[str]()}, {"records": "person"}
    with pytest.raises(PolicyRefused, match="other units are told apart since"):
        running.check_stated(read, apart, columns)
    with raises_nothing():
        SiteWorker(read, files["cardio"]).check_stated(read, apart, columns)


def test_held_out_records_that_nobody_declared_yet_keep_no_membership_from_training(
    tmp_path: Path, tiny_base: Path
) -> None:
    """They are declared with the first question about them. Twin: the ledger has another column."""
    file = make_hospital(tmp_path)["cardio"]
    (tmp_path / "held.jsonl").write_text((tmp_path / "notes.jsonl").read_text())
    hospital = tmp_path / "hospital.toml"
    hospital.write_text(
        hospital.read_text() + '[datasets.held]\npath = "held.jsonl"\npatient = "who"\n'
    )
    held = 'path = "../held.jsonl"\nname = "held"\n'
    columns = f'columns = {{ {COLUMNS}, patient = "who" }}'
    file.write_text(file.read_text() + f"[evaluation]\n{held}{columns}\n")
    worker = SiteWorker(load_site(file), file)
    made = study_of("heart", tiny_base)
    assert worker.prepare(made.study, made.frozen).admitted
    assert worker.ledger.datasets == ["records"]
    trains(worker, made, 1)
    site, apart = worker.current(), {name: [] for name in worker.ledger.datasets}
    worker.check_stated(site, apart, {"records": "who", "held": "who"})
    with pytest.raises(Unprepared):
        worker.check_stated(site, apart, {"records": "who", "held": "person"})


@pytest.mark.parametrize("dataset", ["records", "what no file holds any more"])
def test_adopted_charges_keep_their_column(tmp_path: Path, dataset: str) -> None:
    """Also where a home counts them against every dataset. Twin: the column stays."""
    folder = tmp_path / "hospital"
    folder.mkdir()
    patients = [f"p{n}" for n in range(12)]
    adoption_kit.write_notes(folder / "notes.jsonl", patients)
    for name in ("cardio", "onco"):
        file = adoption_kit.make_site(folder, name)
        adoption_kit.spend(file, 1)
        worker = SiteWorker(load_site(file), file)
        declare(worker)
        if name == "onco":
            if dataset != "records":
                worker.ledger.declare(dataset, [], "content", [b"gone"], columns={dataset: "who"})
            paid = replace(CHARGE, patient="who")
            worker.ledger.reserve(dataset, paid, "adapter", lambda _: None)
        adopt(folder / "home", file, name)
    home = Ledger(folder / "home")
    (entered,) = (spent for spent in home.spending() if spent.charge.study == CHARGE.study)
    assert entered.charge.patient == "who" and entered.charge.membership == "onco"
    assert entered.dataset == f"onco/{dataset}"
    member = SiteWorker(load_site(folder / "onco.toml"), folder / "onco.toml")
    assert refusal(member) == ""
    for file in (folder / "home" / "hospital.toml", folder / "cardio.toml", folder / "onco.toml"):
        edit(file, 'patient = "who"', 'patient = "note"')
    again = SiteWorker(load_site(folder / "onco.toml"), folder / "onco.toml")
    assert refusal(again)
    unknown = again.ledger.unknown("records", "patient")
    assert len(unknown) == 3 and {spent.patient for spent in unknown} == {"who"}


def test_a_correction_is_seen_by_adopted_charges_that_name_no_column(tmp_path: Path) -> None:
    """Both count as made by the first column with which their own dataset is declared here."""
    for dataset in ("notes", "cardio/notes"):
        ledger = Ledger(tmp_path / dataset.replace("/", "-"))
        ledger.declare("notes", (), columns=None)
        enter(ledger, dataset, CHARGE)
        ledger.declare("notes", (), columns={"notes": "visit"})
        assert ledger.unknown("notes", "patient") == []
        ledger.declare("notes", (), columns={"notes": "pid"})
        found = ledger.unknown("notes", "patient")
        assert [(charge.patient, charge.patient_now) for charge in found] == [("visit", "pid")]


def test_charges_without_a_column_are_adopted_by_that_of_the_site_file(tmp_path: Path) -> None:
    """Charges of an earlier release name none. If the file has none either, it is not known."""
    worker = start(tmp_path, "visit")
    worker.ledger.declare("records", [], "hash", [b"v1"], columns={})
    for unit in ("patient", "record"):
        paid = replace(CHARGE, unit=unit, study=unit)
        worker.ledger.reserve("records", paid, "adapter", lambda _: None)
    with closed(worker.ledger) as old:
        for columns, expected in (({"records": "visit"}, "visit"), ({}, NO_COLUMN)):
            listed = old.list_earlier("onco", {"records": "onco/records"}, columns)
            assert [one.charge.patient for one in listed] == [expected, ""]
    assert shorten_column(NO_COLUMN) != NO_COLUMN


LETTERS = "[datasets.letters]"


def make_two(
    folder: Path, column: str, charged: str = "letters", named: bool = True, apart: bool = False
) -> tuple[Path, Path, Path]:
    """Make a home with `records` (column "who") of the membership cardio, that adopts the later
    site onco, whose `letters` have this column. Return hospital.toml and the two site files.

    - charged: the dataset for which onco paid one round, by this column; "" for none
    - named: whether onco's file still names the column
    - apart: whether it declares its letters disjoint from `charged`"""
    adoption_kit.write_notes(folder / "notes.jsonl", [f"p{n}" for n in range(12)])
    adoption_kit.write_notes(folder / "letters.jsonl", [f"q{n}" for n in range(12)])
    cardio = adoption_kit.make_site(folder, "cardio")
    onco = adoption_kit.make_site(folder, "onco", "letters.jsonl", "letters")
    edit(onco, 'patient = "who"', f'patient = "{column}"')
    if not named:
        edit(onco, f', patient = "{column}"', "")
    if apart:
        edit(onco, 'name = "letters"', f'name = "letters"\ndisjoint_from = ["{charged}"]')
    adoption_kit.spend(cardio, 0)
    book = Ledger(load_site(onco).home)
    if charged:
        book.declare(charged, [], columns={charged: column})
        number = book.reserve(charged, replace(CHARGE, patient=column), "adapter", lambda _: None)
        book.release(number, b"update")
    for file, name in ((cardio, "cardio"), (onco, "onco")):
        adopt(folder / "home", file, name)
    return folder / "home" / "hospital.toml", cardio, onco


def correct_letters(hospital: Path, onco: Path, old: str, new: str) -> None:
    """As a person corrects the column of `letters`, in hospital.toml and in the site file."""
    before, _, table = hospital.read_text().partition(LETTERS)
    assert f'patient = "{old}"' in table
    table = table.replace(f'patient = "{old}"', f'patient = "{new}"')
    hospital.write_text(before + LETTERS + table)
    edit(onco, f'patient = "{old}"', f'patient = "{new}"')


def member(file: Path) -> SiteWorker:
    return SiteWorker(load_site(file), file)


def test_an_adopted_charge_is_by_the_column_of_its_own_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A correction is seen by every dataset against which it counts. Twin: looked up by the name of
    its entry, which no file has, it is compared with a column of another dataset's, which is called
    the same."""
    hospital, cardio, onco = make_two(tmp_path, "who")
    assert refusal(member(cardio)) == refusal(member(onco)) == ""
    correct_letters(hospital, onco, "who", "note")
    assert refusal(member(cardio)) and refusal(member(onco))
    with monkeypatch.context() as twin:
        by_entry = lambda one, columns, name: columns.get(one.dataset) or columns.get(name, "")  # noqa: E731
        twin.setattr(Spent, "find_column", by_entry)
        assert refusal(member(cardio)) == "" and refusal(member(onco))
    accept(member(cardio))
    assert refusal(member(cardio)) == "" and refusal(member(onco))
    correct_letters(hospital, onco, "note", "answer")
    assert refusal(member(cardio))  # the person had seen the first correction alone


def test_another_name_of_an_adopted_column_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Nothing was corrected: each dataset has the column that it had."""
    _, cardio, onco = make_two(tmp_path, "note")
    assert refusal(member(cardio)) == refusal(member(onco)) == ""
    (adopted,) = member(cardio).ledger.spending("records")
    assert (adopted.patient, adopted.patient_now) == ("note", "note")


def test_an_adopted_dataset_that_is_gone_has_no_column_of_the_home(tmp_path: Path) -> None:
    """Its name may be that of another dataset of the home, whose column says nothing of it."""
    _, cardio, onco = make_two(tmp_path, "who", charged="records")
    (adopted,) = member(onco).ledger.spending("letters")
    assert adopted.dataset == "onco/onco-records"
    file = tmp_path / "home" / "hospital.toml"
    correct_letters(file, onco, "who", "note")
    assert refusal(member(onco)) and refusal(member(cardio)) == ""
    told = withdraw(member(onco).site, "fever of q3", member(onco).ledger)
    assert [release.digest for release in told.releases] == [CHARGE.study]  # it may have had them


def take_column_out(hospital: Path, onco: Path, column: str) -> SiteWorker:
    """As a person takes the column of `letters` out, and declares them disjoint from `records`."""
    before, _, table = hospital.read_text().partition(LETTERS)
    table = table.replace(f'patient = "{column}"\n', "", 1)
    table = '\ndisjoint_from = ["records"]' + table
    hospital.write_text(before + LETTERS + table)
    onco.write_text(onco.read_text().replace(f', patient = "{column}"', ""))
    return member(onco)


def refused_by_record(worker: SiteWorker) -> str:
    """Why a study that protects records is refused at a dataset whose rounds a person accepted."""
    accept(worker)
    try:
        unit = SimpleNamespace(unit="record")
        worker.declare(worker.site.data, unit, worker.current())  # type: ignore[arg-type]
    except PolicyRefused as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("charged", ["letters", "earlier"])
@pytest.mark.parametrize("broken", [False, True])
def test_an_adopted_dataset_keeps_that_it_had_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charged: str, broken: bool
) -> None:
    """Its own, or one of a dataset that the site's file names no longer. Twin: the home forgets it,
    and a study on records reads whoever withdrew."""
    if broken:
        monkeypatch.setattr(adoption, "_list_columns", lambda *given: [])
    hospital, _, onco = make_two(tmp_path, "who", charged, named=False)
    worker = take_column_out(hospital, onco, "who")
    assert ("no patient column is named" in refused_by_record(worker)) is not broken


def test_an_adopted_dataset_that_has_a_column_keeps_it(tmp_path: Path) -> None:
    """As its file names it at the adoption, although no plan has reached the site before."""
    hospital, cardio, onco = make_two(tmp_path, "who", charged="")
    worker = take_column_out(hospital, onco, "who")
    assert "no patient column is named" in refused_by_record(worker)
    assert refusal(member(cardio)) == ""


def test_a_dataset_that_was_disjoint_before_an_adoption_is_so_after_it(tmp_path: Path) -> None:
    """Of the site's own ledger, and of the home. Twin: the site did not declare it."""
    for apart in (True, False):
        folder = tmp_path / str(apart)
        folder.mkdir()
        hospital, _, onco = make_two(folder, "who", "earlier", named=False, apart=apart)
        worker = take_column_out(hospital, onco, "who")
        assert ("no patient column is named" in refused_by_record(worker)) is not apart
        remembered = Ledger(folder / "home").patient_columns
        assert ("letters" in remembered) is not apart


# ------------------------------------------------------------------------------------ what is said


def released(worker: SiteWorker, round_: int = 1) -> None:
    """Charge a round by the site's column of now, and release its update."""
    declare(worker)
    paid = replace(CHARGE, round=round_, patient=worker.site.data.columns.patient or "")
    number = worker.ledger.reserve("records", paid, f"adapter {round_}", lambda _: None)
    worker.ledger.release(number, b"update")


def enter_keys(worker: SiteWorker, *keys: str) -> None:
    worker.ledger.declare("records", None, "hash", [unit_member(key) for key in keys])


@pytest.mark.parametrize("read_again", [False, True])
def test_a_receipt_states_no_epsilon_that_is_not_known(tmp_path: Path, read_again: bool) -> None:
    """Before and after the records are read by the corrected column. Twin: a column that stays."""
    worker = start(tmp_path, "visit")
    released(worker)
    enter_keys(worker, "v1", "v9")
    before = withdraw(worker.site, "v9", worker.ledger)
    assert [(r["rounds"], r["epsilon"]) for r in before.receipt["releases"]] == [(1, "1.912")]
    corrected = start(tmp_path, "pid")
    accept(corrected)
    declare(corrected)
    if read_again:
        enter_keys(corrected, "p1")
    told = withdraw(corrected.site, "p1", corrected.ledger)
    assert told.trained_on and told.releases[0].epsilon is None
    assert [(r["rounds"], r["epsilon"]) for r in told.receipt["releases"]] == [(1, "not known")]
    assert check_receipt(told.receipt_file, corrected.ledger)
    assert check_receipt(before.receipt_file, corrected.ledger)  # as earlier releases wrote them
    unseen = withdraw(corrected.site, "nobody", corrected.ledger, unseen=True)
    assert not unseen.trained_on and unseen.releases == []


def test_a_receipt_lists_what_was_adopted_for_whoever_left_the_file(tmp_path: Path) -> None:
    """An adoption takes over the keys in the files alone. Twin: a round of the home's own."""
    for dataset, listed in (("cardio/records", True), ("records", False)):
        folder = tmp_path / dataset.replace("/", "-")
        folder.mkdir()
        worker = start(folder, "pid")
        declare(worker)
        enter_keys(worker, "p1")
        enter(worker.ledger, dataset, replace(CHARGE, patient="pid"))
        told = withdraw(worker.site, "gone", worker.ledger, unseen=True)
        assert bool(told.releases) == listed == told.trained_on


def test_a_receipt_lists_what_a_restore_entered(tmp_path: Path) -> None:
    worker = start(tmp_path, "pid")
    released(worker)
    enter_keys(worker, "p1")
    worker.ledger.backup(tmp_path / "backup")
    released(worker, 2)
    (tmp_path / "state" / "ledger.db").unlink()
    book = Ledger.restore(tmp_path / "state", tmp_path / "backup")
    entered = [spent for spent in book.spending() if spent.kind == "restore"]
    assert entered
    # p2 is in the file, and may have trained in the lost round. So may who has left the file.
    for patient in ("p1", "p2", "gone"):
        book = Ledger(tmp_path / "state")
        told = withdraw(worker.site, patient, book, unseen=patient == "gone")
        assert {r.digest for r in told.releases} >= {spent.charge.study for spent in entered}
        assert told.trained_on


@pytest.mark.parametrize("broken", [False, True])
def test_a_receipt_lists_every_study_that_one_restore_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """Rounds of several studies were lost, and all their charges are in one entry. Twin: with the
    number of the entry alone the receipt lists one round of one study."""
    worker = start(tmp_path, "pid")
    declare(worker)
    enter_keys(worker, "p1")
    worker.ledger.backup(tmp_path / "backup")
    log = StepLog(worker.ledger.folder / "steps.jsonl")
    studies = ["sha256:" + letter * 64 for letter in "abc"]
    for study in studies:
        for round_ in (1, 2):
            paid = replace(CHARGE, study=study, round=round_, patient="pid")
            number = worker.ledger.reserve("records", paid, "adapter", lambda _: None)
            log.begin_round(worker.ledger.hash_of(number))
            log.append(Step(study, round_, 1.5, 1.0, 1.0, "patient"), of_round=1)
            worker.ledger.release(number, b"update")
    (tmp_path / "state" / "ledger.db").unlink()
    book = Ledger.restore(tmp_path / "state", tmp_path / "backup")
    entered = book.spending("records")
    assert len({spent.seq for spent in entered}) == 1 < len(entered)
    if broken:
        monkeypatch.setattr(Spent, "number", property(lambda spent: (spent.seq, 0)))
    told = withdraw(worker.site, "p1", Ledger(tmp_path / "state"))
    listed = {release.digest: release.rounds for release in told.releases}
    assert (listed == dict.fromkeys(studies, 2)) is not broken
    (line,) = membership_lines("records", book.cohorts("records"), worker.site.policy)
    assert ((line.studies, line.charged) == (3, 6)) is not broken


def test_a_home_lists_no_epsilon_that_is_not_known(tmp_path: Path) -> None:
    """Neither of all memberships, nor of one, nor as its share. Twin: before the correction."""
    files = make_hospital(tmp_path)
    worker = SiteWorker(load_site(files["cardio"]), files["cardio"])
    declare(worker)
    paid = replace(CHARGE, patient="who", membership="cardio")
    worker.ledger.reserve("records", paid, "adapter", lambda _: None)
    known = list_memberships(tmp_path)
    assert known.totals[0].known and all(line.known for line in known.who["records"])
    assert "not known" not in run("memberships", str(tmp_path)).output
    for file in (tmp_path / "hospital.toml", *files.values()):
        edit(file, 'patient = "who"', 'patient = "person"')
    listed = list_memberships(tmp_path)
    assert not listed.totals[0].known and [x.known for x in listed.who["records"]] == [False]
    shares = {each.name: each.share["records"].known for each in listed.memberships}
    assert shares == {"cardio": False, "onco": True}
    assert run("memberships", str(tmp_path)).output.count("not known") == 3
    assert listed.facts()["datasets"][0]["known"] is False


def test_no_total_is_shown_as_known_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    """In the tables of `fedtune ledger` and `fedtune status`, and in a review, also after an
    acceptance. Twin: before the correction."""
    monkeypatch.setenv("COLUMNS", "200")
    files = make_hospital(tmp_path)
    worker = SiteWorker(load_site(files["cardio"]), files["cardio"])
    declare(worker)
    paid = replace(CHARGE, patient="who", membership="cardio")
    worker.ledger.reserve("records", paid, "adapter", lambda _: None)
    made = begun(tiny_base, privacy={"epsilon": 2.0, "delta": 1e-4, "unit": "patient"})
    shows = BudgetView(files["cardio"])

    def shown() -> list[int]:
        """Count what is shown as not known: total and membership, share, status, review."""
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(shows())
        table = run("ledger", files["cardio"]).output
        reviewed = review(made.study, load_site(files["cardio"]), Ledger(tmp_path))
        lines = dict(reviewed.sections)["What it costs"]
        total = sum("not known" in line for line in table.splitlines() if "spent" in line)
        share = "if all rounds gave an ε" in table
        status = "not known" in console.export_text()
        return [total, share, status, any(line.startswith("NOT KNOWN") for line in lines)]

    assert shown() == [0, False, False, False]
    for file in (tmp_path / "hospital.toml", *files.values()):
        edit(file, 'patient = "who"', 'patient = "person"')
    assert shown() == [1, True, True, True]
    accept(SiteWorker(load_site(files["cardio"]), files["cardio"]))
    assert shown() == [1, True, True, True]


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_an_epsilon_is_known_if_every_charge_gives_one(tmp_path: Path, unit: str) -> None:
    worker = start(tmp_path, "pid")
    released(worker)
    listed = charges_with_columns(worker.ledger, ["records"], {"records": "pid"})
    stated = known_epsilon(listed, 1e-3, unit)
    assert stated is None if unit == "record" else stated == pytest.approx(1.912, abs=0.5)
    listed = charges_with_columns(worker.ledger, ["records", "other"], {"other": "visit"})
    assert len(listed) == 1 and known_epsilon(listed, 1e-3, "patient") is None
    none = [replace(listed[0], charge=replace(CHARGE, noise_multiplier=0.0), patient="")]
    assert known_epsilon(none, 1e-3, "patient") == math.inf


@pytest.mark.parametrize("declared", [False, True])
def test_a_person_reads_both_columns_and_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: bool
) -> None:
    """Whether or not the site was started since the file was corrected."""
    monkeypatch.setenv("COLUMNS", "200")
    pay(start(tmp_path, "visit"))
    file = str(write_site(tmp_path, "pid"))
    worker = SiteWorker(load_site(Path(file)), Path(file))
    if declared:
        assert refusal(worker)
    shown = " ".join(run("ledger", file).output.split())
    for words in (
        "NOT KNOWN: what 1 of the rounds above cost one patient",
        "1 rounds were charged when the column 'visit' told patients apart, and now 'pid' does",
        "If the column was only renamed",
        "repeat `fedtune withdraw` with the new one",
        "--accept records",
    ):
        assert words in shown
    assert run("ledger", file, "--accept", "records", "--reason", "renamed").exit_code == 0
    assert refusal(worker) == ""
    assert run("ledger", file, "--accept", "records").exit_code == 2  # nothing is left to accept


@pytest.mark.parametrize(
    ("name", "is_kept"),
    [
        (None, True),
        ("pid", True),
        ("größe", True),
        ("x" * LONGEST, True),
        ("x" * (LONGEST + 1), False),
        ("ö" * 33, False),
        ("a\nb", False),
    ],
)
def test_a_name_in_the_ledger_has_a_bounded_length(name: str | None, is_kept: bool) -> None:
    short = shorten_column(name)
    assert (short == (name or "")) is is_kept and len(short.encode()) <= LONGEST
    assert shorten_column(name) == short != shorten_column("x" * 66)
