"""What is done to the ledger's files is noticed or charged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedtune.core.config import SiteTable
from fedtune.core.ledger import chain, files
from fedtune.core.ledger.files import SENT_IN_ALL, Costliest, Named, Paid, Sent, sealed_token
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.vault import studies
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.core.wire.seal import receipt
from tests.dp.ledger_kit import STUDY, charge, covers, run_round, total, yes


def sql(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "ledger.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def swap(folder: Path) -> None:
    sql(
        folder,
        "UPDATE entries SET seq = 1000 WHERE seq = 4",
        "UPDATE entries SET seq = 4 WHERE seq = 6",
        "UPDATE entries SET seq = 6 WHERE seq = 1000",
    )


def edit_body(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "ledger.db")) as connection, connection:
        ((body,),) = connection.execute("SELECT body FROM entries WHERE seq = 4")
        body = body.replace(b'"steps":4', b'"steps":1')
        connection.execute("UPDATE entries SET body = ? WHERE seq = 4", (body,))


def edit_and_rehash(folder: Path) -> None:
    """Everything that can be recomputed without the key."""
    with closing(sqlite3.connect(folder / "ledger.db")) as connection, connection:
        rows = list(connection.execute("SELECT seq, kind, body FROM entries ORDER BY seq"))
        prev = chain.START
        for seq, kind, body in rows:
            body = body.replace(b'"steps":4', b'"steps":1')
            hash_ = chain.entry_hash(prev, kind, body)
            connection.execute(
                "UPDATE entries SET body = ?, prev = ?, hash = ? WHERE seq = ?",
                (body, prev, hash_, seq),
            )
            prev = hash_


def other_key(folder: Path) -> None:
    (folder / "site.key").unlink()
    SigningKey.at(folder / "site.key")


TAMPER: dict[str, Callable[[Path], None]] = {
    "body edited": edit_body,
    "body edited, chain recomputed": edit_and_rehash,
    "row deleted in the middle": lambda f: sql(f, "DELETE FROM entries WHERE seq = 4"),
    "newest row deleted": lambda f: sql(
        f, "DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)"
    ),
    "first row deleted": lambda f: sql(f, "DELETE FROM entries WHERE seq = 0"),
    "all rows deleted": lambda f: sql(f, "DELETE FROM entries"),
    "table dropped": lambda f: sql(f, "DROP TABLE entries"),
    "rows swapped": swap,
    "rows renumbered": lambda f: sql(f, "UPDATE entries SET seq = seq + 1 WHERE seq = 11"),
    "kind edited": lambda f: sql(f, "UPDATE entries SET kind = 'note' WHERE seq = 2"),
    "newest signature edited": lambda f: sql(f, "UPDATE entries SET signature = '00'"),
    "a member removed": lambda f: sql(
        f, "DELETE FROM members WHERE hash = (SELECT min(hash) FROM members)"
    ),
    "a member added": lambda f: sql(f, "INSERT INTO members VALUES (x'00', 'notes')"),
    "database deleted": lambda f: (f / "ledger.db").unlink(),
    "database emptied": lambda f: (f / "ledger.db").write_bytes(b""),
    "database overwritten": lambda f: (f / "ledger.db").write_bytes(os.urandom(8192)),
    "anchor deleted": lambda f: (f / "ledger.head").unlink(),
    "anchor emptied": lambda f: (f / "ledger.head").write_bytes(b""),
    "anchor edited": lambda f: (f / "ledger.head").write_bytes(
        (f / "ledger.head").read_bytes().replace(b'"seq":11', b'"seq":10')
    ),
    "key deleted": lambda f: (f / "site.key").unlink(),
    "another key": other_key,
    "salt deleted": lambda f: (f / "salt").unlink(),
    "another salt": lambda f: (f / "salt").write_bytes(os.urandom(32)),
    "salt torn": lambda f: (f / "salt").write_bytes(b"short"),
    "all but the step log deleted": lambda f: [  # type: ignore[dict-item,return-value]
        p.unlink() for p in f.iterdir() if p.is_file() and p.name != "steps.jsonl"
    ],
    "all but the outbox deleted": lambda f: [  # type: ignore[dict-item,return-value]
        p.unlink() for p in f.iterdir() if p.is_file()
    ],
}


@pytest.mark.parametrize("how", TAMPER)
def test_what_is_done_to_the_files_is_noticed(used: Ledger, folder: Path, how: str) -> None:
    assert used.head.seq == 11
    TAMPER[how](folder)
    with pytest.raises(LedgerError) as caught:
        Ledger(folder)
    assert caught.value.exit_code == 4
    assert "to do: " in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "salt", "says"),
    [("open", 32, "another salt"), ("note", 32, "does not begin a ledger")],
)
def test_a_first_entry_is_refused_for_what_it_is(
    used: Ledger, kind: str, salt: int, says: str
) -> None:
    """Not for another key, which nobody would find."""
    first = chain.Entry(0, kind, chain.first_body(used.key.public, os.urandom(salt)), "hash")
    with pytest.raises(LedgerError, match=says):
        chain.check_first(used.folder, first, used.key.public, os.urandom(salt))


@pytest.mark.parametrize(
    "how", [how for how in TAMPER if how.startswith(("newest", "anchor", "database", "all"))]
)
def test_a_running_process_notices_before_it_charges(used: Ledger, folder: Path, how: str) -> None:
    TAMPER[how](folder)
    with pytest.raises(LedgerError):
        used.reserve("notes", charge(6), "adapter 6", yes)


def contents(*folders: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for each in folders for p in each.rglob("*") if p.is_file()}


def newer(folder: Path) -> None:
    """As the next release would leave it, with a charge that this one cannot price."""
    sql(folder, f"PRAGMA user_version = {chain.FORMAT + 1}")


def test_a_ledger_of_a_newer_release_is_refused_whole(
    used: Ledger, folder: Path, tmp_path: Path
) -> None:
    """By a process that starts, one that runs, and one that would restore over it."""
    used.backup(tmp_path / "copy", key=True)
    newer(folder)
    before = contents(folder)
    for attempt in (
        lambda: Ledger(folder),
        lambda: used.reserve("notes", charge(6), "adapter 6", yes),
        lambda: Ledger.restore(folder, None),
        lambda: Ledger.restore(folder, tmp_path / "copy"),
    ):
        with pytest.raises(LedgerError, match=r"by a newer fedtune \(format 3\).*upgrade"):
            attempt()
        assert contents(folder) == before
    newer(tmp_path / "copy")
    sql(folder, f"PRAGMA user_version = {chain.FORMAT}")
    with pytest.raises(LedgerError, match="written by a newer fedtune"):
        Ledger.restore(folder, tmp_path / "copy")
    assert Ledger(folder).head == used.head


def test_without_its_number_a_newer_ledger_would_be_charged(
    used: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin."""
    newer(folder)
    monkeypatch.setattr(chain, "FORMAT", chain.FORMAT + 1)
    assert Ledger(folder).reserve("notes", charge(6), "adapter 6", yes) == 12


def test_a_ledger_from_before_there_were_formats_is_read(used: Ledger, folder: Path) -> None:
    sql(folder, "PRAGMA user_version = 0")
    assert Ledger(folder).head == used.head
    with closing(chain.connect(folder / "ledger.db")) as connection:
        found = list(connection.execute("PRAGMA user_version"))
    assert found == [(chain.FORMAT,)]  # an older release is told


def test_a_flipped_bit_in_the_number_locks_nobody_out(used: Ledger, folder: Path) -> None:
    sql(folder, "PRAGMA user_version = 65537")
    assert Ledger(folder).head == used.head


def test_an_entry_of_an_unknown_kind_is_not_passed_over(used: Ledger, folder: Path) -> None:
    """A newer release that forgot to raise the format."""
    with pytest.raises(LedgerError, match="is not understood"), used._store.writing() as writer:
        writer.append("charge twice", {})
    with pytest.raises(LedgerError, match="use the version of fedtune that wrote it"):
        Ledger(folder)


def test_an_edited_older_signature_is_found_by_verify(used: Ledger, folder: Path) -> None:
    used.verify()
    sql(folder, "UPDATE entries SET signature = '00' WHERE seq = 4")
    with pytest.raises(LedgerError, match="entry 4 is not signed"):
        used.verify()


def test_a_file_torn_anywhere_is_noticed_or_whole(used: Ledger, folder: Path) -> None:
    whole = (folder / "ledger.db").read_bytes()
    sizes = {*range(0, len(whole), 509), *range(0, len(whole), 4096), len(whole) - 1}
    noticed = 0
    for size in sorted(sizes):
        (folder / "ledger.db").write_bytes(whole[:size])
        try:  # a missing zero at the end is read as a zero
            assert len(Ledger(folder).charges("notes")) == 5
        except LedgerError:
            noticed += 1
    assert noticed >= len(sizes) - 2
    for at in range(0, len(whole), 997):  # a sector of zeros
        torn = whole[:at] + bytes(512) + whole[at + 512 :]
        (folder / "ledger.db").write_bytes(torn[: len(whole)])
        with suppress(LedgerError):
            assert len(Ledger(folder).charges("notes")) == 5


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def put_back(copy: Path, folder: Path, *names: str) -> None:
    for name in names or [p.name for p in copy.iterdir() if p.is_file()]:
        shutil.copy2(copy / name, folder / name)


def test_rolling_back_the_database_alone_is_noticed(
    ledger: Ledger, folder: Path, tmp_path: Path
) -> None:
    run_round(ledger, 1)
    copy = copy_of(folder, tmp_path / "copy")
    run_round(ledger, 2)
    put_back(copy, folder, "ledger.db")
    with pytest.raises(LedgerError, match=r"rolled back.*--restore"):
        Ledger(folder)


def test_rolling_back_everything_is_noticed_by_the_receipt_and_stays_so(
    ledger: Ledger, folder: Path, tmp_path: Path
) -> None:
    coordinator = SigningKey()
    run_round(ledger, 1)
    ledger.accept_receipt(receipt(coordinator, ledger.head_statement()), coordinator.public)
    copy = copy_of(folder, tmp_path / "copy")
    run_round(ledger, 2)
    late = receipt(coordinator, ledger.head_statement())
    shutil.rmtree(folder)
    copy_of(copy, folder)
    back = Ledger(folder)  # nothing local can tell
    run_round(back, 2)
    with pytest.raises(LedgerError, match="the coordinator holds a receipt for entry 5"):
        back.accept_receipt(late, coordinator.public)
    with pytest.raises(LedgerError, match="rolled back"):
        back.reserve("notes", charge(3), "adapter 3", yes)
    with pytest.raises(LedgerError, match="rolled back"):
        Ledger(folder)
    restored = Ledger.restore(folder)
    restored.accept_receipt(late, coordinator.public)  # paid for by now
    run_round(restored, 3)
    # True total: rounds 1 to 3, and round 2 of the branch that was rolled away.
    assert covers(total(restored), {1.0: 16})
    assert not covers({1.0: 12}, {1.0: 16})  # what it would be without the restore's charge


def test_a_receipt_that_is_not_this_sites_is_refused_and_forgotten(used: Ledger) -> None:
    coordinator, stranger = SigningKey(), SigningKey()
    good = receipt(coordinator, used.head_statement())
    signed = stranger.sign(canonical({"ledger_seq": 99, "ledger_hash": "00" * 32}))
    counts = Paid()._asdict() | Costliest()._asdict()
    statement = {"seq": 99, "hash": "00" * 32, "signature": signed, **counts}
    foreign = {"token": sealed_token(stranger, statement)}
    inside = {"token": sealed_token(used.key, statement)}  # ours to read, another's to sign
    cut = {"token": str(good["token"])[:-2]}
    for bad in (
        {},
        good | {"token": "00"},
        good | cut,
        receipt(coordinator, cut),
        receipt(coordinator, inside),
        good | {"countersignature": "00"},
        good | {"coordinator": stranger.public},
        receipt(stranger, used.head_statement()),
        receipt(coordinator, foreign),
    ):
        with pytest.raises(LedgerError, match="not one for this site"):
            used.accept_receipt(bad, coordinator.public)
    assert used.accept_receipt(good, coordinator.public) == ""
    noted = receipt(coordinator, used.head_statement("41:" + "a" * 64))
    assert used.accept_receipt(noted, coordinator.public) == "41:" + "a" * 64
    used.reserve("notes", charge(6), "adapter 6", yes)


def test_a_head_statement_tells_the_coordinator_nothing(used: Ledger) -> None:
    one, same = used.head_statement(), used.head_statement()
    used.withdraw(b"somebody")
    after = used.head_statement("41:" + "a" * 64)
    assert set(one) == {"token"} and len({str(x) for x in (one, same, after)}) == 3
    assert len({len(x["token"]) for x in (one, same, after)}) == 1
    assert used.head.hash not in str(after)


def kept(ledger: Ledger) -> list[int]:
    """The rounds whose updates can be sent again."""
    return sorted(int(path.name.split("-")[1]) for path in (ledger.folder / "outbox").iterdir())


@pytest.mark.parametrize("has_space", [True, False])
def test_of_each_study_the_newest_update_alone_is_sent_again_whatever_the_disk_has(
    used: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch, has_space: bool
) -> None:
    """An earlier round asked for again is charged again: an update's length, which a plan chooses,
    is no rod for the space that is free. Another study's update stays."""
    other = "sha256:" + "9" * 64
    monkeypatch.setattr(used, "_room", SimpleNamespace(has_space=lambda _: has_space))
    number = used.reserve("notes", replace(charge(1), study=other), "adapter 1", yes)
    used.release(number, b"of another study")
    newest = run_round(used, 6)
    assert used.released(STUDY, 6, "adapter 6") == newest
    assert [used.released(STUDY, n, f"adapter {n}") for n in range(1, 6)] == [None] * 5
    assert used.released(other, 1, "adapter 1") == b"of another study"
    assert kept(used) == ([1, 6] if has_space else [])
    run_round(used, 4)
    assert used.released(STUDY, 6, "adapter 6") is None, "released before it, and no longer newest"
    assert len(used.charges("notes")) == 8
    used.verify()


def test_an_altered_receipt_file_is_noticed(used: Ledger, folder: Path) -> None:
    coordinator = SigningKey()
    used.accept_receipt(receipt(coordinator, used.head_statement()), coordinator.public)
    path = folder / "ledger.receipt"
    path.write_bytes(path.read_bytes().replace(b'"seq":11', b'"seq":1'))
    with pytest.raises(LedgerError, match=r"ledger\.receipt: cut short, edited"):
        Ledger(folder)


@pytest.mark.parametrize("twin", [False, True])
def test_receipts_that_were_moved_away_are_missed(
    used: Ledger, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twin: bool
) -> None:
    """As by somebody who reads that they are damaged, so that a rollback is forgotten: until they
    are put back, or the ledger is restored. The twin does not note that there were any."""
    if twin:
        monkeypatch.setattr(chain, "mark_receipts", lambda *_: None)
    coordinator = SigningKey()
    used.accept_receipt(receipt(coordinator, used.head_statement()), coordinator.public)
    path = folder / "ledger.receipt"
    path.rename(tmp_path / "aside")
    if twin:
        assert Ledger(folder).head.seq > 0
        return
    with pytest.raises(LedgerError, match=r"ledger\.receipt: missing"):
        used.reserve("notes", charge(9), "adapter", yes)
    (tmp_path / "aside").rename(path)
    used.backup(tmp_path / "backup")
    Ledger(folder)
    path.unlink()
    Ledger.restore(folder)
    Ledger(folder).verify()
    (folder / "ledger.db").unlink()
    Ledger.restore(folder, tmp_path / "backup").verify()


@pytest.mark.parametrize("noted", ["with the receipt", "after a crash", "never"])
def test_a_first_receipt_that_shows_a_rollback_is_missed_too(
    ledger: Ledger, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: str
) -> None:
    """It is refused, and with it all that is written in its transaction; but not that it came.
    Twin: this is never noted, and the site goes on without the charge once the file is gone."""
    coordinator = SigningKey()
    copy = copy_of(folder, tmp_path / "copy")
    run_round(ledger, 1)
    late = receipt(coordinator, ledger.head_statement())
    shutil.rmtree(folder)
    copy_of(copy, folder)
    with monkeypatch.context() as patch:
        if noted != "with the receipt":
            patch.setattr(chain, "mark_receipts", lambda *_: None)
        with pytest.raises(LedgerError, match="rolled back"):
            Ledger(folder).accept_receipt(late, coordinator.public)
    if noted == "after a crash":
        with pytest.raises(LedgerError, match="rolled back"):
            Ledger(folder)
    (folder / "ledger.receipt").unlink()
    if noted == "never":
        assert not Ledger(folder).charges("notes")
        return
    with pytest.raises(LedgerError, match=r"ledger\.receipt: missing"):
        Ledger(folder)


def test_a_crash_between_entry_and_anchor_is_repaired(
    ledger: Ledger, folder: Path, tmp_path: Path
) -> None:
    copy = copy_of(folder, tmp_path / "copy")
    ledger.reserve("notes", charge(), "adapter", yes)
    put_back(copy, folder, "ledger.head")
    assert len(Ledger(folder).charges("notes")) == 1
    assert json.loads((folder / "ledger.head").read_bytes())["seq"] == 2


def test_an_interrupted_first_opening_is_finished(folder: Path) -> None:
    folder.mkdir()
    (folder / "ledger.new").touch()
    for made in ("site.key", "salt", "ledger.db"):
        if made == "site.key":
            SigningKey.at(folder / made)
        else:
            (folder / made).write_bytes(os.urandom(32) if made == "salt" else b"")
        trial = folder.with_name(f"at {made}")
        shutil.copytree(folder, trial)
        assert Ledger(trial).head.seq == 0
        assert not (trial / "ledger.new").exists()


# Two adapters whose slots have the same first 12 digits of a sha256, found by 26 million tries.
ALIKE = [f"sha256:{hashlib.sha256(b'adapter %d' % n).hexdigest()}" for n in (12425849, 17971068)]


def test_what_a_coordinator_chose_to_be_called_alike_has_two_names(tmp_path: Path) -> None:
    """Of slots, in the outbox, among plans and studies. Twin: by fewer digits they have one."""
    plan = "sha256:" + "1" * 64
    one, other = ((plan, 1, adapter) for adapter in ALIKE)
    assert files.name_of(one) != files.name_of(other)
    assert files.name_of(one)[:12] == files.name_of(other)[:12]
    ledger = Ledger(tmp_path)
    pair = [f"sha256:{'ab' * 8}{n * 48}" for n in "cd"]
    assert files.outbox_prefix(pair[0]) == files.outbox_prefix(pair[1])
    assert ledger.path_of((plan, 1, pair[0])) != ledger.path_of((plan, 1, pair[1]))
    assert ledger.path_of((pair[0], 1, plan)) != ledger.path_of((pair[1], 1, plan))
    table = SiteTable(name="a", declared_size=200, state=tmp_path)
    assert table.plan_file(pair[0]) != table.plan_file(pair[1])
    assert studies._path(tmp_path, pair[0]) != studies._path(tmp_path, pair[1])


def test_a_file_of_an_earlier_release_keeps_its_name(tmp_path: Path) -> None:
    ledger, slot = Ledger(tmp_path), ("sha256:" + "1" * 64, 3, ALIKE[0])
    new = ledger.path_of(slot)
    old = new.with_name(f"{'1' * 16}-3-{ALIKE[0].removeprefix('sha256:')[:16]}.bin")
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"update")
    assert ledger.path_of(slot) == old
    new.write_bytes(b"update")
    assert ledger.path_of(slot) == new


def test_the_anchor_names_no_more_heads_however_many_coordinators_there_were() -> None:
    """Each simulation is a coordinator with a key of its own."""
    named = Named()
    for number in range(2 * SENT_IN_ALL):
        named = named.with_sent(Sent(f"coordinator {number}", "", number, "hash"))
    assert [head.seq for head in named.sent] == [*range(SENT_IN_ALL, 2 * SENT_IN_ALL)]
    twice = named.with_sent(Sent(f"coordinator {SENT_IN_ALL}", "", 2 * SENT_IN_ALL, "hash"))
    assert [each.seq for each in twice.sent if each[0] == f"coordinator {SENT_IN_ALL}"] == [
        SENT_IN_ALL, 2 * SENT_IN_ALL
    ]  # fmt: skip
