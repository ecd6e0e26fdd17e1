"""Five hospitals whose held-out notes are of two classes, and a study that asks about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STUDY = """
[study]
name = "splits"
[base]
model = "{base}"
dtype = "float32"
[objective]
name = "classify"
labels = ["benign", "malignant"]
max_length = 32
[training]
rounds = 1
sampling_rate = 0.5
learning_rate = 0.5
[clipping]
max_grad_norm = 0.5
[privacy]
noise_multiplier = 2.0
delta = 1e-3
unit = "patient"
max_records_per_unit = 4
[strategy]
min_sites = {sites}
"""
SITE = """
[site]
name = "{name}"
declared_size = 20
state = "state-{name}"
[data]
path = "{name}.jsonl"
columns = {{ text = "note", label = "finding", patient = "who" }}
[evaluation]
path = "held-{name}.jsonl"
columns = {{ text = "note", label = "finding", patient = "who" }}
disjoint_from = ["records"]
groups = {{ sex = "gender", age = "years" }}
[policy]
bases = "any"
release = ["evaluation"]
max_epsilon = 1e9
max_epsilon_per_study = 1e9
min_noise_multiplier = 0.0
"""
APART = """classes = true
score = "accuracy"
groups = { sex = ["female", "male"] }
bands = { age = [18, 65] }
"""


def note(who: str, finding: str, **more: Any) -> Row:
    return {"who": who, "note": f"a scan of {who}", "finding": finding, **more}


def of_classes(name: str, benign: int, malignant: int) -> list[Row]:
    found = [note(f"{name}-b{n}", "benign") for n in range(benign)]
    return found + [note(f"{name}-m{n}", "malignant") for n in range(malignant)]


def lay_out(
    folder: Path, base: Path, held_out: Mapping[str, list[Row]], sigma: float, apart: str = APART
) -> tuple[Path, list[Path]]:
    """Write the study and each site's files; returns study.toml and the site files."""
    folder.mkdir(parents=True, exist_ok=True)
    table = f"[private_evaluation]\nnoise_multiplier = {sigma}\n{apart}"
    (folder / "study.toml").write_text(STUDY.format(base=base, sites=len(held_out)) + table)
    sites = []
    for name, rows in held_out.items():
        written = {name: of_classes(f"{name}-train", 8, 8), f"held-{name}": rows}
        for file, notes in written.items():
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in notes))
        sites.append(folder / f"site-{name}.toml")
        sites[-1].write_text(SITE.format(name=name))
    return folder / "study.toml", sites
