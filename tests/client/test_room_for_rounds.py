"""What a coordinator orders fills no more of a ledger's room than a public number of rounds."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.core.config.patient_columns import LONGEST
from fedtune.core.errors import BudgetExceeded, PolicyRefused
from fedtune.core.files.room import OF_A_ROUND, Room
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import MEMBER_BYTES, Ledger
from fedtune.core.vault import budget, policy
from fedtune.core.vault import worker as site_module
from fedtune.core.vault.budget import check_rounds
from fedtune.core.vault.worker import SiteWorker
from fedtune.public.start import Start
from tests.client.site_kit import begun, make_site, notes, trains


def scheduled(base: Path) -> Start:
    """Begin a study without a last round, whose rounds a coordinator numbers as it likes."""
    columns = {"prompt": "q", "completion": "a"}
    return begun(
        base,
        privacy={"epsilon": 8.0, "noise_multiplier": 9.0, "delta": 1e-4, "unit": "patient"},
        schedule={"every": "1h"},
        training={"learning_rate": 0.1, "local_steps": 1, "sampling_rate": 1.0},
        evaluation={"path": "public.jsonl", "columns": columns},
    )


def of_rounds(folder: Path, rounds: int) -> SiteWorker:
    notes(folder)
    return SiteWorker(make_site(folder, {"max_rounds": rounds}, patient="who"))


def test_a_ledger_pays_for_so_many_rounds_however_they_are_numbered(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Of all studies together, and no other is admitted then. Twin: a site that allows more."""
    made, other = scheduled(tiny_base), begun(tiny_base)
    worker = of_rounds(tmp_path, 3)
    assert worker.prepare(made.study, made.frozen).admitted
    assert worker.prepare(other.study, other.frozen).admitted
    trains(worker, made, 7)
    trains(worker, other, 1)
    trains(worker, made, policy.LAST_ROUND)
    length = (worker.ledger.folder / "ledger.db").stat().st_size
    for round_ in (8, 10_000):
        with pytest.raises(BudgetExceeded, match=r"policy\.max_rounds"):
            trains(worker, made, round_)
    with pytest.raises(BudgetExceeded, match=r"policy\.max_rounds"):
        trains(worker, other, 2)
    assert (worker.ledger.folder / "ledger.db").stat().st_size == length
    trains(worker, made, policy.LAST_ROUND)  # sent again, for nothing
    again = SiteWorker(worker.site)
    assert "policy.max_rounds" in again.prepare(made.study, made.frozen).reason
    raised = of_rounds(tmp_path, 4)
    assert raised.prepare(made.study, made.frozen).admitted
    trains(raised, made, 8)
    assert len(raised.ledger.spending()) == 4


@pytest.mark.parametrize("kind", ["a round", "a schedule's round"])
def test_what_was_paid_while_records_were_read_counts(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As by another membership of the hospital, whose vault is another process: its last round was
    still to be paid when this round's records began to be read."""
    made = begun(tiny_base) if kind == "a round" else scheduled(tiny_base)
    worker = of_rounds(tmp_path, 3)
    assert worker.prepare(made.study, made.frozen).admitted
    trains(worker, made, 1)
    paid, honest = worker.ledger.charges("records")[0], SiteWorker.data_in_study

    def pay_meanwhile(*given: Any) -> Any:
        for adapter in ("another", "a third"):
            Ledger(worker.ledger.folder).reserve("records", paid, adapter, lambda _: None)
        return honest(*given)

    monkeypatch.setattr(SiteWorker, "data_in_study", pay_meanwhile)
    with pytest.raises(BudgetExceeded, match=r"policy\.max_rounds"):
        trains(worker, made, 2)
    assert len(worker.ledger.spending()) == 3


def test_rounds_beyond_the_room_wait_for_the_next_start(tmp_path: Path, tiny_base: Path) -> None:
    """policy.max_rounds is read anew each round, and the room when a site is started."""
    made = scheduled(tiny_base)
    worker = of_rounds(tmp_path, 3)
    assert worker.prepare(made.study, made.frozen).admitted
    trains(worker, made, 1)
    for most, refused in ((1, True), (2, False), (5000, False)):
        policy_now = worker.site.policy.model_copy(update={"max_rounds": most})
        paid = worker.ledger.charges("records")
        try:
            check_rounds(paid, policy_now, worker.room)
            assert not refused
        except BudgetExceeded:
            assert refused
    with pytest.raises(BudgetExceeded, match="at most 3"):
        check_rounds(paid * 3, policy_now, worker.room)
    check_rounds(paid * 3, policy_now, Room(tmp_path, 12, 5000))  # started again


def test_a_rounds_number_has_space_in_an_entry(tmp_path: Path, tiny_base: Path) -> None:
    made = scheduled(tiny_base)
    worker = of_rounds(tmp_path, 3)
    worker.prepare(made.study, made.frozen)
    for round_ in (0, policy.LAST_ROUND + 1, 10**400):
        with pytest.raises(PolicyRefused, match="not in the plan"):
            trains(worker, made, round_)


def test_the_room_has_place_for_what_a_round_enters_at_most(tmp_path: Path) -> None:
    """With names of any length that a plan or a site may have, an answer that waits for a person,
    and records that the ledger has yet to remember, beside their own bytes."""
    ledger, name, rounds = Ledger(tmp_path), "n" * 63, 100
    digest, adapter = "sha256:" + "a" * 64, "sha256:" + "b" * 64 + ":1000000"
    ledger.declare(name + "0", (), digest, [b"x"], name + "1")
    before = (tmp_path / "ledger.db").stat().st_size
    for number in range(rounds):
        slot = digest, policy.LAST_ROUND - number, adapter
        member = [f"record {number}".encode()]
        content = f"sha256:{number:064x}"
        columns = {name + "0": "c" * LONGEST}
        ledger.declare(
            name + "0", (name + "2",), content, member, name + "1", member, columns=columns
        )
        about = (0.12345678901234567, 0.12345678901234567, 10_000, 1000, 0.12345678901234567)
        more = ("patient", name + "1", 1.2345678901234567, 2, 1000, 999)
        charge = Charge(digest, name + "3 (evaluation)", slot[1], *about, *more)
        charge = replace(charge, patient="c" * LONGEST)
        reserved = ledger.reserve(name + "0", charge, adapter, lambda charges: None)
        ledger.release(reserved, b"update", held=True)
        ledger.let_go(slot, "w" * 64)
    grown = (tmp_path / "ledger.db").stat().st_size - before
    assert grown <= rounds * (OF_A_ROUND + MEMBER_BYTES)
    assert Room(Path(), 0, 5000).of_the_ledger == 5000 * OF_A_ROUND


def test_the_hash_of_what_was_read_is_no_entry_of_its_own(tmp_path: Path) -> None:
    """It follows from the plan that the records were read for: two plans in turn would be an entry
    each time. Twin: a record that is new."""
    ledger = Ledger(tmp_path)
    ledger.declare("notes", [], "sha256:7", [b"ann"])
    before = ledger.head
    ledger.declare("notes", [], "sha256:8", [b"ann"])
    assert ledger.head == before
    ledger.declare("notes", [], "sha256:8", [b"ann", b"bob"])
    assert ledger.head.seq == before.seq + 1


def test_what_is_refused_reads_no_record(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading may be an entry, and plans and orders that are refused cost nothing."""
    privacy = {"noise_multiplier": 60.0, "delta": 1e-4, "unit": "patient"}
    read: list[str] = []
    honest = SiteWorker.data_in_study
    monkeypatch.setattr(
        SiteWorker, "data_in_study", lambda *given: read.append("records") or honest(*given)
    )
    for made in (scheduled(tiny_base), begun(tiny_base, privacy=privacy)):
        worker = of_rounds(tmp_path / made.study.digest[-8:], 100)
        assert worker.prepare(made.study, made.frozen).admitted
        assert not read, "admission reads none"
        for number in range(budget.MOST_ATTEMPTS):
            changed = {name: value + np.float32(number) for name, value in made.adapter.items()}
            worker.train(made.study.digest, 1, changed)
        assert len(read) == budget.MOST_ATTEMPTS
        changed = {name: value - np.float32(1) for name, value in made.adapter.items()}
        with pytest.raises(BudgetExceeded):
            worker.train(made.study.digest, 1, changed)
        assert len(read) == budget.MOST_ATTEMPTS
        read.clear()


def test_an_earlier_studys_records_are_let_go_before_a_plan_is_prepared(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is at its limit, whether a plan is prepared must not follow from them."""
    first, second = begun(tiny_base), scheduled(tiny_base)
    worker = of_rounds(tmp_path, 100)
    assert worker.prepare(first.study, first.frozen).admitted
    trains(worker, first, 1)
    held = weakref.ref(worker._cached["records"][1])
    assert held() is not None
    honest, seen = site_module.build, list[object]()
    monkeypatch.setattr(site_module, "build", lambda *given: seen.append(held()) or honest(*given))
    assert worker.prepare(second.study, second.frozen).admitted
    assert seen == [None]
    trains(worker, first, 2)
