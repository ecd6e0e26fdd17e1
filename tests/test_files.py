"""A file is replaced whole, or stays as it was, wherever the disk fails."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import InfrastructureError, InputError
from fedtune.core.files import writing
from tests.limits import files_of_at_most

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


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """An administrator who names a device as output would have it no more. Twin: a file is."""
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "nowhere").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        before = {path.name: path.lstat().st_mode for path in tmp_path.iterdir()}
        for name in ("link", "nowhere", "pipe", "socket"):
            for write in (writing.replace, writing.create):
                with pytest.raises(InfrastructureError, match="a link, a pipe or a device"):
                    write(tmp_path / name, b"new")
            with (
                pytest.raises(InfrastructureError, match="a link, a pipe or a device"),
                writing.drafted(tmp_path / name) as draft,
            ):
                draft.write_bytes(b"new")
        assert {path.name: path.lstat().st_mode for path in tmp_path.iterdir()} == before
    assert writing.replace(tmp_path / "kept", b"new").read_bytes() == b"new"


def test_a_file_that_a_person_names_is_replaced_by_its_own_kind_alone(tmp_path: Path) -> None:
    for name, may in (("a.html", True), ("a.HTML", True), ("study.toml", False), ("key", False)):
        path = tmp_path / name
        assert writing.check_replaceable(path, ".html") == path  # a new one has any name
        path.write_bytes(b"old")
        with nullcontext() if may else pytest.raises(InputError, match="name ends in"):
            writing.check_replaceable(path, ".html")
    (tmp_path / "link.html").symlink_to("a.html")
    (tmp_path / "folder.html").mkdir()
    for name in ("link.html", "folder.html"):
        with pytest.raises(InputError, match="exists"):
            writing.check_replaceable(tmp_path / name, ".html")
    writing.check_replaceable(tmp_path / "new" / "folders" / "a.html", ".html")
    with pytest.raises(InputError, match="key is not a folder"):
        writing.check_replaceable(tmp_path / "key" / "below" / "a.html", ".html")


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


@pytest.mark.parametrize("room", [0, 1, 3, 4])
def test_a_line_that_the_disk_cut_short_gives_way_to_the_next(tmp_path, room):
    path = tmp_path / "new" / "lines"
    writing.append_line(path, b"one")
    with files_of_at_most(path.stat().st_size + room), pytest.raises(OSError):
        writing.append_line(path, b"four")
    assert path.read_bytes() == b"one\n" + b"four\n"[:room]
    writing.append_line(path, b"five")
    assert path.read_bytes() == b"one\nfive\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_short_write_that_counts_as_whole_is_caught(tmp_path, monkeypatch):
    """The twin: what follows is on the torn line."""
    monkeypatch.setattr(writing, "write_all", os.write)
    path = tmp_path / "lines"
    with files_of_at_most(2):
        writing.append_line(path, b"four")  # nobody is told
    assert path.read_bytes() == b"fo"


def test_drafts_of_processes_that_were_killed_are_removed(tmp_path):
    """Also of an earlier process with this one's number, as in a container; a live one's stays."""
    with subprocess.Popen(["true"]) as over:
        over.wait()
    gone, own, alive = over.pid, os.getpid(), os.getppid()
    (tmp_path / "in").mkdir()
    left = [f"a.0f1e2d3c.{gone}.new", f"in/a.0f1e2d3c.{own}.new", f"status.json.{gone}.new"]
    kept = [f"a.0f1e2d3c.{alive}.new", "adapter.new", "ledger.new", f"a.{gone}.newer"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    (tmp_path / f"link.{gone}.new").symlink_to(tmp_path / "adapter.new")
    writing.remove_drafts(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in", *kept])
    assert not list((tmp_path / "in").iterdir())
    writing.remove_drafts(tmp_path / "none")
