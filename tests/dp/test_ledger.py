"""The ledger charges before training, and what is done to its files is noticed or charged."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.dp.accountant import Steps
from fedtune.dp.steplog import Step, StepLog
from fedtune.errors import BudgetExceeded
from fedtune.ledger import chain
from fedtune.ledger.entries import RULES, Charge
from fedtune.ledger.files import Head, Receipt, ReceiptLog, sealed_token
from fedtune.ledger.ledger import Ledger, LedgerError
from fedtune.wire.keys import SigningKey, canonical
from fedtune.wire.seal import receipt

STUDY = "sha256:" + "5d" * 32
CHAOS = Path(__file__).with_name("chaos.py")


def charge(round_: int = 1, sigma: float = 1.0, study: str = STUDY, steps: int = 4) -> Charge:
    return Charge(study, "s", round_, sigma, 0.1, steps, 1, 1.0, "record", "first", 8.0)


def yes(charges: list[Charge]) -> None:
    """A permit that allows everything."""


def run_round(
    ledger: Ledger, round_: int, dataset: str = "notes", done: Charge | None = None
) -> bytes:
    """Reserve, write the step log as training does, release."""
    done = done or charge(round_)
    number = ledger.reserve(dataset, done, f"adapter {round_}", yes)
    log = StepLog(ledger.folder / "steps.jsonl")
    for _ in range(done.steps):
        log.append(
            Step(
                done.study,
                done.round,
                done.noise_multiplier,
                done.sampling_rate,
                done.max_grad_norm,
                done.unit,
                done.records,
            )
        )
    body = os.urandom(64)
    ledger.release(number, body)
    return body


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ledgers to copy: `new`, with one dataset declared, and `used`, with five rounds released."""
    models = tmp_path_factory.mktemp("models")
    Ledger(models / "new").declare("notes", [], "sha256:0", [b"ann", b"bob"])
    shutil.copytree(models / "new", models / "used")
    for round_ in range(1, 6):
        run_round(Ledger(models / "used"), round_)
    return models


@pytest.fixture
def ledger(folder: Path, models: Path) -> Ledger:
    shutil.copytree(models / "new", folder)
    return Ledger(folder)


@pytest.fixture
def used(folder: Path, models: Path) -> Ledger:
    shutil.copytree(models / "used", folder)
    return Ledger(folder)


def sql(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "ledger.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def total(ledger: Ledger, dataset: str = "notes") -> dict[float, float]:
    """Steps by σ; infinite once a charge without noise is among them."""
    spent: dict[float, float] = {}
    for one in ledger.charges(dataset):
        if one.noise_multiplier == 0:
            return {0.0: math.inf}
        spent[one.noise_multiplier] = spent.get(one.noise_multiplier, 0) + one.steps
    return spent


def covers(restored: dict[float, float], truth: dict[float, float]) -> bool:
    """Whether at every σ at least as many steps with that σ or less are charged."""
    if math.inf in restored.values():
        return True

    def up_to(spent: dict[float, float], sigma: float) -> float:
        return sum(steps for s, steps in spent.items() if s <= sigma)

    return all(up_to(restored, sigma) >= up_to(truth, sigma) for sigma in truth)


# ------------------------------------------------------------------------------- what is charged


def test_a_reservation_counts_before_it_is_released_and_after_a_restart(
    ledger: Ledger, folder: Path
) -> None:
    ledger.reserve("notes", charge(), "adapter", yes)
    assert ledger.charges("notes") == [charge()] == Ledger(folder).charges("notes")
    assert ledger.charges("notes")[0].event == Steps(1.0, 0.1, 4, 1)


def test_permit_sees_what_was_spent_and_its_refusal_charges_nothing(used: Ledger) -> None:
    seen: list[int] = []

    def no(charges: list[Charge]) -> None:
        seen.append(len(charges))
        raise BudgetExceeded("the ceiling")

    before = used.head
    with pytest.raises(BudgetExceeded):
        used.reserve("notes", charge(6), "adapter", no)
    assert (seen, used.head, len(used.charges("notes"))) == ([5], before, 5)


def test_the_same_bytes_are_sent_again_and_a_round_is_released_once(
    ledger: Ledger, folder: Path
) -> None:
    assert ledger.released(STUDY, 1, "adapter 1") is None
    body = run_round(ledger, 1)
    assert ledger.released(STUDY, 1, "adapter 1") == body
    assert Ledger(folder).released(STUDY, 1, "adapter 1") == body
    assert ledger.released(STUDY, 1, "another adapter") is None
    assert ledger.released(STUDY, 2, "adapter 1") is None
    again = ledger.reserve("notes", charge(1), "adapter 1", yes)
    with pytest.raises(LedgerError, match="released by another process"):
        ledger.release(again, b"other noise, same round")
    assert ledger.released(STUDY, 1, "adapter 1") == body
    assert len(ledger.charges("notes")) == 2


def test_a_crash_before_the_release_is_paid_twice(ledger: Ledger, folder: Path) -> None:
    ledger.reserve("notes", charge(), "adapter 1", yes)
    after = Ledger(folder)
    assert after.released(STUDY, 1, "adapter 1") is None
    run_round(after, 1)
    assert len(after.charges("notes")) == 2
    assert [s.released for s in after.spending("notes")] == [False, True]


@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_an_update_that_is_not_as_released_is_paid_again_not_sent(
    used: Ledger, damage: str
) -> None:
    (path,) = (used.folder / "outbox").glob("*-3-*.bin")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"other" if damage == "altered" else path.read_bytes()[:-1])
    assert used.released(STUDY, 3, "adapter 3") is None
    body = run_round(used, 3)
    assert used.released(STUDY, 3, "adapter 3") == body
    assert len(used.charges("notes")) == 6


def test_a_reservation_is_released_once_and_only_if_it_exists(ledger: Ledger) -> None:
    number = ledger.reserve("notes", charge(), "adapter", yes)
    with pytest.raises(LedgerError, match="not an open reservation"):
        ledger.release(number + 1, b"")
    ledger.release(number, b"body")
    with pytest.raises(LedgerError, match="not an open reservation"):
        ledger.release(number, b"body")


def test_files_are_for_this_user_alone(used: Ledger) -> None:
    files = [p for p in used.folder.rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {"ledger.db", "salt", "site.key", "ledger.head"}
    assert all(p.stat().st_mode & 0o077 == 0 for p in files)
    assert used.folder.stat().st_mode & 0o077 == 0


# ------------------------------------------------------------------------------------- datasets


def test_datasets_compose_unless_they_are_declared_disjoint_by_either(ledger: Ledger) -> None:
    run_round(ledger, 1)
    ledger.declare("letters", [], "sha256:1", [b"cem"])
    ledger.declare("scans", ["notes"], "sha256:2", [b"dan"])
    assert len(ledger.charges("letters")) == 1
    assert len(ledger.charges("scans")) == 0
    run_round(ledger, 2, "scans")
    assert len(ledger.charges("notes")) == 1  # the declaration of scans counts for both
    assert len(ledger.charges("letters")) == 2


@pytest.mark.parametrize("members", [[b"eve"], [b"eve", b"bob"]])
def test_what_counts_against_whom_follows_from_declarations_alone(
    ledger: Ledger, members: list[bytes]
) -> None:
    """Were it to follow from a shared text, the answer to a plan would tell that it is shared. Who
    is in both datasets is left out of the later one."""
    run_round(ledger, 1)
    ledger.declare("fresh", ["notes"], "sha256:9", members)
    assert ledger.charges("fresh") == []
    assert [ledger.elsewhere("fresh")(key) for key in (b"ann", b"bob", b"eve")] == [1, 1, 0]
    assert ledger.overlap("fresh", "notes") == len(members) - 1  # for a person at the site


def test_what_was_spent_before_two_datasets_were_told_apart_counts_against_both(
    ledger: Ledger, folder: Path
) -> None:
    ledger.declare("scans", [], "sha256:2", [b"ann"])
    run_round(ledger, 1)
    ledger.declare("scans", ["notes"], "sha256:2", [b"ann"])
    run_round(ledger, 2)
    for book in (ledger, Ledger(folder)):
        assert [charge.round for charge in book.charges("scans")] == [1]
        assert book.elsewhere("scans")(b"ann") and book.elsewhere("notes")(b"ann")
    ledger.declare("scans", [], "sha256:2", [b"ann"])
    assert [charge.round for charge in ledger.charges("scans")] == [1, 2]


def test_a_declaration_of_what_is_disjoint_keeps_content_and_cohort(ledger: Ledger) -> None:
    ledger.declare("notes", [], "sha256:7", [b"ann"], cohort="second")
    before = ledger.head
    ledger.declare("notes", [])
    assert ledger.head == before
    ledger.declare("notes", ["scans"])
    assert ledger._account.declared["notes"]["content"] == "sha256:7"
    assert ledger._account.declared["notes"]["cohort"] == "second"


@pytest.mark.parametrize(
    ("charged", "unit", "unknown"),
    [
        ({}, "patient", False),
        ({"unit": "record"}, "patient", True),
        ({}, "record", True),
        ({"rules": RULES - 1}, "patient", True),
    ],
)
def test_a_cost_that_nobody_knows_is_unknown_until_somebody_accepts_it(
    ledger: Ledger, folder: Path, charged: dict[str, Any], unit: str, unknown: bool
) -> None:
    one = replace(charge(), **{"unit": "patient"} | charged)
    ledger.reserve("notes", one, "adapter", yes)
    assert [spent.charge for spent in ledger.unknown("notes", unit)] == [one] * unknown
    ledger.accept("notes", "officer", "the file never changed")
    for book in (ledger, Ledger(folder)):
        assert book.unknown("notes", unit) == [] and book.charges("notes") == [one]
    ledger.reserve("notes", one, "other", yes)
    assert len(ledger.unknown("notes", unit)) == unknown  # what comes after is not accepted


def test_a_charge_without_rules_is_an_earlier_releases(ledger: Ledger) -> None:
    body = asdict(charge())
    del body["rules"]
    assert Charge.read(body).rules == RULES - 1 and Charge.read(asdict(charge())) == charge()


def test_one_more_record_does_not_reset_the_budget(ledger: Ledger) -> None:
    run_round(ledger, 1)
    ledger.declare("notes", [], "sha256:other", [b"ann", b"bob", b"cem"])
    assert len(ledger.charges("notes")) == 1


def test_a_member_that_left_the_data_is_still_kept_out_of_the_other(ledger: Ledger) -> None:
    run_round(ledger, 1)
    ledger.declare("notes", [], "sha256:less", [b"ann"])
    ledger.declare("fresh", ["notes"], "sha256:9", [b"eve"])
    assert ledger.elsewhere("fresh")(b"bob")


def test_a_withdrawn_disjointness_counts_from_then_on(ledger: Ledger) -> None:
    run_round(ledger, 1)
    ledger.declare("scans", ["notes"], "sha256:2", [b"dan"])
    assert len(ledger.charges("scans")) == 0
    ledger.declare("scans", [], "sha256:2", [b"dan"])
    assert len(ledger.charges("scans")) == 1


def test_a_charge_must_also_fit_the_neighbours_it_counts_against(ledger: Ledger) -> None:
    # east and west are disjoint; notes may share patients with both, so both count against it.
    ledger.declare("east", ["west"], "sha256:1", [b"e"])
    ledger.declare("west", ["east"], "sha256:2", [b"w"])

    def two(charges: list[Charge]) -> None:
        if len(charges) >= 2:
            raise BudgetExceeded("two rounds at most")

    ledger.reserve("east", charge(1), "a", two)
    ledger.reserve("west", charge(1), "a", two)
    assert (len(ledger.charges("east")), len(ledger.charges("notes"))) == (1, 2)
    with pytest.raises(BudgetExceeded):  # east alone has one; a patient of notes could have three
        ledger.reserve("east", charge(2), "a", two)


def test_declaring_again_writes_nothing(ledger: Ledger) -> None:
    before = ledger.head
    ledger.declare("notes", [], "sha256:0", [b"bob", b"ann", b"ann"])
    assert ledger.head == before
    ledger.declare("notes", [], "sha256:0", [b"bob"], cohort="second")
    assert ledger.head.seq == before.seq + 1


def test_a_dataset_that_was_never_declared_has_no_budget(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="never declared"):
        ledger.reserve("elsewhere", charge(), "a", yes)


def test_no_member_is_in_any_file(ledger: Ledger) -> None:
    key = b"patient-0123456789"
    ledger.declare("notes", [], "sha256:1", [key])
    ledger.withdraw(key)
    unsalted = hashlib.sha256(key)
    for path in ledger.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for trace in (key, unsalted.digest(), unsalted.hexdigest().encode()):
                assert trace not in content


def test_withdrawal_and_admission_are_entries(ledger: Ledger, folder: Path) -> None:
    assert not ledger.admitted(STUDY)
    ledger.withdraw(b"ann")
    ledger.withdraw(b"ann")
    ledger.admit(STUDY, "Dr Ada")
    again = Ledger(folder)
    assert (
        again.withdrawn() == {again.hashed(b"ann")}
        and again.hashed(b"bob") not in again.withdrawn()
    )
    assert again.admitted(STUDY) and not again.admitted("sha256:other")


# ----------------------------------------------------------------------------- tampering, damage


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
    with pytest.raises(LedgerError, match="means nothing here"), used._store.writing() as writer:
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
    statement = {"seq": 99, "hash": "00" * 32, "signature": signed}
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
    used.accept_receipt(good, coordinator.public)
    used.reserve("notes", charge(6), "adapter 6", yes)


def test_a_head_statement_tells_the_coordinator_nothing(used: Ledger) -> None:
    one, same = used.head_statement(), used.head_statement()
    used.withdraw(b"somebody")
    after = used.head_statement()
    assert set(one) == {"token"} and len({str(x) for x in (one, same, after)}) == 3
    assert len({len(x["token"]) for x in (one, same, after)}) == 1
    assert used.head.hash not in str(after)


def kept(ledger: Ledger) -> list[int]:
    """The rounds whose updates can be sent again."""
    return sorted(int(path.name.split("-")[1]) for path in (ledger.folder / "outbox").iterdir())


def test_updates_before_a_counted_one_are_kept_no_longer_and_never_free_again(
    used: Ledger, folder: Path
) -> None:
    coordinator, stranger = SigningKey(), SigningKey()
    used.accept_receipt(receipt(coordinator, used.head_statement()), coordinator.public)
    for round_ in (6, 7):
        run_round(used, round_)
    newest = used.released(STUDY, 5, "adapter 5")
    used.prune(STUDY, stranger.public)
    used.prune("sha256:" + "9" * 64, coordinator.public)
    assert kept(used) == [1, 2, 3, 4, 5, 6, 7]
    Ledger(folder).prune(STUDY, coordinator.public)
    assert kept(used) == [5, 6, 7]
    assert newest is not None and used.released(STUDY, 5, "adapter 5") == newest
    assert used.released(STUDY, 4, "adapter 4") is None
    run_round(used, 4)
    assert len(used.charges("notes")) == 8
    used.verify()


def test_pruning_without_a_receipt_is_caught(used: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the coordinator may have lost what is pruned, and the site pays for it again."""
    head = Receipt("a", Head(10**9, ""), "")
    monkeypatch.setattr(chain.Database, "check_receipts", lambda *_: ReceiptLog((head,)))
    used.prune(STUDY, "a")
    assert kept(used) == [5]


def test_an_altered_receipt_file_is_noticed(used: Ledger, folder: Path) -> None:
    coordinator = SigningKey()
    used.accept_receipt(receipt(coordinator, used.head_statement()), coordinator.public)
    path = folder / "ledger.receipt"
    path.write_bytes(path.read_bytes().replace(b'"seq":11', b'"seq":1'))
    with pytest.raises(LedgerError, match=r"ledger\.receipt: torn, edited"):
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


# -------------------------------------------------------------------- full, read-only and locked


def test_a_disk_that_fills_up_never_undercharges(used: Ledger, folder: Path) -> None:
    """A child reserves under a limit on file size that strikes at every size in turn."""
    size = (folder / "ledger.db").stat().st_size
    limits = [0, 100, 1024, 4096, size, size + 512, size + 4096]
    child = subprocess.run(
        [sys.executable, CHAOS, "fill", folder, *map(str, limits)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = child.stdout.splitlines()
    assert (child.returncode, len(lines)) == (0, len(limits)), child.stderr
    assert sum("LedgerError" in line for line in lines) >= 5
    charged = len(Ledger(folder).charges("notes")) - 5
    assert charged >= sum(int(line.split()[0]) for line in lines)


def test_read_only_files_are_named_before_anything_is_charged(
    used: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def readonly(path: Path) -> sqlite3.Connection:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        return sqlite3.connect(uri, uri=True, isolation_level=None)

    before = used.head
    with monkeypatch.context() as patch:
        patch.setattr(chain, "connect", readonly)
        with pytest.raises(LedgerError, match=r"cannot be written .*readonly.*permissions"):
            used.reserve("notes", charge(6), "adapter 6", yes)
    assert used.head == before


def test_a_lock_that_is_held_is_named(
    used: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "BUSY", 0.05)
    with closing(sqlite3.connect(folder / "ledger.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="another process has been writing"):
            used.reserve("notes", charge(6), "adapter 6", yes)
    assert len(used.charges("notes")) == 5


# ------------------------------------------------------------------------------- many at a time


def racing(folder: Path, mode: str, processes: int, ceiling: int) -> int:
    """How many reservations succeeded under a ceiling of `ceiling` charges."""
    children = [
        subprocess.Popen(
            [sys.executable, CHAOS, mode, folder, str(ceiling)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    return sum(int(child.communicate(timeout=60)[0]) for child in children)


def test_two_processes_reserve_exactly_what_is_affordable(ledger: Ledger, folder: Path) -> None:
    assert racing(folder, "race", 2, ceiling=7) == 7
    assert len(Ledger(folder).charges("notes")) == 7


def test_two_processes_that_check_outside_the_lock_are_caught(ledger: Ledger, folder: Path) -> None:
    """The twin: the ceiling looked at first and the charge made afterwards overspends, sooner or
    later: how the processes meet is up to the machine."""
    made = 0
    for ceiling in range(7, 7 * 20, 7):
        made += racing(folder, "race-unlocked", 4, ceiling)
        if made > ceiling:
            return
    pytest.fail("the unlocked twin never overspent")


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


# --------------------------------------------------------------------------- backup and restore


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
    # Two entries were lost: the step log explains one, the other is charged as a round.
    assert total(restored) == {1.0: 12}


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


# ---------------------------------------------------------------------------------------- speed


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
