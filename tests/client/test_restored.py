"""What people decided at a site, after its ledger was restored from a backup of before."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import load_site
from fedtune.core.data.records import unit_member
from fedtune.core.errors import NotGenuine
from fedtune.core.ledger import restore as restore_module
from fedtune.core.ledger.audit_log import AuditLog, verify
from fedtune.core.ledger.entries import Standing
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.wire.keys import SigningKey
from fedtune.officer import freeze as officer
from fedtune.officer.let_go import decide
from fedtune.officer.withdraw import withdraw
from tests.cli_kit import run
from tests.client.adoption_kit import hashes_of, kill_at, make_site, spend, write_notes
from tests.client.airlock_kit import a_site


def damaged(folder: Path) -> Path:
    """Lay out a site with a backup; since then p3 withdrew, a person froze the ledger, and its
    database was lost. Return the site file."""
    folder.mkdir()
    write_notes(folder / "notes.jsonl", ["p1", "p2", "p3"])
    file = make_site(folder, "north")
    book, site = spend(file, 2), load_site(file)
    book.backup(folder / "backup")
    withdraw(site, "p3", book)
    officer.freeze(site, "a leak")
    (site.home / "ledger.db").unlink()
    return file


def restore(file: Path) -> int:
    done = run("ledger", file, "--restore", "--from", file.parent / "backup")
    return done.exit_code


def check_kept(file: Path) -> None:
    book = Ledger(load_site(file).home)
    book.verify()
    assert set(book.withdrawn()) == hashes_of(book, ["p3"]), "somebody who withdrew is in again"
    assert book.frozen, "what a person froze goes on"


def test_a_restore_that_is_killed_anywhere_keeps_who_withdrew_and_the_freeze(
    tmp_path: Path,
) -> None:
    """Whenever the ledger opens, it has both; and so it does once the restore was run again."""
    opened, step, ended = 0, 0, False
    while not ended:
        file = damaged(tmp_path / str(step))
        ended = kill_at(step, partial(restore, file))
        try:
            Ledger(load_site(file).home)
        except LedgerError:
            assert not ended
        else:
            opened += 1
            check_kept(file)
        assert restore(file) == 0
        check_kept(file)
        step += 1
    assert 1 < opened < step


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [(b"freeze", b"frieze", 0), (b"}\n", b"}", 0), (b"}\n", b"}\n\0\0\n", 2)],
    ids=["changed", "cut short", "not an entry at its end"],
)
def test_a_damaged_audit_log_counts_as_frozen_before_the_ledger_opens(
    tmp_path: Path, old: bytes, new: bytes, code: int
) -> None:
    """The command ends with 2 where nothing can be added to the log, which is after all of this."""
    file = damaged(tmp_path / "site")
    log = load_site(file).home / "audit.jsonl"
    before, found, after = log.read_bytes().rpartition(old)
    log.write_bytes(before + new + after)
    assert found and restore(file) == code
    check_kept(file)


def test_nobody_enters_anything_while_a_ledger_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be in neither ledger. Who waited meanwhile is refused."""
    book = Ledger(tmp_path / "state")
    book.backup(tmp_path / "backup")
    waiting = sqlite3.connect(book.folder / "ledger.db", timeout=0, isolation_level=None)

    def standing(public: str) -> Standing:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            waiting.execute("BEGIN IMMEDIATE")
        return Standing({}, None)

    Ledger.restore(book.folder, tmp_path / "backup", standing)
    with monkeypatch.context() as patch:
        patch.setattr("fedtune.core.ledger.chain.connect", lambda path, **_: waiting)
        with pytest.raises(LedgerError):
            book.freeze("an officer", "too late for the ledger as it was")
    book.freeze("an officer", "again")
    assert Ledger(book.folder).frozen


def test_a_lift_that_is_killed_anywhere_is_entered_before_the_papers_say_so(tmp_path: Path) -> None:
    """Else a restore from a copy of before the freeze thaws a ledger that nobody lifted."""
    write_notes(tmp_path / "notes.jsonl", ["p1"])
    file = make_site(tmp_path, "north")
    spend(file, 1)
    site, step, ended = load_site(file), 0, False
    while not ended:
        officer.freeze(site, "a leak")
        ended = kill_at(step, partial(officer.lift, site, "it was none"))
        book = Ledger(site.home)
        kept = officer.read_decisions(site.home, book.key.public).frozen
        assert kept or not book.frozen, f"killed at step {step}: a restore would thaw it"
        step += 1
    assert not book.frozen and not kept and step > 3


def test_a_ledger_that_lost_its_salt_is_frozen_until_patients_withdrew_again(
    tmp_path: Path,
) -> None:
    """Their hashes are under the old salt, and match nobody any more. It is frozen if nobody
    withdrew, too: a coordinator that is told of the freeze must not learn whether somebody did."""
    for withdrawn in ([], ["p3"]):
        folder = tmp_path / f"{len(withdrawn)}"
        folder.mkdir()
        write_notes(folder / "notes.jsonl", ["p1", "p2", "p3"])
        file = make_site(folder, "north")
        spend(file, 2, withdrawn=withdrawn)
        home = load_site(file).home
        if withdrawn:
            officer.freeze(load_site(file), "a leak")
        (home / "salt").unlink()
        done = run("ledger", file, "--restore")
        book = Ledger(home)
        assert done.exit_code == 0 and book.frozen, "frozen only if somebody withdrew"
        hidden = "a freeze that nobody lifted" not in book.frozen.why
        assert hidden is not bool(withdrawn), "the incident's is hidden"
        assert "entered again" not in done.output
    assert "1 who withdrew are known by hashes" in done.output
    withdraw(load_site(file), "p3", book)
    assert hashes_of(book, ["p3"]) <= set(book.withdrawn())
    assert run("ledger", file, "--lift").exit_code == 0


@pytest.mark.parametrize(
    ("how", "gone"),
    [
        *((how, "") for how in ("another", "killed", "damaged-again")),
        *(("an-older-copy", gone) for gone in ("ledger.db", "salt")),
    ],
)
def test_only_a_first_entry_shows_that_a_salt_is_the_ledgers(
    tmp_path: Path, how: str, gone: str
) -> None:
    """32 bytes may be another site's, or those of a restore that was killed; the freeze of a first
    restore holds after a second one; and a copy may be older than the salt."""
    write_notes(tmp_path / "notes.jsonl", ["p1", "p2", "p3"])
    file = make_site(tmp_path, "north")
    book = spend(file, 2, withdrawn=["p3"])
    home, copy = load_site(file).home, tmp_path / "copy"
    book.backup(copy)
    words: list[Any] = ["ledger", file, "--restore"]
    if how in ("another", "killed"):
        (home / "salt").write_bytes(bytes(32))
    else:
        (home / "salt").unlink()
    if how == "killed":
        (home / "ledger.db").write_bytes(b"x" * 9000)
    assert run(*words).exit_code == 0 and Ledger(home).frozen
    if how == "damaged-again":  # but for its first entry
        with closing(sqlite3.connect(home / "ledger.db")) as ledger:
            ledger.execute("UPDATE entries SET body = '{}' WHERE kind = 'restore'")
            ledger.commit()
        assert run(*words).exit_code == 0
    if how == "an-older-copy":
        assert run("ledger", file, "--lift").exit_code == 0
        withdraw(load_site(file), "p2", Ledger(home))
        (home / gone).unlink()
        assert run(*words, "--from", copy).exit_code == 0
        assert not hashes_of(Ledger(home), ["p2"]) & set(Ledger(home).withdrawn())
    assert Ledger(home).frozen


def test_an_answer_that_was_refused_for_good_stays_refused(tmp_path: Path, tiny_base: Path) -> None:
    """The audit log beside the ledger knows it. Twin: without the log nothing does."""
    for keeps_log in (True, False):
        (tmp_path / str(keeps_log)).mkdir()
        asked = a_site(tmp_path / str(keeps_log), tiny_base)
        copy, state = tmp_path / f"{keeps_log}-copy", asked.site.site.state
        asked.worker.ledger.backup(copy)
        asked.train()
        decide(asked.site, [], refuse=True, every=True)
        asked.restart()
        (state / "ledger.db").unlink()
        if not keeps_log:
            for name in ("audit.jsonl", "audit.lock"):
                (state / name).unlink()
        assert run("ledger", asked.path, "--restore", "--from", copy).exit_code == 0
        assert len(asked.worker.ledger._account.refused) == keeps_log


def test_a_freeze_that_is_killed_anywhere_is_known_to_a_restore_or_is_none(tmp_path: Path) -> None:
    """Wherever the ledger is frozen, the papers beside it say so."""
    write_notes(tmp_path / "notes.jsonl", ["p1"])
    file = make_site(tmp_path, "north")
    spend(file, 1)
    site, step, ended = load_site(file), 0, False
    while not ended:
        ended = kill_at(step, partial(officer.freeze, site, "a leak"))
        book = Ledger(site.home)
        kept = officer.read_decisions(site.home, book.key.public).frozen
        assert kept or not book.frozen, f"killed at step {step}: a restore would thaw it"
        step += 1
    assert book.frozen and step > 3


def test_a_damaged_audit_log_keeps_nobody_from_freezing_or_withdrawing(tmp_path: Path) -> None:
    """And both stand after a restore from a backup of before."""
    write_notes(tmp_path / "notes.jsonl", ["p1", "p3"])
    file = make_site(tmp_path, "north")
    book = spend(file, 1)
    book.backup(tmp_path / "backup")
    log = book.folder / "audit.jsonl"
    log.write_bytes(log.read_bytes() + b"\0\0\n")
    assert run("ledger", file, "--freeze").exit_code == 2
    with pytest.raises(NotGenuine):
        withdraw(load_site(file), "p3", book)
    check_kept(file)
    (book.folder / "ledger.db").unlink()
    assert restore(file) == 2
    check_kept(file)


@pytest.mark.parametrize("how", ["away", "away, then an act", "away, then lifted", "twin"])
def test_a_damaged_audit_log_that_was_moved_away_counts_as_frozen_too(
    tmp_path: Path, how: str
) -> None:
    """Also once a new log was begun in its place, unless a person lifted a freeze since then. Twin:
    with audit.lock moved away as well, nothing tells of a log."""
    file = damaged(tmp_path / "site")
    site = load_site(file)
    key = SigningKey.at(site.home / "site.key")
    for name in ("audit.jsonl", *(["audit.lock"] if how == "twin" else [])):
        (site.home / name).rename(tmp_path / name)
    if how != "away":
        AuditLog(site.home, key).add("purge", files=1)
    if how == "away, then lifted":
        AuditLog(site.home, key).add(officer.LIFT, "--lift")
    is_frozen = how in ("away", "away, then an act")
    assert restore(file) == 0
    book = Ledger(site.home)
    assert (book.frozen is not None) == is_frozen
    events = [entry["event"] for entry in verify(site.home, key.public).entries]
    assert (events[0] == "cut") == (how != "twin") and "restore" in events


def damage(home: Path, kind: str) -> None:
    """Damage the ledger's newest entry of a kind, so that the chain ends before it."""
    with closing(sqlite3.connect(home / "ledger.db")) as ledger:
        ledger.execute("UPDATE entries SET body = '{}' WHERE kind = ?", (kind,))
        ledger.commit()


@pytest.mark.parametrize("lost", ["a reservation", "salt", "twin"])
def test_a_restore_keeps_the_decisions_that_can_still_be_read(tmp_path: Path, lost: str) -> None:
    """Although the receipts and the audit log are gone. The twin's rows are not signed by the
    site, and nobody is taken to have withdrawn by them."""
    write_notes(tmp_path / "notes.jsonl", ["p1", "p2", "p3"])
    file = make_site(tmp_path, "north")
    book, site = spend(file, 2), load_site(file)
    home, slot = site.home, ("sha256:" + "5" * 64, 3, "adapter")
    book.backup(tmp_path / "backup")
    withdraw(site, "p3", book)
    book.refuse(slot, "an officer")
    book.freeze("an officer", "a leak")
    before = set(book.withdrawn())
    shutil.rmtree(home / "withdrawals")
    for name in ("audit.jsonl", "audit.lock"):
        (home / name).unlink()
    if lost == "salt":
        (home / "salt").unlink()
    else:
        damage(home, "reserve")
    if lost == "twin":
        with closing(sqlite3.connect(home / "ledger.db")) as ledger:
            ledger.execute("UPDATE entries SET signature = replace(signature, 'a', 'b')")
            ledger.commit()
    copy = [] if lost == "salt" else ["--from", tmp_path / "backup"]
    assert run("ledger", file, "--restore", *copy).exit_code == 0
    restored = Ledger(home)
    is_kept = lost != "twin"
    assert set(restored.withdrawn()) == (before if is_kept else set())
    assert restored.is_refused(slot) == is_kept and (restored.frozen is not None) == is_kept
    if is_kept:
        assert restored.frozen and "a leak" in restored.frozen.why
        assert ("old one alone" in restored.frozen.why) == (lost == "salt")


def test_a_page_that_cannot_be_read_hides_no_decision_after_it(tmp_path: Path) -> None:
    """A page amid the entries is overwritten: those before it and after it are read."""
    patients = [f"p{number}" for number in range(60)]
    write_notes(tmp_path / "notes.jsonl", patients)
    file = make_site(tmp_path, "north")
    book = spend(file, 12)
    book.backup(tmp_path / "backup")
    for patient in patients[:30]:
        book.withdraw(unit_member(patient))
    path = book.folder / "ledger.db"
    content = bytearray(path.read_bytes())
    middle = len(content) // 4096 // 2 * 4096
    content[middle : middle + 4096] = b"x" * 4096
    path.write_bytes(content)
    kept = len(restore_module._readable_rows(path))
    assert restore(file) == 0
    restored = Ledger(book.folder)
    restored.verify()
    assert 0 < len(restored.withdrawn()) <= 30 and kept > 30


@pytest.mark.parametrize("damaged", [(0.3, 0.7), (0.3, 1.0)])
def test_what_lies_between_two_damaged_pages_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: tuple[float, float]
) -> None:
    """Also where the last page is one of them: the highest number known elsewhere then says how far
    to look. A row to which somebody gave a number beyond all others does not keep the search
    running. The twin reads from both ends alone, and loses the withdrawals between."""
    patients = [f"p{number}" for number in range(60)]
    write_notes(tmp_path / "notes.jsonl", patients)
    book = spend(make_site(tmp_path, "north"), 2)
    for patient in patients:
        book.withdraw(unit_member(patient))
    path = book.folder / "ledger.db"
    top = book.head.seq
    with closing(sqlite3.connect(path)) as ledger:
        signed = dict(ledger.execute("SELECT seq, signature FROM entries").fetchall())
        if damaged[1] < 1:
            ledger.execute("INSERT INTO entries VALUES (?, '', '', '', '', '')", (2**60,))
            ledger.commit()
        ledger.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    for part in damaged:
        at = content.index(signed[round(part * top)].encode()) // 4096 * 4096
        content[at : at + 4096] = b"x" * 4096
    path.write_bytes(content)
    monkeypatch.setattr(restore_module, "MOST_PROBED", 0)
    from_both_ends = {row[0] for row in restore_module._readable_rows(path, top)}
    monkeypatch.setattr(restore_module, "MOST_PROBED", 1000)
    read = {row[0] for row in restore_module._readable_rows(path, top)}
    assert from_both_ends < read and len(read) > top / 2


def test_a_restore_that_is_killed_anywhere_has_its_freeze_in_the_papers(tmp_path: Path) -> None:
    """Else a second restore, from a copy of before, thaws the ledger that the first one froze."""
    step, ended = 0, False
    while not ended:
        folder = tmp_path / str(step)
        folder.mkdir()
        write_notes(folder / "notes.jsonl", ["p1", "p2", "p3"])
        file = make_site(folder, "north")
        book = spend(file, 2, withdrawn=["p3"])
        home, public = load_site(file).home, book.key.public
        book.backup(folder / "backup")
        (home / "salt").unlink()
        ended = kill_at(step, partial(run, "ledger", file, "--restore"))
        try:
            is_frozen = Ledger(home).frozen is not None
        except LedgerError:
            assert not ended
        else:
            kept = officer.read_decisions(home, public).frozen
            assert kept or not is_frozen, f"killed at step {step}: a later restore would thaw it"
        step += 1
    assert is_frozen and kept and step > 3


def test_a_restore_that_is_killed_anywhere_knows_that_the_salt_was_another(tmp_path: Path) -> None:
    """The backup has an earlier salt, and nothing of the database can be read. Who withdrew since
    is known by hashes under the other salt, which a person has to be told."""
    step, ended = 0, False
    while not ended:
        folder = tmp_path / str(step)
        folder.mkdir()
        write_notes(folder / "notes.jsonl", ["p1", "p2", "p3"])
        file = make_site(folder, "north")
        home = spend(file, 2).folder
        Ledger(home).backup(folder / "backup")
        (home / "salt").write_bytes(bytes(32))
        (home / "ledger.db").write_bytes(b"no database")
        ended = kill_at(step, partial(restore, file))
        if not ended:
            assert restore(file) == 0
        frozen = Ledger(home).frozen
        assert frozen and frozen.why.startswith(restore_module.SALT_LOST), f"killed at step {step}"
        step += 1
    assert step > 3
