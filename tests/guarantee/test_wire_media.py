"""The wire inventory over images and recordings: no field more leaves a site, and none of it tells
how many files there are, how many tiles they make, or that one is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.guarantee import world
from tests.guarantee.test_wire_inventory import outside, shape, trained
from tests.guarantee.world import NAMES, Recorder, Row, run
from tests.media import idefics3, image, recording, whisper

COLUMNS = {
    "image": 'image = "file", completion = "a"',
    "audio": 'audio = "file"',
}
MODULES = {"image": '["q_proj", "projector"]', "audio": '["q_proj", "fc1"]'}
Change = Callable[[Path, list[Row]], list[Row]]


def lay_out(folder: Path, base: Path, kind: str, change: Change) -> Path:
    """Two sites with twelve patients of two records each; north's are changed."""
    for name in NAMES:
        place = folder / name
        place.mkdir(parents=True)
        rows: list[Row] = []
        for number in range(24):
            file = place / f"{number}.{'png' if kind == 'image' else 'wav'}"
            made = image(file, number) if kind == "image" else recording(file, number)
            who = f"patient-{number // 2}"
            rows.append({"file": made, "q": "a mass?", "a": " yn"[number % 3], "who": who})
        rows = [row for row in rows if row["a"] != " "]
        if name == "north":
            rows = change(place, rows)
        (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        site = world.SITE.format(name=name, answers=COLUMNS[kind])
        site = site.replace(f"{name}.jsonl", f"{name}/data.jsonl")
        if kind == "audio":
            site = site.replace('prompt = "q"', 'text = "a"')
        (folder / f"site-{name}.toml").write_text(site)
    plan = world.STUDY.format(base=base, objective="causal_lm")
    plan = plan.replace('["q_proj", "down_proj"]', MODULES[kind])
    plan = plan.replace("last_layers = 2\n", "").replace("rounds = 3", "rounds = 2")
    (folder / "study.toml").write_text(plan)
    return folder / "study.toml"


def as_it_is(_: Path, rows: list[Row]) -> list[Row]:
    return rows


def broken(place: Path, rows: list[Row]) -> list[Row]:
    """Of every four files one is broken, one missing, one elsewhere."""
    (place.parent / "secret").write_bytes(b"elsewhere")
    for at, row in enumerate(rows):
        if at % 4 == 0:
            (place / row["file"]).write_bytes(b"no image, no sound")
        elif at % 4 < 3:
            row["file"] = "none" if at % 4 == 1 else "../secret"
    return rows


def nobody(_: Path, rows: list[Row]) -> list[Row]:
    return []


def long(place: Path, rows: list[Row]) -> list[Row]:
    """Images of another number of tiles; recordings longer than the window."""
    for at, row in enumerate(rows):
        file = place / row["file"]
        if file.suffix == ".png":
            image(file, at, (16, 64))
        else:
            recording(file, at, seconds=2.0)
    return rows


@pytest.fixture(scope="module", params=["image", "audio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = idefics3 if kind == "image" else whisper
    return make(tmp_path_factory.mktemp("wire") / "base")


@pytest.fixture(scope="module")
def usual(kind: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    return run(lay_out(tmp_path_factory.mktemp("usual") / "world", base, kind, as_it_is))


def test_nothing_leaves_but_what_the_list_names(usual: Recorder, kind: str) -> None:
    assert len(usual.replies) == 2 + 2 * 2 + 2
    assert outside(usual) == []
    names = {name.rsplit(".lora", 1)[0].rsplit(".", 1)[-1] for name in trained(usual)}
    assert names == ({"q_proj", "proj"} if kind == "image" else {"q_proj", "fc1"})


@pytest.mark.parametrize("change", [broken, nobody, long])
def test_the_wire_looks_the_same_whatever_the_files(
    usual: Recorder, tmp_path: Path, base: Path, kind: str, change: Any
) -> None:
    grid = run(lay_out(tmp_path / "world", base, kind, change))
    assert shape(grid) == shape(usual)


def test_no_log_names_a_file(
    tmp_path: Path, base: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(lay_out(tmp_path / "world", base, kind, broken))
    for name in ("secret", "none", "0.png", "0.wav"):
        assert name not in caplog.text
