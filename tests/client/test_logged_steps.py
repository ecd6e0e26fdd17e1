"""A site that does not know every step of a plan answers it no more. Else it would state too few
steps, and count too few against what one study may cost."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.core.config import Site, load_site, load_study
from fedtune.core.config.study import QUERIES
from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.errors import BudgetExceeded
from fedtune.core.ledger.entries import EVERY, LOST, Charge, Earlier
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.ledger.spending import list_ended
from fedtune.core.vault.logged_steps import check_all_logged, check_none_lost
from fedtune.core.vault.policy import compute_plan
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import receipt
from fedtune.officer.adopt import adopt
from fedtune.officer.before_joining import check_before_joining
from fedtune.officer.review import cost_refusals
from fedtune.officer.step_log import check_step_log
from fedtune.public.start import Start, start
from tests.cli_kit import run
from tests.client.adoption_kit import CHARGE, spend, write_notes
from tests.client.adoption_kit import make_site as write_site
from tests.client.site_kit import begun, make_site, notes, trains
from tests.expected import raises_nothing, raises_only
from tests.private_evaluation_kit import WILLING, world
from tests.simulated import simulate

pytestmark = pytest.mark.usefixtures("without_self_test")
LACKS = "rounds of this plan may be missing"
LOG_LACKS = "has no steps of round"
COLUMNS = {"prompt": "note", "completion": "answer"}
SCHEDULED = {
    "privacy": {"epsilon": 6.0, "delta": 1e-4, "noise_multiplier": 2.0, "unit": "patient"},
    "schedule": {"every": 3600},
    "training": {"sampling_rate": 1.0, "learning_rate": 0.1},
    "evaluation": {"path": "public.jsonl", "columns": COLUMNS},
}
WITH_ROUNDS = {"training": {"rounds": 4, "sampling_rate": 1.0, "learning_rate": 0.1}}


def put_back(folder: Path, made: Start, *, before: int, lost: int) -> SiteWorker:
    """Have a site train rounds, of which its folder knows only the first `before` after it was put
    back to an earlier copy of itself; then the coordinator's receipt stops it, and a person
    restores its ledger and accepts the charges. Return the site."""
    notes(folder)
    site = make_site(folder, {"max_epsilon": 40.0, "max_epsilon_per_study": 6.0}, patient="who")
    coordinator, state = SigningKey(), folder / "state"
    worker = SiteWorker(site)
    assert worker.prepare(made.study, made.frozen, coordinator.public).admitted
    for round_ in range(1, before + 1):
        trains(worker, made, round_)
    worker.home.admit("another plan", "an officer")
    shutil.copytree(state, folder / "copy")
    for round_ in range(before + 1, before + lost + 1):
        trains(worker, made, round_)
    token = json.dumps(receipt(coordinator, worker.ledger.head_statement()))
    shutil.rmtree(state)
    shutil.copytree(folder / "copy", state)
    again = SiteWorker(site)
    assert again.prepare(made.study, made.frozen, coordinator.public).admitted
    with pytest.raises(LedgerError):
        again.train(made.study.digest, before + lost + 1, made.adapter, token)
    Ledger.restore(state)
    restored = SiteWorker(site)
    restored.home.accept("records", "an officer", "all by this column")
    return restored


def pay(state: Path, charge: Charge, *, membership: str = "") -> None:
    """Charge the ledger in `state` with a round, log its steps, and release its answer."""
    book, paid = Ledger(state), replace(charge, membership=membership)
    number = book.reserve("notes", paid, f"adapter@{membership}", lambda charges: None)
    log = StepLog(state / "steps.jsonl", membership)
    log.begin_round(book.hash_of(number))
    step = Step(paid.study, paid.round, paid.noise_multiplier, paid.sampling_rate, 1.0, paid.unit)
    log.append(replace(step, max_grad_norm=paid.max_grad_norm, records=paid.records), paid.steps)
    book.release(number, b"update")


@pytest.mark.parametrize("plan", [SCHEDULED, WITH_ROUNDS], ids=["lifetime", "per-study"])
def test_lost_rounds_of_unknown_studies_end_every_study_that_had_begun(
    tmp_path: Path, tiny_base: Path, plan: dict[str, object]
) -> None:
    """A restore charges them to the site's total. That they were of this plan, whose own limit they
    count against, is in no file; it went on to ε = 8.52 in place of 6, with too few steps stated.
    Twin: a plan that begins after the restore trains."""
    made = begun(tiny_base, **plan)
    worker = put_back(tmp_path, made, before=1, lost=2)
    assert LOST in [charge.study for charge in worker.ledger.charges("records")]
    admission = worker.prepare(made.study, made.frozen)
    assert not admission.admitted and LACKS in admission.reason
    plan_here = compute_plan(made.study, worker.site)
    refused = cost_refusals(made.study, worker.site, plan_here, worker.home)
    assert [LACKS in str(each) for each in refused] == [True]
    new = begun(tiny_base, study={"name": "another"}, **plan)
    admission = worker.prepare(new.study, new.frozen)
    assert admission.admitted, admission.reason
    with raises_nothing():
        trains(worker, new, 1)
    assert worker.home.ended_plans == {made.study.digest, "another plan"}
    assert list_ended(worker.home) == [made.study.study.name]


def train_around_a_backup(folder: Path, made: Start) -> Site:
    """Train round 1 of a study at a new site, back up the ledger to folder/backup, and train round
    2."""
    notes(folder)
    site = make_site(folder, patient="who")
    worker = SiteWorker(site)
    assert worker.prepare(made.study, made.frozen).admitted
    trains(worker, made, 1)
    worker.ledger.backup(folder / "backup")
    trains(worker, made, 2)
    return site


@pytest.mark.parametrize("lost", [True, False])
def test_a_restore_ends_the_study_unless_the_ledger_was_whole(
    tmp_path: Path, tiny_base: Path, lost: bool
) -> None:
    """The step log may name each lost round; a private study had a second life all the same, with
    its attempts and its refused answers forgotten. A whole ledger goes on."""
    made = begun(tiny_base)
    site = train_around_a_backup(tmp_path, made)
    if lost:
        (tmp_path / "state" / "ledger.db").unlink()
    restored = Ledger.restore(tmp_path / "state", tmp_path / "backup")
    assert bool(restored.members_lost) == lost
    assert list_ended(restored) == ([made.study.study.name] if lost else [])
    if lost:
        restored.accept("records", "an officer", "all by this column")
    again = SiteWorker(site)
    if lost:
        assert LACKS in again.prepare(made.study, made.frozen).reason
    else:
        assert again.prepare(made.study, made.frozen).admitted
        stated = again.train(made.study.digest, 3, made.adapter).events
        assert [each["steps"] for each in stated] == [3 * made.study.training.local_steps]


def test_a_lost_round_that_log_and_anchor_show_is_charged_once(
    tmp_path: Path, tiny_base: Path
) -> None:
    """The database is lost, and the backup is older than the round. Its line in the step log names
    the ledger's entry, and so does the anchor."""
    made = begun(tiny_base)
    train_around_a_backup(tmp_path, made)
    (tmp_path / "state" / "ledger.db").unlink()
    restored = Ledger.restore(tmp_path / "state", tmp_path / "backup")
    steps = [charge.steps for charge in restored.charges("records")]
    assert steps == [made.study.training.local_steps] * 2


def test_a_plan_that_a_restore_ended_has_ended_for_every_membership(tmp_path: Path) -> None:
    """Its lost rounds cost the patients whom all memberships share. Another membership of the same
    home joined the same plan, and the patients paid more than its lifetime allows."""
    state = tmp_path / "home"
    Ledger(state).declare("notes", ())
    Ledger(state).backup(tmp_path / "backup")
    pay(state, CHARGE, membership="onco")
    (state / "ledger.db").unlink()
    restored = Ledger.restore(state, tmp_path / "backup")
    assert [charge.membership for charge in restored.charges("notes")] == [EVERY]
    for plan in (CHARGE.study, f"{CHARGE.study}{QUERIES}"):
        with raises_only(BudgetExceeded, match=LACKS):
            check_none_lost(restored, plan)
        # Else a coordinator learns that the membership which it asks shares a ledger with another.
        with raises_only(BudgetExceeded, match="does not fit into the budget of this hospital"):
            check_none_lost(restored, plan, in_home=True)


def test_an_answer_under_way_at_a_backup_may_have_left(tmp_path: Path) -> None:
    """The backup has the round's charge, and not that its update was released. Twin: in a whole
    ledger the round has no answer."""
    state = tmp_path / "state"
    Ledger(state).declare("notes", ())
    number = Ledger(state).reserve("notes", CHARGE, "adapter", lambda charges: None)
    Ledger(state).backup(tmp_path / "backup")
    assert [each.released for each in Ledger(state).spending()] == [False]
    Ledger(state).release(number, b"update")
    (state / "ledger.db").unlink()
    restored = Ledger.restore(state, tmp_path / "backup")
    assert [each.released for each in restored.spending() if each.seq == number] == [True]


@pytest.mark.parametrize("named_by", ["charge", "signature", "log", "restore"])
def test_a_plan_that_a_restore_reads_of_is_no_new_one(tmp_path: Path, named_by: str) -> None:
    """The backup knows nothing of it; a row of the damaged database, or the step log, names it. It
    was answered as if it had run no step. Twin: a plan that nothing names is a new one."""
    state, early, paid = tmp_path / "state", tmp_path / "early.jsonl", replace(CHARGE, study="a")
    Ledger(state).declare("notes", ())
    pay(state, replace(CHARGE, study="known"))
    Ledger(state).backup(tmp_path / "backup")
    if named_by == "signature":
        Ledger(state).admit("a", "an officer")
    else:
        pay(state, paid)
    if named_by == "restore":
        (state / "ledger.db").unlink()
        Ledger.restore(state, tmp_path / "backup")
    shutil.copy(state / "steps.jsonl", early)
    if named_by in ("charge", "restore"):
        early.write_text(early.read_text().splitlines(keepends=True)[0])
    for round_ in (2, 3):
        pay(state, replace(paid, study="b", round=round_))
    with closing(sqlite3.connect(state / "ledger.db")) as database, database:
        newest = "(SELECT max(seq) FROM entries)"
        lost = f"seq = 1 OR seq > {newest} - 4" if named_by != "log" else "seq > 0"
        database.execute(f"DELETE FROM entries WHERE {lost}")
    shutil.copy(early, state / "steps.jsonl")
    restored = Ledger.restore(state, tmp_path / "backup")
    assert LOST in [charge.study for charge in restored.charges("notes")]
    assert restored.ended_plans == {"known", "a"}
    for plan in ("known", "a"):
        with raises_only(BudgetExceeded, match=LACKS):
            check_none_lost(restored, plan)
    with raises_nothing():
        check_none_lost(restored, "new")


@pytest.mark.parametrize("log", ["whole", "put-back"])
@pytest.mark.parametrize("longer", ["folder", "backup", "damaged"])
def test_what_stands_beside_the_base_is_charged_as_it_is(
    tmp_path: Path, longer: str, log: str
) -> None:
    """The folder was put back and went on, and a backup knows each round that was lost. One of the
    two chains was continued, and rounds of the other were charged as nobody's, or not at all. A
    receipt for any entry of either is for a charged one."""
    state, early, steps = tmp_path / "state", tmp_path / "early", tmp_path / "steps.jsonl"
    other, coordinator = replace(CHARGE, study="other"), SigningKey()
    Ledger(state).declare("notes", ())
    pay(state, CHARGE)
    shutil.copytree(state, early)
    receipts = []
    for round_ in (1, 2) if longer == "folder" else range(1, 7):
        pay(state, replace(other, round=round_))
        receipts.append(receipt(coordinator, Ledger(state).head_statement()))
    Ledger(state).backup(tmp_path / "backup")
    shutil.copy(state / "steps.jsonl", steps)
    shutil.rmtree(state)
    shutil.copytree(early, state)
    if log == "whole":
        shutil.copy(steps, state)
    for round_ in range(1, 6):
        pay(state, replace(CHARGE, round=round_))
        receipts.append(receipt(coordinator, Ledger(state).head_statement()))
    if longer == "damaged":
        with closing(sqlite3.connect(state / "ledger.db")) as database, database:
            database.execute("UPDATE entries SET body = '' WHERE seq = 2")
    restored = Ledger.restore(state, tmp_path / "backup")
    charged = Counter(charge.study for charge in restored.charges("notes"))
    assert charged[CHARGE.study] == 6 and charged["other"] == (2 if longer == "folder" else 6)
    assert charged.keys() == {CHARGE.study, "other"}  # nothing is counted twice
    assert restored.ended_plans == {CHARGE.study, "other"}
    with raises_nothing():
        for each in receipts:
            restored.accept_receipt(each, coordinator.public)


def test_an_adopted_ledgers_ended_plans_stay_ended(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.declare("notes", ())
    for plan in ("a plan", "another"):
        paid = replace(CHARGE, study=plan, membership="cardio")
        book.reserve("notes", paid, "adapter", lambda charges: None)
    lost = replace(CHARGE, study=LOST, membership="onco", adopted=True)
    book.enter_earlier("onco", [Earlier(EVERY, lost, "")], {}, [], "an officer", ["a plan"])
    assert book.ended_plans == {"a plan"}
    sent = {each.charge.study: each.released for each in book.spending()}
    assert sent == {"a plan": True, "another": False, LOST: True}


def test_an_adopted_restored_charge_needs_no_logged_steps(tmp_path: Path) -> None:
    """It is of whole rounds, of which the log may have fewer steps. Twin: a charge of a round."""
    book, log = Ledger(tmp_path), StepLog(tmp_path / "steps.jsonl")
    book.declare("notes", ())
    paid = replace(CHARGE, membership="onco", adopted=True)
    book.enter_earlier("onco", [Earlier(EVERY, paid, "")], {}, [], "an officer")
    with raises_nothing():
        check_all_logged(book, log, CHARGE.study, ["onco"])
    earlier = [Earlier(EVERY, paid, ""), Earlier("notes", paid, "adapter", "05" * 32)]
    book.enter_earlier("onco", earlier, {}, [], "an officer")
    with raises_only(LedgerError, match=LOG_LACKS):
        check_all_logged(book, log, CHARGE.study, ["onco"])


@pytest.mark.parametrize("rounds", [2, 0])
def test_an_adoption_remembers_which_plans_a_restore_had_ended(tmp_path: Path, rounds: int) -> None:
    """A plan that was signed and has no charge is known to the site's own ledger alone, which may
    have no charge of any plan."""
    write_notes(tmp_path / "notes.jsonl", [f"p{number}" for number in range(12)])
    spend(write_site(tmp_path, "cardio"), 3)
    file, state, backup = write_site(tmp_path, "onco"), tmp_path / "onco-state", tmp_path / "backup"
    book = spend(file, rounds)
    book.admit("a plan", "an officer")
    book.backup(backup)
    if rounds:
        lost = replace(CHARGE, study="a plan", round=9)
        book.reserve("records", lost, "adapter", lambda charges: None)
    (state / "ledger.db").unlink()
    restored = Ledger.restore(state, backup)
    ended = restored.ended_plans
    assert "a plan" in ended
    restored.accept("records", "an officer", "none was declared", declared=[EVERY])
    adopt(tmp_path / "home", tmp_path / "cardio.toml", "cardio")
    adopt(tmp_path / "home", file, "onco")
    home = Ledger(tmp_path / "home")
    assert home.ended_plans == ended
    home.backup(tmp_path / "home-backup")
    (tmp_path / "home" / "ledger.db").unlink()
    again = Ledger.restore(tmp_path / "home", tmp_path / "home-backup")
    assert again.ended_plans >= home.ended_plans


@pytest.mark.parametrize("when", ["plan", "order", "round", "repeat"])
def test_a_site_states_no_number_of_steps_that_is_too_small(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The step log was lost after three rounds: the fourth was signed as the first step."""
    notes(tmp_path)
    site, made = make_site(tmp_path, patient="who"), begun(tiny_base)
    worker = SiteWorker(site)
    worker.prepare(made.study, made.frozen)
    for round_ in (1, 2):
        trains(worker, made, round_)
    log = tmp_path / "state" / "steps.jsonl"
    if when == "round":
        monkeypatch.setattr(worker.log, "begin_round", lambda *_: log.unlink())
    else:
        log.unlink()
    with raises_only(LedgerError, match=f"{LOG_LACKS} 1, 2 of"):
        if when == "plan":
            SiteWorker(site).prepare(made.study, made.frozen)
        else:
            trains(worker, made, 2 if when == "repeat" else 3)
    paid = {"round": 3}.get(when, 2)
    spent = worker.ledger.spending()
    assert len(spent) == paid, "a round was charged for which there is no answer"
    assert sum(each.released for each in spent) == 2, "an answer was made"


def test_a_query_is_answered_only_if_the_log_has_all_steps(tmp_path: Path, tiny_base: Path) -> None:
    study = world(tmp_path, tiny_base, 60.0, policy=WILLING)
    path, made = study.parent / "site-north.toml", start(load_study(study))
    worker = SiteWorker(load_site(path), path)
    assert worker.prepare(made.study, made.frozen).admitted
    worker.evaluate(made.study.digest, 2, made.adapter)
    assert [bool(line.entry) for line in worker.log.attempts()] == [True]  # its charge is named
    (tmp_path / "state-north" / "steps.jsonl").unlink()
    with raises_only(LedgerError, match=f"{LOG_LACKS} 2 of"):
        worker.evaluate(made.study.digest, 3, made.adapter)
    assert len(worker.ledger.charges("held-out")) == 1


def test_a_round_that_was_interrupted_before_its_steps_ends_nothing(
    worker: SiteWorker, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger then has a charge that the log lacks, and no answer left the site."""
    made = begun(tiny_base)
    worker.prepare(made.study, made.frozen)
    trains(worker, made, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(worker.log, "begin_round", _interrupt)
        trains(worker, made, 2)
    assert len(worker.ledger.spending()) == 2
    with raises_nothing():
        trains(worker, made, 2)
        assert SiteWorker(worker.site).prepare(made.study, made.frozen).admitted


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_site_whose_step_log_is_gone_says_so_before_it_joins(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Twin: once the study is not under way any more, the site joins, for others."""
    notes(tmp_path)
    site, made = make_site(tmp_path, patient="who"), begun(tiny_base)
    worker = SiteWorker(site)
    worker.prepare(made.study, made.frozen)
    trains(worker, made, 1)
    with raises_nothing():
        check_before_joining(site)
    (tmp_path / "state" / "steps.jsonl").unlink()
    with raises_only(LedgerError, match=LOG_LACKS):
        check_before_joining(site)
    worker.finish(made.study.digest)
    with raises_nothing():
        check_before_joining(site)


def test_a_restore_says_which_studies_cannot_go_on(tmp_path: Path) -> None:
    write_notes(tmp_path / "notes.jsonl", ["p1", "p2"])
    file = write_site(tmp_path, "north")
    book, state = spend(file, 2), tmp_path / "north-state"
    paid = book.charges("records")[0]
    shutil.copytree(state, tmp_path / "copy")
    book.reserve("records", replace(paid, round=2), "adapter", lambda charges: None)
    for name in ("ledger.db", "steps.jsonl"):
        shutil.copy(tmp_path / "copy" / name, state / name)
    done = run("ledger", file, "--restore")
    assert done.exit_code == 0
    assert "get no further answer here, and others can begin: a study" in " ".join(
        done.output.split()
    )
    again = run("ledger", file, "--restore", "--from", tmp_path / "copy")
    assert "no further answer" in " ".join(again.output.split()), "a later restore forgot it"


def test_a_study_that_has_ended_needs_no_step_log(tmp_path: Path) -> None:
    """It gets no answer that would state its steps, and other studies go on."""
    write_notes(tmp_path / "notes.jsonl", ["p1", "p2"])
    file, state = write_site(tmp_path, "north"), tmp_path / "north-state"
    book = spend(file, 2)
    paid = book.charges("records")[0]
    (state / "studies").mkdir()
    running = json.dumps({"plan": paid.study, "study": paid.name})
    (state / "studies" / "1.json").write_text(running)
    for name in ("ledger.head", "steps.jsonl"):
        (state / name).unlink()
    with raises_only(LedgerError, match=r"ledger\.head: missing"):
        check_step_log(load_site(file))
    assert paid.study in Ledger.restore(state).ended_plans
    with raises_nothing():
        check_step_log(load_site(file))


def test_the_doctor_says_which_steps_are_missing(tmp_path: Path) -> None:
    """As the client does before it joins."""
    write_notes(tmp_path / "notes.jsonl", ["p1", "p2"])
    file, state = write_site(tmp_path, "south"), tmp_path / "south-state"
    paid = spend(file, 2).charges("records")[0]
    (state / "steps.jsonl").unlink()
    (state / "studies").mkdir()
    running = json.dumps({"plan": paid.study, "study": paid.name})
    (state / "studies" / "1.json").write_text(running)
    assert f"{LOG_LACKS} 0, 1 of" in " ".join(run("doctor", file).output.split())


def test_each_line_of_the_log_names_its_charge_and_the_order_of_it(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Of a round and of a query: by both a restore knows what was charged, and at which order."""
    study = world(tmp_path, tiny_base, 60.0, policy=WILLING)
    simulate(study, sorted(tmp_path.glob("site-*.toml")), tmp_path / "run")
    state = tmp_path / "state-north"
    charged = [*Ledger(state)._account.reserved.values()]
    lines = StepLog(state / "steps.jsonl").attempts()
    assert [(line.entry, line.order) for line in lines] == [
        (paid.hash, paid.charge.order) for paid in charged
    ]
    assert {paid.charge.study.endswith(QUERIES) for paid in charged} == {True, False}


@pytest.mark.parametrize("is_log_put_back", [False, True])
def test_a_log_that_is_newer_than_the_ledger_stops_the_site(
    tmp_path: Path, is_log_put_back: bool
) -> None:
    """Its database and anchor were put back; in a container without a home folder nothing else
    tells it. Twin: with a log of the same moment the site goes on, which the guarantee says."""
    state, plan = tmp_path / "state", CHARGE.study
    Ledger(state).declare("notes", ())
    pay(state, CHARGE)
    names = ["ledger.db", "ledger.head", *(["steps.jsonl"] if is_log_put_back else [])]
    (tmp_path / "copy").mkdir()
    for name in names:
        shutil.copy(state / name, tmp_path / "copy")
    pay(state, replace(CHARGE, round=2))
    for name in names:
        shutil.copy(tmp_path / "copy" / name, state)
    log = StepLog(state / "steps.jsonl")
    if is_log_put_back:
        with raises_nothing():
            check_all_logged(Ledger(state), log, plan, [""])
        return
    with raises_only(LedgerError, match="names charges that the ledger beside it lacks"):
        check_all_logged(Ledger(state), log, plan, [""])
    restored = Ledger.restore(state)
    assert [charge.steps for charge in restored.charges("notes")] == [CHARGE.steps] * 2
    with raises_nothing():
        check_all_logged(restored, log, plan, [""])


def test_a_hospital_does_not_charge_again_what_an_adopted_restore_had_charged(
    tmp_path: Path,
) -> None:
    """The step log that it takes over names entries that the adopted ledger lost, and charged."""
    write_notes(tmp_path / "notes.jsonl", [f"p{number}" for number in range(12)])
    file, state, home = write_site(tmp_path, "onco"), tmp_path / "onco-state", tmp_path / "home"
    spend(write_site(tmp_path, "cardio"), 0)
    spend(file, 0).backup(tmp_path / "backup")
    spend(file, 1)
    (state / "ledger.db").unlink()
    Ledger.restore(state, tmp_path / "backup").accept("records", "an officer", "", declared=[EVERY])
    adopt(home, tmp_path / "cardio.toml", "cardio")
    adopt(home, file, "onco")
    log, before = StepLog(home / "steps.jsonl"), Ledger(home).charges("records")
    assert sum(charge.steps for charge in before) == CHARGE.steps
    with raises_nothing():
        check_all_logged(Ledger(home), log, "a plan", ["onco"])
    Ledger(home).backup(tmp_path / "home-backup")
    (home / "ledger.db").unlink()
    restored = Ledger.restore(home, tmp_path / "home-backup")
    assert restored.charges("records") == before
