"""What a ledger remembers of records where its site's disk is full."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.data.load import REMEMBERED
from fedtune.core.files.room import LEDGER, ROOM, Room
from fedtune.core.ledger.ledger import MEMBER_BYTES, Ledger, NoRoom
from fedtune.core.vault.reading import OF_COUNTS
from fedtune.core.vault.worker import SiteWorker
from tests.client.site_kit import begun, make_site, notes, room_of
from tests.disks import disk

pytestmark = pytest.mark.usefixtures("without_self_test")


@pytest.mark.parametrize("space", [False, True])
def test_a_full_disk_keeps_which_records_of_whom_were_trained_on(
    tmp_path: Path, tiny_base: Path, space: bool
) -> None:
    """By that a later reading chooses under the cap; the rest leaves the ledger's room whole.
    Twin: with space beside the room all is remembered."""
    made = begun(tiny_base)
    with disk(tmp_path / "disk", megabytes=24) as small:
        notes(small.path)
        worker = SiteWorker(make_site(small.path, patient="who"))
        with worker.room_to_answer():
            state = worker.ledger.folder
        assert (state / ROOM).stat().st_size == room_of(worker.site)
        with small.with_room_for(2**20 if space else OF_COUNTS + 4096):
            with worker.room_to_answer():
                assert worker.prepare(made.study, made.frozen).admitted
                network = worker._prepared[made.study.digest].network
                dataset = worker.data_in_study(made.study, network, worker.site.data).dataset
            known = worker.ledger.member_test("records")
            assert dataset.trained and all(map(known, dataset.trained))
            assert all(map(known, dataset.members)) is space
            assert (state / ROOM).stat().st_size == room_of(worker.site)


@pytest.mark.parametrize("free", [OF_COUNTS + 4096, 2**20, 8 * 2**20])
def test_what_the_cap_goes_by_follows_from_no_space_on_the_disk(
    tmp_path: Path, tiny_base: Path, free: int
) -> None:
    """A cap that a coordinator chooses puts no brink where what is remembered of everybody changes:
    of each patient as many records as the room holds. And a smaller cap then takes some of them."""
    rows = 2 * REMEMBERED
    privacy = {"epsilon": 6.0, "delta": 1e-4, "unit": "patient", "max_records_per_unit": rows}
    made = begun(tiny_base, privacy=privacy)
    fewer = begun(tiny_base, privacy=privacy | {"max_records_per_unit": 5})
    with disk(tmp_path / "disk", megabytes=32) as small:
        notes(small.path)
        lines = [
            json.dumps({"who": f"p{p}", "note": f"fever, hour {n}", "answer": "yes"})
            for p in range(4)
            for n in range(rows)
        ]
        (small.path / "notes.jsonl").write_text("\n".join(lines))
        worker = SiteWorker(make_site(small.path, patient="who"))
        with worker.room_to_answer():
            assert worker.ledger.folder.is_dir()
        with small.with_room_for(free), worker.room_to_answer():
            assert worker.prepare(made.study, made.frozen).admitted
            network = worker._prepared[made.study.digest].network
            dataset = worker.data_in_study(made.study, network, worker.site.data).dataset
        assert dataset.n_units == 4 and len(dataset.examples) == 4 * rows
        known = worker.ledger.member_test("records")
        assert sum(map(known, dataset.trained)) == len(dataset.trained) == 4 * (REMEMBERED + 1)
        assert worker.prepare(fewer.study, fewer.frozen).admitted
        network = worker._prepared[fewer.study.digest].network
        again = worker.data_in_study(fewer.study, network, worker.site.data).dataset
        assert len(again.examples) == 4 * 5 and again.trained < dataset.trained


def test_the_room_holds_what_is_remembered_of_a_unit() -> None:
    few, many = (Room(Path("state"), units).of_an_answer for units in (1_000, 2_000))
    assert many - few >= MEMBER_BYTES * (REMEMBERED + 1) * 1_000


def test_a_disk_without_room_for_who_takes_part_is_noise_alone(
    tmp_path: Path, tiny_base: Path
) -> None:
    """It is admitted in any case, and no record trains that the ledger does not know."""
    made = begun(tiny_base)
    with disk(tmp_path / "disk", megabytes=24) as small:
        notes(small.path, 400)
        worker = SiteWorker(make_site(small.path, patient="who"))
        assert worker.ledger.folder.is_dir()
        (worker.ledger.folder / ROOM).touch()
        worker.ledger.declare("records", (), cohort=worker.site.data.cohort)
        with small.with_room_for(24_000):
            assert worker.prepare(made.study, made.frozen).admitted
            network = worker._prepared[made.study.digest].network
            read = worker.data_in_study(made.study, network, worker.site.data)
        assert read.dataset.n_units == 0 and "records" not in worker._cached
        assert not worker.ledger.charges("records")


def test_texts_that_do_not_fit_take_nothing_else_with_them(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk said that it has space for them, and then it has not."""
    made, honest = begun(tiny_base), Ledger.declare
    notes(tmp_path)
    worker = SiteWorker(make_site(tmp_path, patient="who"))

    def declare(ledger: Ledger, *given: Any) -> frozenset[bytes]:
        if any(member not in trained for member in given[3]):
            raise NoRoom("the disk is full")
        return honest(ledger, *given)

    assert worker.prepare(made.study, made.frozen).admitted
    network = worker._prepared[made.study.digest].network
    trained = worker._read(made.study, network, worker.site.data).trained
    monkeypatch.setattr(Ledger, "declare", declare)
    read = worker.data_in_study(made.study, network, worker.site.data).dataset
    known = worker.ledger.member_test("records")
    assert read.n_units == 12 and trained and all(map(known, trained))
    assert not all(map(known, read.members))


@pytest.mark.parametrize("lends_its_length", [True, False])
def test_a_long_ledger_remembers_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lends_its_length: bool
) -> None:
    """Each new member changes another of its pages, and the journal takes them whole. Twin: a room
    that lends 8 KiB for each unit and a mebibyte."""
    if not lends_its_length:
        monkeypatch.setattr(Room, "of_an_answer", 2**20 + 20 * 8 * 2**10)
    with disk(tmp_path / "disk", megabytes=32) as small:
        room = Room(small.path / "state", 20)
        ledger, text = (
            Ledger(room.folder, room),
            (number.to_bytes(8) for number in itertools.count()),
        )
        while (room.folder / LEDGER).stat().st_size < room.of_the_ledger - 2**20:
            ledger.declare("records", (), None, itertools.islice(text, 5_000))
        with room.give_up():
            pass
        with small.with_room_for(0), room.give_up():
            new = list(itertools.islice(text, 20 * (REMEMBERED + 1)))
            with contextlib.suppress(NoRoom):
                ledger.declare("records", (), None, new)
        assert all(map(ledger.member_test("records"), new)) is lends_its_length
