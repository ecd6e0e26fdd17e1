"""The ledger's cohorts against a plain model: who was in which round bears that round."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.core.errors import BudgetExceeded
from fedtune.core.ledger.cohorts import Arrivals
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
MOST = 3  # rounds that a life pays for


def charge(round_: int) -> Charge:
    return Charge("sha256:plan", "s", round_, 2.0, 1.0, 1, 1, 1.0, "patient", "first")


def permit(charges: list[Charge]) -> None:
    if len(charges) >= MOST:
        raise BudgetExceeded("spent")


def unit(name: str, *records: str) -> tuple[bytes, ...]:
    return (f"unit {name}".encode(), *(f"record {r}".encode() for r in records or (name,)))


def declare(book: Ledger, *units: tuple[bytes, ...], dataset: str = "records") -> None:
    members = [member for each in units for member in each]
    book.declare(dataset, [], "hash", members, "later", [each[0] for each in units])


def borne(book: Ledger, name: str, dataset: str = "records") -> list[int]:
    arrival = book.arrival(dataset)(unit(name)[0])
    (cohort,) = [c for c in book.cohorts(dataset) if c.arrival == arrival]
    return [c.round for c in cohort.charges]


@given(st.lists(st.sampled_from(["arrive", "round"]), max_size=14))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_each_unit_bears_the_rounds_it_was_in(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        book, here, rounds = Ledger(Path(folder)), ["p0"], 0
        model: dict[str, list[int]] = {}
        declare(book, unit("p0"))
        for step in steps:
            if step == "arrive":
                here += [f"p{len(here)}"]
            declare(book, *map(unit, here))
            if step == "round":
                rounds += 1
                _, out = book.reserve_for("records", charge(rounds), "a", permit)
                arrival = book.arrival("records")
                for name in here:
                    if arrival(unit(name)[0]) not in out:
                        model.setdefault(name, []).append(rounds)
        again = Ledger(Path(folder))
        again.verify()
        for name in here:
            assert borne(again, name) == borne(book, name) == model.get(name, [])
            assert len(model.get(name, [])) <= MOST
        assert len(book.spending("records")) == rounds  # a charge, whoever was left


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state")


def test_who_was_there_before_arrivals_were_kept_bears_everything(book: Ledger) -> None:
    book.declare("records", [], "hash", unit("old"))
    book.reserve("records", charge(1), "a", lambda charges: None)
    declare(book, unit("old"), unit("new"))
    book.reserve_for("records", charge(2), "a", permit)
    assert borne(book, "old") == [1, 2] and borne(book, "new") == [2]
    assert [(c.arrival > 0, c.units) for c in book.cohorts("records")] == [(False, 0), (True, 1)]


def may_write(book: Ledger) -> bool:
    """Whether another process could write to the ledger now."""
    connection = sqlite3.connect(book.folder / "ledger.db", timeout=0)
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return True


def test_no_cohort_is_asked_about_under_the_lock(book: Ledger) -> None:
    """Each costs an ε, and others wait for the lock: their failure would tell how many arrived."""
    for number in range(1, 4):
        declare(book, *(unit(f"p{n}") for n in range(number)))
        book.reserve_for("records", charge(number), "a", permit)
    seen: dict[int, list[bool]] = {}

    def watching(charges: list[Charge]) -> None:
        seen.setdefault(len(charges), []).append(may_write(book))
        permit(charges)

    _, out = book.reserve_for("records", charge(4), "a", watching)
    assert len(out) == 1 and seen.pop(0) and set(seen) == {1, 2, 3}  # 0: a newcomer
    assert all(free == [True] for free in seen.values())


def test_cohorts_are_asked_about_again_if_another_process_charged_meanwhile(book: Ledger) -> None:
    declare(book, unit("p0"))
    for number in range(1, MOST):
        book.reserve_for("records", charge(number), "a", permit)
    declare(book, unit("p0"), unit("p1"))
    other, mine = Ledger(book.folder), list[int]()

    def slow(charges: list[Charge]) -> None:
        if may_write(other) and not mine:
            mine.append(other.reserve_for("records", charge(MOST), "a", permit)[0])
        permit(charges)

    number, out = book.reserve_for("records", charge(9), "a", slow)
    assert mine == [number - 1] and len(out) == 1  # p0's last charge was the other process's
    assert borne(book, "p0") == [1, 2, 3] and borne(book, "p1") == [3, 9]


@pytest.mark.parametrize("others", [(), (unit("a", "no acute findings"),)])
def test_when_somebody_arrived_follows_from_their_own_key_alone(
    book: Ledger, others: tuple[tuple[bytes, ...], ...]
) -> None:
    """Whether or not an older patient has a note that a newcomer has too."""
    declare(book, *others, unit("x"))
    book.reserve_for("records", charge(1), "a", permit)
    declare(book, *others, unit("x"), unit("b", "no acute findings", "r3"), unit("c", "r4"))
    book.reserve_for("records", charge(2), "a", permit)
    assert borne(book, "b") == borne(book, "c") == [2]


def test_arrivals_by_records_that_others_have_are_caught(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a newcomer with anybody's note counts as there from the first."""
    honest = Arrivals.entry

    def coupled(self: Arrivals, dataset: str, known: set[bytes], keys: list[bytes]) -> Any:
        note = book._salt_member(b"record no acute findings")
        return honest(self, dataset, known | set(keys) if note in known else known, keys)

    monkeypatch.setattr(Arrivals, "entry", coupled)
    with pytest.raises(AssertionError):
        test_when_somebody_arrived_follows_from_their_own_key_alone(
            book, (unit("a", "no acute findings"),)
        )


def test_who_only_a_study_without_arrivals_saw_bears_everything(book: Ledger) -> None:
    declare(book, unit("a"))
    book.reserve_for("records", charge(1), "a", permit)
    book.declare("records", [], "hash", [*unit("a"), *unit("b")])
    declare(book, unit("a"), unit("b"))
    assert book.cohorts("records")[0].arrival == 0
    assert borne(book, "b") == [1]


def test_what_other_datasets_spent_counts_in_full_whenever_it_was(book: Ledger) -> None:
    declare(book, unit("x"), dataset="other")
    book.reserve_for("other", charge(1), "a", permit)
    declare(book, unit("late"))
    assert borne(book, "late") == [1] and [c.round for c in book.newcomer("records")] == [1]


def test_where_a_newcomer_has_nothing_left_nobody_is_asked(book: Ledger) -> None:
    declare(book, unit("x"), dataset="other")
    for round_ in range(MOST):
        book.reserve_for("other", charge(round_), "a", permit)
    declare(book, unit("late"))
    with pytest.raises(BudgetExceeded):
        book.reserve_for("records", charge(9), "a", permit)
    assert len(book.spending()) == MOST


def test_what_a_restore_charges_for_counts_against_all(tmp_path: Path, book: Ledger) -> None:
    declare(book, unit("a"))
    book.reserve_for("records", charge(1), "a", permit)
    book.backup(tmp_path / "copy")
    declare(book, unit("a"), unit("late"))
    book.reserve_for("records", charge(2), "a", permit)
    (book.folder / "ledger.db").write_bytes(b"gone")
    again = Ledger.restore(book.folder, tmp_path / "copy")
    declare(again, unit("a"), unit("late"), unit("later still"))
    for name in ("a", "late", "later still"):
        charges = next(
            c.charges
            for c in again.cohorts("records")
            if c.arrival == again.arrival("records")(unit(name)[0])
        )
        assert any(c.study == "restore" for c in charges), name


def test_an_arrival_that_was_edited_is_noticed(book: Ledger) -> None:
    from fedtune.core.ledger.chain import connect
    from fedtune.core.ledger.ledger import LedgerError

    declare(book, unit("a"))
    book.reserve_for("records", charge(1), "a", permit)
    connection = connect(book.folder / "ledger.db")
    ((seq, body),) = connection.execute("SELECT seq, body FROM entries WHERE kind = 'arrive'")
    altered = bytes(body).replace(b'"later"', b'"first"')
    connection.execute("UPDATE entries SET body = ? WHERE seq = ?", (altered, seq))
    connection.close()
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(book.folder)
