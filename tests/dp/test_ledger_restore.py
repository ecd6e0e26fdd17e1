"""Several processes at one ledger, and a ledger that comes back from a backup."""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedtune.core.ledger import declared, restore
from fedtune.core.ledger.account import NOT_PRIVATE
from fedtune.core.ledger.files import salt_at
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import receipt
from tests.dp import chaos
from tests.dp.ledger_kit import charge, covers, run_round, total, yes
from tests.forks import Fork


def racing(folder: Path, mode: str, processes: int, ceiling: int) -> int:
    """How many reservations succeeded under a ceiling of `ceiling` charges."""
    won = [folder.with_name(f"{folder.name}-won-{at}") for at in range(processes)]

    def work(told: Path) -> None:
        if mode == "open":
            Ledger(folder)
        done = 0 if mode == "open" else chaos.race(folder, ceiling, locked=mode == "race")
        told.write_text(str(done))

    children = [Fork(partial(work, told)) for told in won]
    assert [child.wait(60) for child in children] == [0] * processes
    return sum(int(told.read_text()) for told in won)


def test_two_processes_reserve_exactly_what_is_affordable(ledger: Ledger, folder: Path) -> None:
    assert racing(folder, "race", 2, ceiling=7) == 7
    assert len(Ledger(folder).charges("notes")) == 7


def test_two_processes_that_check_outside_the_lock_are_caught(ledger: Ledger, folder: Path) -> None:
    """The twin: the ceiling looked at first and the charge made afterwards. Two processes that look
    before either charges go past an odd ceiling."""
    assert racing(folder, "race-unlocked", 2, ceiling=7) == 8


def test_threads_share_one_ledger(ledger: Ledger) -> None:
    def spend() -> None:
        for round_ in range(3):
            ledger.reserve("notes", charge(round_), "adapter", yes)

    threads = [threading.Thread(target=spend) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledger.charges("notes")) == 9
    ledger.verify()


def test_two_processes_open_a_new_folder_at_once(folder: Path) -> None:
    racing(folder, "open", 3, ceiling=0)
    assert Ledger(folder).head.seq == 0


@pytest.mark.parametrize("make", [salt_at, SigningKey.at])
def test_the_first_of_two_processes_makes_the_secret(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object]
) -> None:
    """Both have seen that there is none; the second must take the first's and not replace it."""
    make(folder / "secret")
    first = (folder / "secret").read_bytes()
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    second = make(folder / "secret")
    assert (folder / "secret").read_bytes() == first
    assert (
        second == first
        or getattr(second, "public", None) == SigningKey.at(folder / "secret").public
    )
    assert [path.name for path in folder.iterdir()] == ["secret"]


def lose(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


LOSSES: dict[str, tuple[str, ...]] = {
    "database": ("ledger.db",),
    "database and anchor": ("ledger.db", "ledger.head"),
    "database and step log": ("ledger.db", "steps.jsonl"),
    "all but the key": ("ledger.db", "ledger.head", "ledger.receipt", "steps.jsonl", "salt"),
    "anchor": ("ledger.head",),
    "anchor and step log": ("ledger.head", "steps.jsonl"),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backed_up", ["none", "after round 2"])
def test_a_restored_ledger_charges_at_least_what_was_spent(
    ledger: Ledger, folder: Path, tmp_path: Path, loss: str, backed_up: str
) -> None:
    run_round(ledger, 1)
    run_round(ledger, 2)
    ledger.backup(tmp_path / "backup")
    run_round(ledger, 3)
    ledger.reserve("notes", charge(4), "adapter 4", yes)  # a crash: paid, not run
    run_round(ledger, 4)
    truth = total(ledger)
    assert truth == {1.0: 20}
    if loss == "database and anchor":
        truth = {
            1.0: 16
        }  # that a round was paid for and not run is known from nothing that is left
    lose(folder, *LOSSES[loss])
    with pytest.raises(LedgerError, match="--restore"):
        Ledger(folder)
    restored = Ledger.restore(folder, tmp_path / "backup" if backed_up != "none" else None)
    assert covers(total(restored), truth)
    assert Ledger(folder).charges("notes") == restored.charges("notes")
    restored.verify()
    if restored.frozen:  # no first entry says that the salt is the ledger's
        assert backed_up == "none"
        restored.lift("an officer", "nobody withdrew")
    restored.declare("notes", [], "sha256:0", [b"ann", b"bob"])
    before = total(restored)
    run_round(restored, 5)
    assert covers(total(restored), before)


def test_a_restore_is_no_more_than_needed_where_the_records_are_there(
    ledger: Ledger, folder: Path, tmp_path: Path
) -> None:
    run_round(ledger, 1)
    ledger.backup(tmp_path / "backup")
    run_round(ledger, 2)
    lose(folder, "ledger.db")
    restored = Ledger.restore(folder, tmp_path / "backup")
    # Two entries were lost, a charge and a release: the step log explains the charge.
    assert total(restored) == {1.0: 8}


def test_a_costlier_study_that_was_lost_is_charged_at_its_own_cost(
    ledger: Ledger, folder: Path, tmp_path: Path
) -> None:
    run_round(ledger, 1)
    ledger.backup(tmp_path / "backup")
    costly = charge(1, sigma=0.5, study="sha256:" + "c0" * 32, steps=9)
    run_round(ledger, 7, done=costly)
    truth = total(ledger)
    lose(folder, "ledger.db", "ledger.head")
    assert covers(total(Ledger.restore(folder, tmp_path / "backup")), truth)


def test_a_restore_that_forgets_the_losses_is_caught(
    ledger: Ledger, folder: Path, tmp_path: Path
) -> None:
    """The twin: a backup put in place as it is."""
    run_round(ledger, 1)
    ledger.backup(tmp_path / "backup")
    run_round(ledger, 2)
    truth = total(ledger)
    lose(folder, "ledger.db", "ledger.head")
    shutil.copy2(tmp_path / "backup" / "ledger.db", folder / "ledger.db")
    with pytest.raises(LedgerError, match=r"ledger\.head: missing"):
        Ledger(folder)
    assert not covers({1.0: 4}, truth)


def test_a_ledger_whose_declared_members_were_edited_is_restored(
    ledger: Ledger, folder: Path
) -> None:
    """They are checked when a ledger is opened: a restore that keeps them is none."""
    run_round(ledger, 1)
    truth = total(ledger)
    declared.declare(ledger, "open", "public", [{b"a record"}])
    with closing(sqlite3.connect(folder / "ledger.db")) as database, database:
        database.execute("DELETE FROM members WHERE dataset = ?", (NOT_PRIVATE + "open",))
    with pytest.raises(LedgerError, match="were edited"):
        Ledger(folder)
    opens = True
    try:
        restored = Ledger.restore(folder)
    except LedgerError:
        opens = False
    assert opens, "what was put in its place does not open either"
    assert covers(total(restored), truth)


def test_a_backup_is_consistent_private_and_named(used: Ledger, tmp_path: Path) -> None:
    used.backup(tmp_path / "a")
    used.backup(tmp_path / "b", key=True)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"ledger.db", "salt"}
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"ledger.db", "salt", "site.key"}
    assert all(p.stat().st_mode & 0o077 == 0 for p in tmp_path.glob("[ab]/*"))
    with pytest.raises(LedgerError, match="already there"):
        used.backup(tmp_path / "a")


def test_a_machine_that_died_comes_back_exhausted_from_a_backup_with_the_key(
    used: Ledger, folder: Path, tmp_path: Path
) -> None:
    used.backup(tmp_path / "backup", key=True)
    shutil.rmtree(folder)
    assert total(Ledger.restore(folder, tmp_path / "backup")) == {0.0: math.inf}


def test_what_cannot_be_a_backup_is_refused(used: Ledger, folder: Path, tmp_path: Path) -> None:
    stranger = Ledger(tmp_path / "stranger")
    stranger.backup(tmp_path / "theirs")
    for wrong in (tmp_path / "theirs", tmp_path / "nowhere"):
        with pytest.raises(LedgerError, match="not a whole backup of this site"):
            Ledger.restore(folder, wrong)
    lose(folder, "site.key")
    with pytest.raises(LedgerError, match="key is lost"):
        Ledger.restore(folder)
    assert (folder / "ledger.db").exists()


def test_restoring_twice_still_covers(used: Ledger, folder: Path, tmp_path: Path) -> None:
    used.backup(tmp_path / "backup")
    run_round(used, 6)
    truth = total(used)
    for _ in range(2):
        lose(folder, "ledger.db")
        restored = Ledger.restore(folder, tmp_path / "backup")
        assert covers(total(restored), truth)
        truth = total(restored)


def grown(folder: Path, entries: int) -> None:
    """Entries as the ledger itself writes them, in one transaction."""
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    body = {"dataset": "notes", "charge": vars(charge()), "adapter": "a" * 64}
    with ledger._store.writing() as writer:
        for _ in range(entries):
            writer.append("reserve", body)


@pytest.mark.parametrize("entries", [2_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_a_long_ledger_opens_in_seconds(folder: Path, entries: int) -> None:
    grown(folder, entries)
    start = time.process_time()
    assert len(Ledger(folder).charges("notes")) == entries
    assert time.process_time() - start < 10


class Killed(KeyboardInterrupt):
    """The process ends here."""


def interrupt(patch: pytest.MonkeyPatch, at: int) -> None:
    """Have a restore end before its change number `at` of the folder it restores, counted from
    0 on."""
    left = [at]

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def change(*given: object, **named: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return call(*given, **named)

        return change

    places = SimpleNamespace(**vars(os))
    places.replace, places.link = counted(os.replace), counted(os.link)
    patch.setattr(restore, "os", places)
    patch.setattr(restore, "replace", counted(restore.replace))


INTERRUPTED = {
    **{name: LOSSES[name] for name in ("database", "anchor", "all but the key")},
    "database, and the step log was rolled back": ("ledger.db", "steps.jsonl"),
    "database, and the receipts are damaged": ("ledger.db", "ledger.receipt"),
}


@pytest.mark.parametrize("loss", INTERRUPTED)
def test_a_restore_that_is_interrupted_and_begun_again_charges_no_less(
    ledger: Ledger, folder: Path, tmp_path: Path, loss: str
) -> None:
    run_round(ledger, 1)
    ledger.backup(tmp_path / "backup")
    early = (folder / "steps.jsonl").read_bytes()
    for round_ in (2, 3):
        run_round(ledger, round_)
    lose(folder, *INTERRUPTED[loss])
    if "rolled back" in loss:
        (folder / "steps.jsonl").write_bytes(early)
    if "damaged" in loss:
        (folder / "ledger.receipt").write_bytes(b"{")
    shutil.copytree(folder, tmp_path / "calm")
    expected = total(Ledger.restore(tmp_path / "calm", tmp_path / "backup"))
    for at in range(20):
        struck = shutil.copytree(folder, tmp_path / f"struck-{at}")
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, at)
            try:
                Ledger.restore(struck, tmp_path / "backup")
            except Killed:
                pass
            else:
                break
        again = Ledger.restore(struck, tmp_path / "backup")
        assert covers(total(again), expected), at
        # Nor does it exhaust a budget: it is begun again with the old anchor, or with the new one.
        assert (math.inf in total(again).values()) is (math.inf in expected.values()), at
        again.verify()
    assert 3 <= at < 19


@pytest.mark.parametrize("lost", ["rounds", "receipts", "nothing"])
def test_a_restore_that_charges_says_that_entries_were_lost(folder: Path, lost: str) -> None:
    """Database and anchor were put back and the step log was not, so the chain looks whole. Or the
    receipts are gone, which might say that it is not. Twin: a ledger that is whole lost nothing."""
    ledger, coordinator = Ledger(folder), SigningKey()
    ledger.declare("notes", ())
    run_round(ledger, 1)
    ledger.accept_receipt(receipt(coordinator, ledger.head_statement()), coordinator.public)
    early = {name: (folder / name).read_bytes() for name in ("ledger.db", "ledger.head")}
    run_round(ledger, 2)
    del ledger
    if lost == "rounds":
        for name, content in early.items():
            (folder / name).write_bytes(content)
    elif lost == "receipts":
        (folder / "ledger.receipt").unlink()
    restored = Ledger.restore(folder, None)
    assert bool(restored.members_lost) == (lost != "nothing")
    assert bool(restored.ended_plans) == (lost != "nothing")
    assert total(restored) == {1.0: 8}


@pytest.mark.parametrize("withdrew", [False, True])
def test_a_withdrawal_after_the_backup_does_not_decide_what_a_restore_ends(
    folder: Path, tmp_path: Path, withdrew: bool
) -> None:
    """The ledger is whole, and the backup is its own. A coordinator sees which studies end."""
    ledger = Ledger(folder)
    ledger.declare("notes", ())
    run_round(ledger, 1)
    ledger.backup(tmp_path / "backup")
    if withdrew:
        ledger.withdraw(b"a patient")
    restored = Ledger.restore(folder, tmp_path / "backup")
    assert not restored.members_lost and not restored.ended_plans


def test_a_row_beyond_the_base_shows_that_the_branches_parted(folder: Path, tmp_path: Path) -> None:
    """The folder was put back and went on; of its rows only the last ones can be read, and the
    anchor counts what the backup of the other branch lacks."""
    Ledger(folder).declare("notes", ())
    run_round(Ledger(folder), 1)
    shutil.copytree(folder, tmp_path / "early")
    for round_ in (2, 3, 4):
        run_round(Ledger(folder), round_)
    Ledger(folder).backup(tmp_path / "backup")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "early", folder)
    Ledger(folder).withdraw(b"a patient")
    for round_ in range(2, 8):  # for three of them the backup's charges pay, as it seems
        run_round(Ledger(folder), round_)
    with closing(sqlite3.connect(tmp_path / "backup" / "ledger.db")) as database:
        ((base,),) = database.execute("SELECT max(seq) FROM entries")
    with closing(sqlite3.connect(folder / "ledger.db")) as database, database:
        database.execute("DELETE FROM entries WHERE seq <= ?", (base,))
    restored = Ledger.restore(folder, tmp_path / "backup")
    assert covers(total(restored), {1.0: 40})
