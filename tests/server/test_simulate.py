"""A whole study with real sites, a tiny model and real noise; only the records are invented."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtune.core.errors import ConfigError
from fedtune.core.registry import process_cache
from fedtune.officer.site_files import sites_in
from tests.simulated import simulate

STUDY = """
[study]
name = "tiny"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 2
last_layers = 2
[objective]
name = "causal_lm"
max_length = 32
[training]
rounds = 2
sampling_rate = 0.5
learning_rate = 0.5
[clipping]
[privacy]
noise_multiplier = 2.0
delta = 1e-3
[strategy]
min_sites = 2
[evaluation]
path = "held-out.jsonl"
columns = {{ prompt = "q", completion = "a" }}
"""
SITE = """
[site]
name = "{name}"
declared_size = 12
state = "state-{name}"
[data]
path = "{name}.jsonl"
columns = {{ prompt = "q", completion = "a" }}
[policy]
bases = "any"
"""


@pytest.fixture
def world(tmp_path: Path, tiny_base: Path) -> Path:
    """study.toml, site-a.toml, site-b.toml and their records."""
    (tmp_path / "study.toml").write_text(STUDY.format(base=tiny_base))
    records = [{"q": f"does {k} help?", "a": " yes" if k % 2 else " no"} for k in range(12)]
    for name in ("a", "b", "held-out"):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    for name in ("a", "b"):
        (tmp_path / f"site-{name}.toml").write_text(SITE.format(name=name))
    return tmp_path


def test_a_study_runs_from_files_to_report(world: Path):
    body = simulate(world / "study.toml", sites_in(world), world / "out")
    assert body["rounds"][-1]["participants"] == ["a", "b"]
    sites = body["privacy"]["sites"]
    assert all(site["steps"] == 2 and site["noise_multiplier"] == 2.0 for site in sites.values())
    assert 0 < body["privacy"]["epsilon"] < 8
    assert body["quality"]["before"]["loss"] != body["quality"]["after"]["loss"]
    names = {path.name for path in (world / "out").iterdir()}
    assert names == {
        "adapter", "checkpoint", "evidence.json", "metrics.jsonl", "plan.json",
        "progress.png", "report.json", "report.md", "signature.json",
    }  # fmt: skip
    adapter = load_file(world / "out" / "adapter" / "adapter_model.safetensors")
    moved = [np.abs(a).max() for n, a in adapter.items() if "lora_B" in n]
    assert moved and min(moved) > 0
    logged = (world / "state-a" / "steps.jsonl").read_text().splitlines()
    assert len(logged) == 2
    assert json.loads((world / "out" / "report.json").read_text())["plan_digest"].startswith("sha")


def test_a_run_that_cost_nothing_says_so(world: Path):
    """The sites send again what they had stored. Twin: the first run is paid for."""
    told: list[list[str]] = []
    for name in ("out", "again"):
        told.append([])
        hear = partial(_hear, told[-1])
        simulate(world / "study.toml", sites_in(world), world / name, on_event=hear)
    free = [[text for text in texts if "cost no ε" in text] for texts in told]
    assert free[0] == [] and free[1][0].startswith("a, b: what was stored"), free


def _hear(texts: list[str], event: str, data: dict[str, Any]) -> None:
    texts.append(str(data.get("text")))


def test_a_simulation_that_was_stopped_is_resumed_by_a_new_process(world: Path):
    def stop(kind: str, data: dict[str, object]) -> None:
        if kind == "round":
            raise KeyboardInterrupt

    sites = sites_in(world)
    with pytest.raises(KeyboardInterrupt):
        simulate(world / "study.toml", sites, world / "out", on_event=stop)
    process_cache.clear("workers")  # the sites' state is all that a new process finds
    for folder in (world / "out", world / "state-a"):
        (folder / f"half.{os.getpid()}.new").touch()
    body = simulate(world / "study.toml", sites, world / "out", resume=True)
    assert not list(world.rglob("*.new"))
    assert [entry["participants"] for entry in body["rounds"]] == [["a", "b"]] * 2
    assert all(site["steps"] == 2 for site in body["privacy"]["sites"].values())


def test_site_files_are_found_and_studies_are_not(world: Path):
    assert [p.name for p in sites_in(world)] == ["site-a.toml", "site-b.toml"]
    (world / "north").mkdir()
    (world / "north" / "site.toml").write_text(SITE.format(name="north"))
    assert len(sites_in(world)) == 3
    assert len(sites_in([world / "site-a.toml", world / "north"])) == 2
    (world / "empty").mkdir()
    with pytest.raises(ConfigError, match="no site file"):
        sites_in(world / "empty")
    (world / "site-c.toml").write_text("[site\n")
    with pytest.raises(ConfigError, match=r"site-c\.toml: not valid TOML"):
        sites_in(world)


def test_what_cannot_be_a_study_is_said_at_once(world: Path):
    a = world / "site-a.toml"
    with pytest.raises(ConfigError, match="min_sites = 2"):
        simulate(world / "study.toml", [a], world / "out")
    with pytest.raises(ConfigError, match="both are called a"):
        simulate(world / "study.toml", [a, a], world / "out")
    assert not (world / "out").exists()
