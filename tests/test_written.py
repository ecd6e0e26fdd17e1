"""What a search reads of a file is all that anybody wrote to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.written import ZEROS, written

SECRET = b"a key that ends in a zero\0"


@pytest.mark.parametrize("at", [0, 1, 4096 - len(SECRET) + 1, 3 * 2**20, 2**23 - len(SECRET)])
def test_whatever_was_written_is_read(tmp_path: Path, at: int) -> None:
    path = tmp_path / "room"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2**23)
        assert SECRET not in written(path)
        os.pwrite(file.fileno(), SECRET, at)
        os.fsync(file.fileno())
    assert SECRET in written(path)


def test_a_file_without_a_hole_is_read_as_it_is(tmp_path: Path) -> None:
    for content in (b"", b"one", os.urandom(10_000)):
        (tmp_path / "whole").write_bytes(content)
        assert written(tmp_path / "whole").removesuffix(ZEROS) == content
