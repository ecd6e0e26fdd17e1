"""A file is replaced whole, or stays as it was, wherever the disk fails."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import InfrastructureError
from fedtune.files import writing

CALLS = ("open", "write", "fsync", "close", "replace")


class Recorded:
    """`os`, with a list of the calls that change a disk; the `fails`-th of them fails."""

    def __init__(self, fails: int = 0) -> None:
        self.calls: list[str] = []
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == self.fails:
                if name == "close":
                    real(*args)
                raise OSError(28, "No space left on device")
            return real(*args)

        return call


def test_it_is_on_disk_before_it_is_in_place_and_the_folder_follows(tmp_path, monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(writing, "os", recorded)
    assert writing.replace(tmp_path / "a", b"new").read_bytes() == b"new"
    assert recorded.calls == [
        *("open", "write", "fsync", "close"),
        *("replace", "open", "fsync", "close"),
    ]


@pytest.mark.parametrize("number", range(1, 9))
def test_wherever_it_fails_the_old_or_the_new_is_whole(tmp_path, monkeypatch, number):
    path = writing.replace(tmp_path / "a", b"old")
    monkeypatch.setattr(writing, "os", Recorded(number))
    with pytest.raises(InfrastructureError, match="No space left"):
        writing.replace(path, b"newer")
    assert path.read_bytes() == (b"old" if number <= 5 else b"newer")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # no draft is left


@pytest.mark.parametrize("private, file, folder", [(True, 0o600, 0o700), (False, 0o644, 0o755)])
def test_who_can_read_it(tmp_path, private, file, folder):
    before = os.umask(0o022)
    try:
        path = writing.replace(tmp_path / "new" / "a", b"", private=private)
    finally:
        os.umask(before)
    found: list[Path] = [path, path.parent]
    assert [stat.S_IMODE(p.stat().st_mode) for p in found] == [file, folder]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_what_fails_half_way_leaves_nothing(tmp_path, kind, error):
    out = tmp_path / "new" / "run"

    def half() -> None:
        with writing.drafted(out) as draft:
            if kind == "folder":
                draft.mkdir()
            (draft / "part" if kind == "folder" else draft).write_text("half")
            raise error()

    with pytest.raises(InfrastructureError if error is OSError else error):
        half()
    assert not list(out.parent.iterdir())


def test_what_is_drafted_is_not_in_place_before_it_is_whole(tmp_path):
    out = tmp_path / "run"
    with writing.drafted(out) as draft:
        draft.mkdir()
        (draft / "part").write_text("whole")
        assert not out.exists()
    assert (out / "part").read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["run"]
