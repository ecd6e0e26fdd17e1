"""The examples of docs/extending.md, installed as a distribution of their own: each passes the
contracts of its kind, and together they train."""

from __future__ import annotations

import json
import random
import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.core.errors import Refused
from fedtune.observe import observer
from fedtune.observe.trackers import TRACKERS
from fedtune.officer.site_files import sites_in
from tests.docs.pages import ROOT, Block, read
from tests.plugins import install
from tests.simulated import simulate

BLOCKS = read((ROOT / "docs/extending.md").read_text(encoding="utf-8")).blocks
(POINTS,) = (
    tomllib.loads(block.text)["project"]["entry-points"]
    for block in BLOCKS
    if "entry-points" in block.text
)
STUDY = """
privacy = "off"
[study]
name = "extended"
[base]
model = "{base}"
dtype = "float32"
modality = "small_letters"
[lora]
rank = 4
alpha = 8
modules = ["q_proj", "down_proj"]
last_layers = 2
[objective]
name = "focal"
max_length = 64
options = {{ gamma = 0.5 }}
[training]
rounds = 3
sampling_rate = 1.0
learning_rate = 5.0
[clipping]
mode = "normalised"
[strategy]
name = "median"
min_sites = 2
[evaluation]
path = "test.jsonl"
columns = {{ prompt = "q", completion = "a" }}
"""
SITE = """
[site]
name = "{name}"
declared_size = 30
[data]
path = "{name}.jsonl"
columns = {{ prompt = "prompt", completion = "completion" }}
convert = {{ name = "letters", options = {{ column = "text" }} }}
[policy]
bases = "any"
allow_privacy_off = true
{policy}
"""
NAMED = """objectives = ["release", "focal"]
strategies = ["median"]
modalities = ["small_letters"]
"""


def modules() -> dict[str, Block]:
    named = {re.match(r"# (\w+)\.py\n", block.text): block for block in BLOCKS}
    return {found[1]: block for found, block in named.items() if found}


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, block in modules().items():
        own = {
            group: {n: value for n, value in points.items() if value.startswith(f"{module}:")}
            for group, points in POINTS.items()
        }
        install(tmp_path / "installed" / module, monkeypatch, module, block.text, own)


def records(path: Path, count: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    rows = [{"text": f"Day {draw.randint(1, 99)}: |Home in a WEEK"} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lay_out(folder: Path, base: Path, policy: str) -> Path:
    for name in ("north", "south"):
        place = folder / "sites" / name
        place.mkdir(parents=True)
        records(place / f"{name}.jsonl", 30)
        (place / "site.toml").write_text(SITE.format(name=name, policy=policy))
    rows = [{"q": f"Day {day}: ", "a": "Home in a WEEK"} for day in range(10)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "study.toml").write_text(STUDY.format(base=base))
    return folder / "study.toml"


def test_there_is_an_example_of_each_kind_and_none_is_long() -> None:
    assert set(POINTS) == {
        f"fedtune.{kind}"
        for kind in ("objectives", "strategies", "modalities", "converters", "trackers")
    }
    values = [value for points in POINTS.values() for value in points.values()]
    assert sorted(value.partition(":")[0] for value in values) == sorted(modules())
    assert all(len(block.text.splitlines()) <= 30 for block in modules().values())


def checked(*words: str) -> str:
    found = CliRunner().invoke(app, ["check-plugin", *words], env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    assert "BAD" not in found.output
    return found.output


@pytest.mark.parametrize(
    ("words", "checks"),
    [
        (("focal", "--option", "gamma=2"), ["parity (auto)", "isolation (opacus)", "repeatable"]),
        (("median", "--group", "strategies"), ["order of arrival", "state"]),
        (("small_letters", "--group", "modalities"), ["place-holders", "sensitivity"]),
        (("lines", "--group", "trackers"), ["events"]),
    ],
    ids=lambda words: words[0],
)
def test_an_example_passes_the_contracts_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], checks: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = checked(*words)
    assert all(f"ok   {check}: " in said for check in checks)


def test_the_converter_passes_its_contracts(tmp_path: Path) -> None:
    path = str(records(tmp_path / "a.jsonl", 8))
    words = ("letters", "--group", "converters", "--file", path, "--option", "column=text")
    assert "ok   one unit at a time: " in checked(*words)
    found = CliRunner().invoke(app, ["check-plugin", *words[:-1], "column=absent"])
    assert found.exit_code == 2 and "BAD  converts: 8, at most 0" in found.output


COUNTING = """
from dataclasses import dataclass
from fedtune.core.data.converters import Converter
SEEN = []

@dataclass(frozen=True)
class Counting(Converter):
    def convert(self, rows):
        SEEN.append(1)
        return [{**row, "number": len(SEEN)} for row in rows]
"""


def test_a_converter_that_remembers_units_fails_its_contracts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"fedtune.converters": {"counting": "counting_of:Counting"}}
    install(tmp_path / "twin", monkeypatch, "counting_of", COUNTING, points)
    path = str(records(tmp_path / "a.jsonl", 4))
    words = ["check-plugin", "counting", "--group", "converters", "--file", path]
    found = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert found.exit_code == 2 and "BAD  one unit at a time: 3, at most 0" in found.output
    assert "ok   converts: " in found.output and "ok   repeatable: " in found.output


@pytest.mark.long
def test_they_train_together_and_a_tracker_is_told(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = lay_out(tmp_path, tiny_base, NAMED)
    lines = TRACKERS.build("lines", {"path": str(tmp_path / "told.txt")})
    with observer("coordinator", tmp_path / "run", trackers=[lines]) as seen:
        body = simulate(study, sites_in(tmp_path / "sites"), tmp_path / "run", on_event=seen)
    quality = body["quality"]
    assert quality["after"]["loss"] < quality["before"]["loss"] - 0.05
    told = (tmp_path / "told.txt").read_text().splitlines()
    assert [line.split()[0] for line in told] == ["1", "2", "3"] and "loss" in told[0]


def test_a_site_that_names_none_of_them_takes_no_part(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the same study, under a policy of the release alone."""
    monkeypatch.chdir(tmp_path)
    study = lay_out(tmp_path, tiny_base, "")
    with pytest.raises(Refused, match=r"policy\.objectives does not list 'focal'"):
        simulate(study, sites_in(tmp_path / "sites"), tmp_path / "run")


BATCH_MEAN = """
from dataclasses import dataclass
from fedtune.core.objectives import Objective, likelihood

@dataclass(frozen=True)
class BatchMean(Objective):
    record_format = "text"

    def losses(self, network, batch):
        mean = likelihood(network, batch).mean
        return (mean - mean.mean() / 2) ** 2
"""


@pytest.mark.long
def test_an_objective_that_couples_records_fails_its_contracts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"fedtune.objectives": {"batch_mean": "batch_mean_of:BatchMean"}}
    install(tmp_path / "twin", monkeypatch, "batch_mean_of", BATCH_MEAN, points)
    found = CliRunner().invoke(app, ["check-plugin", "batch_mean"], env={"COLUMNS": "200"})
    assert found.exit_code == 2 and "do not train with it" in found.output
    for check in ("parity (auto)", "isolation (auto)", "alone or in a batch"):
        assert f"BAD  {check}: " in found.output
    assert "ok   repeatable: " in found.output
    assert "batch_mean_of" in sys.modules
