"""A ledger and the room beside it take a public number of bytes together, whatever is in it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedtune.core.errors import InfrastructureError
from fedtune.core.files.room import LEDGER, ROOM, Room
from tests.disks import disk


def a_quota_of(size: int, patch: pytest.MonkeyPatch) -> None:
    """Let no file be allocated that is larger, of which `statvfs` says nothing."""
    honest = os.posix_fallocate

    def allocate(descriptor: int, at: int, length: int) -> None:
        if at + length > size:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        honest(descriptor, at, length)

    patch.setattr(os, "posix_fallocate", allocate)


def kept(room: Room) -> int:
    return (room.folder / ROOM).stat().st_size


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path / "state", 10)


def test_it_gives_way_while_the_block_runs(room: Room) -> None:
    for _ in range(2):
        with room.give_up():
            assert kept(room) == room.size - room.of_an_answer
        found = (room.folder / ROOM).stat()
        assert found.st_size == room.size and found.st_blocks * 512 >= room.size, "no hole"
        assert found.st_mode & 0o777 == 0o600
    with pytest.raises(ZeroDivisionError), room.give_up():
        raise ZeroDivisionError
    assert kept(room) == room.size


def test_it_is_shorter_by_as_much_as_the_ledger_is_long(room: Room) -> None:
    """Up to the length that is made up for; an answer's part stays whole beyond it."""
    with room.give_up():
        (room.folder / LEDGER).write_bytes(bytes(40_960))
    assert kept(room) == room.size - 40_960
    with room.give_up():
        assert kept(room) == room.size - 40_960 - room.of_an_answer
        (room.folder / LEDGER).write_bytes(bytes(room.of_the_ledger + 4096))
    assert kept(room) == room.size - room.of_the_ledger


@pytest.mark.parametrize("made_up_for", [True, False])
def test_what_the_disk_has_space_for_does_not_follow_from_the_ledger(
    tmp_path: Path, made_up_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every number of free bytes around the room's. Twin: a room that has one length."""
    if not made_up_for:
        monkeypatch.setattr(Room, "_grown", 0)
    said: dict[int, list[tuple[bool, ...]]] = {}
    for length in (4096, 40_960):
        with disk(tmp_path / str(length), megabytes=32) as small:
            room = Room(small.path / "state", 10)
            room.folder.mkdir()
            for free in range(room.size - 8 * 4096, room.size + 16 * 4096, 4096):
                with small.with_room_for(free):
                    (room.folder / LEDGER).write_bytes(bytes(length))
                    answers = [answered(room), room.has_space(), room.has_space(4 * 4096)]
                    answers += [answered(room)]  # also where it has been there before
                (room.folder / LEDGER).unlink()
                (room.folder / ROOM).unlink(missing_ok=True)
                said.setdefault(length, []).append(tuple(answers))
    one, other = said.values()
    assert (one == other) is made_up_for
    if made_up_for:
        assert one[0] == (False,) * 4 and one[-1] == (True,) * 4


def answered(room: Room) -> bool:
    try:
        with room.give_up():
            return True
    except InfrastructureError:
        return False


def test_nothing_is_answered_on_a_disk_that_has_it_not(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is a quota, of which nothing is said before a file is made longer."""
    with monkeypatch.context() as patch:
        a_quota_of(room.size - 1, patch)
        with pytest.raises(InfrastructureError, match="free space"), room.give_up():
            raise AssertionError
    with room.give_up():
        pass
    assert kept(room) == room.size


def test_a_person_is_told_where_it_cannot_be_taken_back(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with room.give_up():
        a_quota_of(room.size - 1, monkeypatch)
    assert "no order is answered until" in caplog.text


def test_a_link_or_a_folder_in_its_place_is_left_alone(room: Room) -> None:
    room.folder.mkdir()
    (room.folder / "precious").write_bytes(b"ledger")
    (room.folder / ROOM).symlink_to(room.folder / "precious")
    assert not answered(room)
    assert (room.folder / "precious").read_bytes() == b"ledger"
    (room.folder / ROOM).unlink()
    (room.folder / ROOM).mkdir()
    assert not answered(room)


def test_its_size_follows_from_what_is_declared_alone() -> None:
    assert Room(Path(), 0).size == 18 * 2**20
    assert Room(Path(), 1000).size == 18 * 2**20 + 1000 * 32 * 2**10
