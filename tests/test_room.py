"""Room that is kept on a disk gives way while something is written, and comes back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedtune.files.room import LEAST, ROOM, bytes_for, room_to_write

SIZE = 2**20


def a_disk_of(size: int, patch: pytest.MonkeyPatch) -> None:
    """Let no file be allocated that is larger."""
    honest = os.posix_fallocate

    def allocate(descriptor: int, at: int, length: int) -> None:
        if at + length > size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(descriptor, at, length)

    patch.setattr(os, "posix_fallocate", allocate)


def kept(folder: Path) -> int:
    return (folder / ROOM).stat().st_size


def test_it_is_there_but_while_the_block_runs(tmp_path: Path) -> None:
    for _ in range(2):
        with room_to_write(tmp_path / "state", SIZE):
            assert kept(tmp_path / "state") == 0
        found = (tmp_path / "state" / ROOM).stat()
        assert found.st_size == SIZE and found.st_blocks * 512 >= SIZE, "a hole keeps nothing"
        assert found.st_mode & 0o777 == 0o600


def test_it_comes_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), room_to_write(tmp_path, SIZE):
        raise ZeroDivisionError
    assert kept(tmp_path) == SIZE


def test_what_there_is_is_kept_and_a_person_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a_disk_of(SIZE // 3, monkeypatch)
    with room_to_write(tmp_path, SIZE):
        assert kept(tmp_path) == 0
    assert kept(tmp_path) == SIZE // 4 and "to spare" in caplog.text
    a_disk_of(LEAST - 1, monkeypatch)
    with room_to_write(tmp_path, SIZE):
        pass
    assert kept(tmp_path) == 0


def test_a_link_or_a_folder_in_its_place_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "precious").write_bytes(b"ledger")
    (tmp_path / ROOM).symlink_to(tmp_path / "precious")
    with room_to_write(tmp_path, SIZE):
        pass
    assert (tmp_path / "precious").read_bytes() == b"ledger"
    (tmp_path / ROOM).unlink()
    (tmp_path / ROOM).mkdir()
    with room_to_write(tmp_path, SIZE):
        pass
    assert "no room can be kept" in caplog.text


def test_its_size_follows_from_what_is_declared_alone() -> None:
    assert bytes_for(0) == 2**20 and bytes_for(1000) == 2**20 + 1000 * 8192
