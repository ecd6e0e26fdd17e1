"""The ledger charges before training, and what is done to its files is noticed or charged."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core.dp.accountant import Steps
from fedtune.core.errors import BudgetExceeded
from fedtune.core.ledger import chain
from fedtune.core.ledger.entries import RULES, Charge
from fedtune.core.ledger.ledger import Ledger, LedgerError, NoRoom
from tests.dp.ledger_kit import CHAOS, STUDY, charge, run_round, yes
from tests.expected import raises_nothing, raises_only
from tests.limits import files_of_at_most


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


@pytest.mark.parametrize("full", [True, False])
def test_an_update_without_room_is_kept_in_memory_and_sent(
    ledger: Ledger, folder: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Whether the disk says so before, or refuses the write. After a restart the round is charged
    again, as one whose bytes are missing."""
    with monkeypatch.context() as patch:
        if full:
            patch.setattr(ledger, "_room", SimpleNamespace(has_space=lambda _: False))
        else:
            (folder / "outbox").write_bytes(b"no folder")
        body = run_round(ledger, 1)
        assert ledger.released(STUDY, 1, "adapter 1") == body and not list(folder.glob("outbox/*"))
        assert ledger.released(STUDY, 1, "another adapter") is None
        with pytest.raises(LedgerError, match="released by another process"):
            ledger.release(ledger.reserve("notes", charge(1), "adapter 1", yes), b"other noise")
        after = run_round(ledger, 2)
        assert ledger.released(STUDY, 2, "adapter 2") == after, "of each study the newest"
        assert ledger.released(STUDY, 1, "adapter 1") is None
    if not full:
        (folder / "outbox").unlink()
    restarted = Ledger(folder)
    assert restarted.released(STUDY, 2, "adapter 2") is None
    assert len(restarted.charges("notes")) == 3
    assert restarted.released(STUDY, 1, "adapter 1") is None
    third = run_round(restarted, 3)
    assert Ledger(folder).released(STUDY, 3, "adapter 3") == third, "stored once there is room"


def test_a_quota_that_is_used_up_is_a_disk_without_room(ledger: Ledger, folder: Path) -> None:
    """Only a full disk has an error of its own in SQLite; a quota is a write that failed. A file's
    largest size here, since a quota needs an administrator. Twin: with more room."""
    members = [hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(4_000)]
    with files_of_at_most((folder / "ledger.db").stat().st_size + 8192):
        with raises_only(NoRoom, match="disk I/O error"):
            ledger.declare("notes", (), members=members)
        with raises_nothing():
            ledger.declare("notes", (), members=members[:1])
    with raises_nothing():
        ledger.declare("notes", (), members=members)


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
    (path,) = (used.folder / "outbox").glob("*-5-*.bin")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"other" if damage == "altered" else path.read_bytes()[:-1])
    assert used.released(STUDY, 5, "adapter 5") is None
    body = run_round(used, 5)
    assert used.released(STUDY, 5, "adapter 5") == body
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
    assert [ledger.disjoint_member_test("fresh")(key) for key in (b"ann", b"bob", b"eve")] == [
        1,
        1,
        0,
    ]
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
        assert book.disjoint_member_test("scans")(b"ann") and book.disjoint_member_test("notes")(
            b"ann"
        )
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
    assert ledger.disjoint_member_test("fresh")(b"bob")


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


def test_what_costs_nothing_takes_no_time_that_tells_how_many_members_there_are(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: with members or units, which a charged round brings, the table of members is read."""
    for name, apart, more in (("records", (), 200), ("apart", ("records",), 50)):
        ledger.declare(name, apart, "x", (b"%d" % n for n in range(more)))
    read = list[str]()
    for function in ("hashes", "members"):
        own = getattr(chain.Transaction, function)

        def counted(self: Any, *datasets: str, own: Any = own) -> Any:
            read.append(own.__name__)
            return own(self, *datasets)

        monkeypatch.setattr(chain.Transaction, function, counted)
    ledger.declare("records", None)
    ledger.declare("apart", ("records",))
    assert read == []
    ledger.declare("records", None, members=[b"new"])
    ledger.declare("apart", None, units=[b"1"])
    assert read == ["members", "hashes"]


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
        set(again.withdrawn()) == {again.hashed(b"ann")}
        and again.hashed(b"bob") not in again.withdrawn()
    )
    assert again.admitted(STUDY) and not again.admitted("sha256:other")


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
    def readonly(path: Path, **_: bool) -> sqlite3.Connection:
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
