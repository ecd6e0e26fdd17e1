"""A name that a record holds leads to no file outside the folder, and nobody outside sees that it
was looked up."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.files import beneath
from fedtune.core.files.beneath import Beneath, Outside
from fedtune.core.files.reading import open_regular

LONG_AGO = 1  # seconds since 1970: a link that is read gets another time


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A site's folder, beside that of another account, which has a file and a link."""
    other, site = tmp_path / "other", tmp_path / "site"
    (site / "a" / "b").mkdir(parents=True)
    (site / "own.png").write_text("own")
    (site / "a" / "b" / "deep.png").write_text("deep")
    other.mkdir()
    (other / "secret.png").write_text("secret")
    (other / "link").symlink_to("secret.png")
    (site / "out").symlink_to("../other/link")
    (site / "up").symlink_to("../other")
    (site / "far").symlink_to(other)
    (site / "a" / "up").symlink_to("../../other")
    return tmp_path


def seen_outside(world: Path, look_up: Callable[[str], object]) -> list[str]:
    """The names after whose look-up another account sees that its link was read."""
    link, seen = world / "other" / "link", list[str]()
    for name in (
        str(link), "../other/link", "a/../../other/link", "out", "up/link", "far/link",
        "a/up/link", "./up/./link", "own.png/../../other/link", f"/{link}",
    ):  # fmt: skip
        os.utime(link, (LONG_AGO, LONG_AGO), follow_symlinks=False)
        with pytest.raises(Outside):
            look_up(name)
        if link.lstat().st_atime != LONG_AGO:
            seen.append(name)
    return seen


def test_nobody_outside_sees_that_a_name_was_looked_up(world: Path) -> None:
    """Twin: a reader that resolves the path before it judges it."""
    root = world / "site"
    assert seen_outside(world, Beneath(root).open) == []

    def resolves_first(name: str) -> None:
        if not (root / name).resolve().is_relative_to(root):
            raise Outside

    if not seen_outside(world, resolves_first):
        pytest.skip("this file system keeps no times of access, so that the test shows nothing")


@pytest.mark.parametrize("name", ["/etc/passwd", "../site/own.png", "a/../own.png", "..", "/"])
def test_a_name_that_could_lead_out_is_judged_by_its_text(
    world: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Beneath(world / "site")
    asked = _watched(monkeypatch)
    with pytest.raises(Outside):
        files.open(name)
    assert not asked


@pytest.mark.parametrize("name", ["x" * 256, "a/" * 10**6, "own\0.png", "\ud800.png"])
def test_a_name_that_no_file_can_have_is_looked_up_nowhere(
    world: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a name of a megabyte, which took a minute part by part."""
    files = Beneath(world / "site")
    asked = _watched(monkeypatch)
    with suppress(OSError, ValueError):
        files.open(name)
    assert not asked
    files.open("own.png")[0].close()
    assert asked


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls by which a file is looked up, from now on."""
    asked = list[str]()

    def watch(call: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: asked.append(call) or plain(*given, **named)

    for call in ("open", "stat", "lstat", "readlink"):
        monkeypatch.setattr(os, call, watch(call, getattr(os, call)))
    return asked


def test_links_that_stay_inside_are_followed(world: Path) -> None:
    """However they say it. What is found has one path of its own."""
    root = world / "site"
    (world / "as-a-person-says").symlink_to(root)
    for link, target in {
        "relative": "a/b/deep.png",
        "a/back": "../own.png",
        "round": "../site/own.png",
        "absolute": str(root / "own.png"),
        "spelt": str(world / "as-a-person-says" / "own.png"),
        "folder": "a/b",
        "physical": "folder/../b/deep.png",  # a/b/.., not the folder in which the link is
        "chain": "relative",
        "here": ".",
    }.items():
        (root / link).symlink_to(target)
    files = Beneath(world / "as-a-person-says")
    for name, path in {
        "own.png": "own.png",
        "./a//b/./deep.png/": "a/b/deep.png",
        "relative": "a/b/deep.png",
        "a/back": "own.png",
        "round": "own.png",
        "absolute": "own.png",
        "spelt": "own.png",
        "folder/deep.png": "a/b/deep.png",
        "physical": "a/b/deep.png",
        "chain": "a/b/deep.png",
        "here/here/here/own.png": "own.png",
    }.items():
        file, found = files.open(name)
        with file:
            assert (name, found) == (name, path)
            assert file.read() == (root / path).read_bytes()


def test_what_is_no_file_is_not_opened(world: Path) -> None:
    root = world / "site"
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    (root / "gone").symlink_to("nothing")
    (root / "here").symlink_to(".")
    for name in ("", ".", "a", "pipe", "loop", "gone", "none.png", "own.png/x", "here/" * 41 + "a"):
        with pytest.raises(OSError) as raised:
            Beneath(root).open(name)
        assert not isinstance(raised.value, Outside), name


def test_no_descriptor_stays_open(world: Path) -> None:
    files, before = Beneath(world / "site"), len(os.listdir("/proc/self/fd"))
    for name in ("a/b/deep.png", "up/link", "a/none", "pipe", "a", "/x"):
        try:
            files.open(name)[0].close()
        except OSError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_that_takes_a_files_place_meanwhile_is_not_followed(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the opening. Twin: a plain open of the path, which follows it."""
    own, mode = world / "site" / "own.png", beneath._mode

    def swapped(part: str, folder: int) -> int:
        found = mode(part, folder)
        own.unlink()
        own.symlink_to(world / "other" / "secret.png")
        return found

    monkeypatch.setattr(beneath, "_mode", swapped)
    with pytest.raises(OSError):
        Beneath(world / "site").open("own.png")
    with open_regular(own) as file:
        assert file.read() == b"secret"
