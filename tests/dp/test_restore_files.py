"""Which files a restore reads, which of two branches it continues, and in which order it prices."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import PolicyTable
from fedtune.core.dp.filter import best_order
from fedtune.core.dp.steplog import StepLog
from fedtune.core.ledger.entries import (
    EVERY,
    LOST,
    Earlier,
    are_kinds_known,
    orders_of,
    samples_first,
)
from fedtune.core.ledger.files import read_receipts, readable_receipts
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.ledger.restore import _readable_lines
from fedtune.core.ledger.spending import budget
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import receipt
from tests.client.adoption_kit import kill_at
from tests.dp.ledger_kit import charge, covers, run_round, total

OTHER = "sha256:" + "77" * 32


def begin(folder: Path) -> Ledger:
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    run_round(ledger, 1)
    return ledger


def take(source: Path, to: Path, *names: str) -> None:
    to.mkdir(exist_ok=True)
    for name in names:
        shutil.copy2(source / name, to / name)


def replace_folder(folder: Path, copy: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)


def receive(folder: Path, key: SigningKey) -> dict[str, Any]:
    return receipt(key, Ledger(folder).head_statement(coordinator=key.public))


@pytest.mark.parametrize("shows", ["ledger.head", "steps.jsonl", "ledger.receipt", None])
def test_a_copy_of_the_folder_is_read_with_its_anchor_receipts_and_log(
    folder: Path, tmp_path: Path, shows: str | None
) -> None:
    """The copy was made while a round was answered: its database alone lacks the round. The twin's
    other files were not copied, and nothing shows the round."""
    begin(folder)
    early, copy, coordinator = tmp_path / "early", tmp_path / "copy", SigningKey()
    shutil.copytree(folder, early)
    run_round(Ledger(folder), 2)
    take(folder, copy, "ledger.db", "salt")
    run_round(Ledger(folder), 3, done=charge(3, sigma=0.5))
    Ledger(folder).accept_receipt(receive(folder, coordinator), coordinator.public)
    if shows:
        take(folder, copy, shows)
    replace_folder(folder, early)
    restored = Ledger.restore(folder, copy)
    assert covers(total(restored), {1.0: 8, 0.5: 4}) is (shows is not None)
    assert total(restored)[1.0] == 8
    again = Ledger.restore(folder, copy)
    assert total(again) == total(restored)


@pytest.mark.parametrize("damage", ["its start", "its end", "one receipt"])
def test_receipts_that_can_be_read_in_a_damaged_file_are_charged(
    folder: Path, tmp_path: Path, damage: str
) -> None:
    begin(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    for round_ in (2, 3, 4):
        run_round(Ledger(folder), round_, done=charge(round_, sigma=0.5))
        one = SigningKey()
        Ledger(folder).accept_receipt(receive(folder, one), one.public)
    path, public = folder / "ledger.receipt", Ledger(folder).key.public
    whole = read_receipts(path, public)
    assert whole and {*readable_receipts(path, public).every} == {*whole.every}
    take(copy, folder, "ledger.db", "ledger.head", "steps.jsonl")
    content = path.read_bytes()
    one = whole.every[1].signature.encode()
    damaged = {"its start": content[1:], "its end": content[:-1]}
    path.write_bytes(damaged.get(damage, content.replace(one, one[::-1])))
    assert read_receipts(path, public) is None
    assert total(Ledger.restore(folder)) == {1.0: 4, 0.5: 12}


def test_lines_after_a_damaged_one_are_charged(folder: Path, tmp_path: Path) -> None:
    begin(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    for round_ in (2, 3, 4):
        run_round(Ledger(folder), round_, done=charge(round_, sigma=0.5))
    take(copy, folder, "ledger.db", "ledger.head")
    log = folder / "steps.jsonl"
    first, second, *later = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([first, second.replace(b"noise", b"n\x00\xffse"), *later]))
    assert total(Ledger.restore(folder)) == {1.0: 4, 0.5: 8}


def test_a_copy_of_an_adopted_log_is_charged_once(folder: Path, tmp_path: Path) -> None:
    """The home's log names the membership on each line, and the site's own, in the copy, does not.
    Twin: two memberships of the home have like lines."""
    ledger = begin(folder)
    ledger.backup(tmp_path / "copy")
    run_round(ledger, 2)
    shutil.copy(folder / "steps.jsonl", tmp_path / "copy" / "steps.jsonl")
    (folder / "steps.jsonl").unlink()
    StepLog(folder / "steps.jsonl", "onco").join(tmp_path / "copy" / "steps.jsonl")
    logs = [folder / "steps.jsonl", tmp_path / "copy" / "steps.jsonl"]
    assert [line.step.membership for line in _readable_lines(logs)] == ["onco", "onco"]
    StepLog(folder / "steps.jsonl", "cardio").join(tmp_path / "copy" / "steps.jsonl")
    assert len(_readable_lines(logs)) == 4
    (folder / "ledger.db").unlink()
    assert covers(total(Ledger.restore(folder, tmp_path / "copy")), {1.0: 8})


def test_a_line_that_is_there_twice_pays_for_no_other_round(folder: Path, tmp_path: Path) -> None:
    ledger = begin(folder)
    ledger.backup(tmp_path / "backup")
    run_round(ledger, 2)
    log = folder / "steps.jsonl"
    before = log.read_bytes()
    run_round(ledger, 3, done=charge(3, sigma=0.5))
    log.write_bytes(before + before.splitlines(keepends=True)[-1])
    (folder / "ledger.db").unlink()
    assert covers(total(Ledger.restore(folder, tmp_path / "backup")), {1.0: 8, 0.5: 4})


@pytest.mark.parametrize("withdrawals", [0, 1, 3, 30])
def test_which_branch_is_continued_depends_on_charges_alone(
    folder: Path, tmp_path: Path, withdrawals: int
) -> None:
    """And so does which of two disjoint datasets pays for the other branch's charges."""
    ledger = Ledger(folder)
    ledger.declare("notes", ["images"], "sha256:0", [b"ann"], keys=[b"ann"])
    ledger.declare("images", ["notes"], "sha256:1", [b"bob"], keys=[b"bob"])
    run_round(ledger, 1, "notes")
    run_round(ledger, 2, "images")
    early = shutil.copytree(folder, tmp_path / "early")
    run_round(ledger, 3, "notes", charge(3, sigma=0.7))
    for number in range(withdrawals):
        Ledger(folder).withdraw(b"w%d" % number)
    Ledger(folder).backup(tmp_path / "backup")
    replace_folder(folder, early)
    run_round(Ledger(folder), 4, "images", charge(4, study=OTHER))
    Ledger(folder).declare("images", None, None, (), columns=None)
    restored = Ledger.restore(folder, tmp_path / "backup")
    assert total(restored, "notes") == {1.0: 4, 0.7: 4}
    assert total(restored, "images") == {1.0: 8, 0.7: 4}
    assert len(restored.withdrawn()) == withdrawals


@pytest.mark.parametrize("withdrawals", [0, 1, 3, 30])
def test_marks_are_priced_in_an_order_that_tells_of_no_person(
    folder: Path, tmp_path: Path, withdrawals: int
) -> None:
    ledger = begin(folder)
    ledger.backup(tmp_path / "backup")
    run_round(ledger, 2)
    copy = shutil.copytree(folder, tmp_path / "copy")
    for number in range(withdrawals):
        Ledger(folder).withdraw(b"w%d" % number)
    anchor = json.loads((folder / "ledger.head").read_bytes())
    noted = {key: value for key, value in anchor.items() if "named" not in key}
    replace_folder(folder, copy)
    run_round(Ledger(folder), 3)
    for name in ("ledger.db", "steps.jsonl"):
        (folder / name).unlink()
    assert total(Ledger.restore(folder, tmp_path / "backup", None, noted)) == {1.0: 12}


def put_back_and_restore(folder: Path, tmp_path: Path, *, withdraws: bool = True) -> Path:
    """Run a study of its own and, if `withdraws`, withdraw a patient on a branch that is lost, and
    have a restore charge for it by a receipt. Return the last state of the lost branch."""
    coordinator = SigningKey()
    begin(folder)
    early = shutil.copytree(folder, tmp_path / "early")
    if withdraws:
        Ledger(folder).withdraw(b"bob")
    run_round(Ledger(folder), 2, done=charge(2, study=OTHER))
    late = receive(folder, coordinator)
    branch = shutil.copytree(folder, tmp_path / "branch")
    replace_folder(folder, early)
    with pytest.raises(LedgerError):
        Ledger(folder).accept_receipt(late, coordinator.public)
    assert total(Ledger.restore(folder)) == {1.0: 8}
    return branch


@pytest.mark.parametrize("withdraws", [True, False])
def test_a_backup_of_a_branch_that_was_charged_for_is_still_read(
    folder: Path, tmp_path: Path, withdraws: bool
) -> None:
    """The receipt did not tell who had withdrawn and which study had begun. Nothing is charged
    twice, and the same backup changes nothing when it is given again."""
    branch = put_back_and_restore(folder, tmp_path, withdraws=withdraws)
    Ledger(branch).backup(tmp_path / "backup")
    assert not Ledger(folder).withdrawn() and OTHER not in Ledger(folder).ended_plans
    restored = Ledger.restore(folder, tmp_path / "backup")
    assert len(restored.withdrawn()) == withdraws and OTHER in restored.ended_plans
    assert total(restored) == {1.0: 8}
    run_round(restored, 3, done=charge(3, study="sha256:" + "88" * 32))
    again = Ledger.restore(folder, tmp_path / "backup")
    assert total(again) == {1.0: 12} and len(again.ended_plans) == 2


def test_a_backup_that_charged_for_the_folders_branch_charges_nothing_twice(
    folder: Path, tmp_path: Path
) -> None:
    """The disk that was thought lost is found, and put in place."""
    branch = put_back_and_restore(folder, tmp_path)
    Ledger(folder).backup(tmp_path / "backup")
    replace_folder(folder, branch)
    restored = Ledger.restore(folder, tmp_path / "backup")
    assert total(restored) == {1.0: 8} and len(restored.withdrawn()) == 1
    assert OTHER in restored.ended_plans


@pytest.mark.parametrize("withdrawals", [0, 5, 30])
def test_a_receipt_of_a_branch_that_was_charged_for_hides_no_later_one(
    folder: Path, tmp_path: Path, withdrawals: int
) -> None:
    """It may have a higher number, by entries that people caused."""
    first, second = SigningKey(), SigningKey()
    begin(folder)
    early = shutil.copytree(folder, tmp_path / "early")
    run_round(Ledger(folder), 2)
    Ledger(folder).accept_receipt(receive(folder, first), first.public)
    run_round(Ledger(folder), 3)
    of_second = receive(folder, second)
    for number in range(withdrawals):
        Ledger(folder).withdraw(b"w%d" % number)
    of_first = receive(folder, first)  # asked once more for its round
    replace_folder(folder, early)
    Ledger.restore(folder)
    for given, key in ((of_second, second), (of_first, first)):
        with suppress(LedgerError):
            Ledger(folder).accept_receipt(given, key.public)
            continue
        Ledger.restore(folder).accept_receipt(given, key.public)
    copy = shutil.copytree(folder, tmp_path / "later")
    for round_ in (4, 5):
        run_round(Ledger(folder), round_, done=charge(round_, sigma=0.5))
        Ledger(folder).accept_receipt(receive(folder, first), first.public)
    take(copy, folder, "ledger.db", "ledger.head", "steps.jsonl")
    assert covers(total(Ledger.restore(folder)), {1.0: 12, 0.5: 8})


def test_what_is_priced_by_bounds_is_of_no_known_kind(folder: Path) -> None:
    """Else ε would fall with a loss: 400 steps at one σ and 40 at another become 440 of one kind,
    composed as if that kind had been chosen before the first step."""
    policy = PolicyTable(max_delta=1e-5, max_epsilon=8.0)
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    for round_, (sigma, steps) in enumerate([(1.0, 400), (0.98, 40)], 1):
        done = charge(round_, sigma=sigma, steps=steps, study=f"sha256:{round_:064d}")
        order = best_order(8.0, policy.delta)
        run_round(ledger, round_, done=replace(done, sampling_rate=0.02, order=order))
    before = budget("notes", ledger.spending("notes"), policy)
    for name in ("ledger.db", "steps.jsonl"):
        (folder / name).unlink()
    restored = Ledger.restore(folder)
    charges = restored.charges("notes")
    assert {one.study for one in charges} == {LOST} and not are_kinds_known(charges)
    after = budget("notes", restored.spending("notes"), policy)
    assert before.epsilon <= after.epsilon < 1.05 * before.epsilon and "PLD" not in after.how
    (folder / "ledger.db").unlink()  # the new anchor has the order, too
    again = Ledger.restore(folder)
    assert {one.order for one in again.charges("notes")} == {charges[0].order} != {2.0}


def test_a_charge_by_bounds_may_have_sampled_first_also_where_it_was_adopted() -> None:
    lost = replace(charge(1, study=LOST), sampling_rate=1.0, membership=EVERY)
    adopted = replace(lost, membership="onco", adopted=True)
    own = replace(charge(2), sampling_rate=1.0)
    assert samples_first([lost]) and samples_first([adopted]) and samples_first([own, adopted])
    assert not samples_first([own])


@pytest.mark.parametrize("kept", ["an anchor", "a backup's anchor", "a branch"])
def test_a_restored_charge_has_each_order_that_may_have_been_fixed(
    folder: Path, tmp_path: Path, kept: str
) -> None:
    """An adopted ledger had fixed an order of its own, perhaps before this one did. Restored at the
    order of the backup alone, ε fell from 54.0 to 3.34."""
    begin(folder)
    early = shutil.copytree(folder, tmp_path / "early")
    adopted = replace(charge(2), order=9.75, membership="onco", adopted=True)
    Ledger(folder).enter_earlier("onco", [Earlier("notes", adopted, "a")], {}, [], "an officer")
    assert orders_of(Ledger(folder).charges("notes")) == (8.0, 9.75)
    copy = shutil.copytree(folder, tmp_path / "copy")
    if kept == "an anchor":
        (folder / "ledger.db").unlink()
        restored = Ledger.restore(folder, early)
    else:
        take(early, copy, *(["ledger.db"] if kept == "a backup's anchor" else ["ledger.head"]))
        replace_folder(folder, early)
        restored = Ledger.restore(folder, copy)
    assert total(restored) == {1.0: 8} and orders_of(restored.charges("notes")) == (8.0, 9.75)
    (folder / "ledger.db").unlink()
    assert orders_of(Ledger.restore(folder).charges("notes")) == (8.0, 9.75)


def test_the_step_log_shows_the_order_of_a_charge_that_was_the_first(
    folder: Path, tmp_path: Path
) -> None:
    """The ledger was put back to before it, and another charge, at another order, came first."""
    Ledger(folder).declare("notes", [], "sha256:0", [b"ann"])
    empty = shutil.copytree(folder, tmp_path / "empty")
    run_round(Ledger(folder), 1, done=replace(charge(1), order=9.75))
    shutil.copy(folder / "steps.jsonl", tmp_path)
    replace_folder(folder, empty)
    run_round(Ledger(folder), 2)
    with (folder / "steps.jsonl").open("ab") as log:
        log.write((tmp_path / "steps.jsonl").read_bytes())
    restored = Ledger.restore(folder)
    assert total(restored) == {1.0: 8} and orders_of(restored.charges("notes")) == (8.0, 9.75)


def test_an_adopted_charge_of_a_restore_may_have_been_the_first(
    folder: Path, tmp_path: Path
) -> None:
    """The site says so of its own ledger, and the hospital that adopts it must not forget it."""
    restored = replace(charge(1), sampling_rate=0.5, order=9.75, membership="onco", adopted=True)
    own = replace(charge(2), sampling_rate=1.0)
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    run_round(ledger, 2, done=own)
    first = replace(restored, sampling_rate=1.0, order=8.0)
    earlier = [Earlier("notes", first, "a"), Earlier(EVERY, restored, "b")]
    ledger.enter_earlier("onco", earlier, {}, [], "an officer")
    charges = Ledger(folder).charges("notes")
    assert samples_first(charges) and orders_of(charges) == (8.0, 9.75)
    of_rounds = [replace(each, restored=False) for each in charges]
    assert not samples_first(of_rounds) and orders_of(of_rounds) == (8.0,)


def test_damaged_receipts_are_set_aside_once_they_are_charged_for(
    folder: Path, tmp_path: Path
) -> None:
    """A restore that is killed before leaves a ledger that does not open, and the next one reads
    them again. It had left one that opened without the rounds that they show."""
    begin(folder)
    early, coordinator = shutil.copytree(folder, tmp_path / "early"), SigningKey()
    for round_ in (2, 3):
        run_round(Ledger(folder), round_)
        Ledger(folder).accept_receipt(receive(folder, coordinator), coordinator.public)
    take(early, folder, "ledger.db", "ledger.head", "steps.jsonl")
    damaged = folder / "ledger.receipt"
    damaged.write_bytes(damaged.read_bytes() + b"{")
    whole, step, ended = shutil.copytree(folder, tmp_path / "whole"), 0, False
    while not ended:
        replace_folder(folder, whole)
        ended = kill_at(step, lambda: Ledger.restore(folder))
        with suppress(LedgerError):
            assert covers(total(Ledger(folder)), {1.0: 12}), f"killed before change {step}"
        assert covers(total(Ledger.restore(folder)), {1.0: 12}), f"killed before change {step}"
        step += 1
    assert list(folder.glob("ledger.receipt.lost-*")) and step > 10
