"""A small study of several sites for tests of secure aggregation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import fedtune
from fedtune.core.config import Site, Study, load_site, load_study

STUDY = """
privacy = {privacy}
[study]
name = "shared"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 2
alpha = 4
modules = ["q_proj"]
last_layers = 1
[objective]
name = "causal_lm"
max_length = 64
[training]
rounds = {rounds}
sampling_rate = {rate}
learning_rate = 0.5
[clipping]
max_grad_norm = 0.5
{unit}
[strategy]
min_sites = {sites}
round_timeout = 60
[wire]
update = "float32"
adapter = "float32"
"""
SITE = """
[site]
name = "{name}"
declared_size = 20
state = "{name}-state"
[data]
path = "{name}.jsonl"
columns = {{ prompt = "q", completion = "a", patient = "who" }}
[policy]
bases = "any"
allow_privacy_off = true
max_fallback_epsilon = 100.0
max_epsilon = 100.0
max_epsilon_per_study = 100.0
"""
NAMES = ("north", "south", "west", "east")
PRIVATE = '{{ epsilon = {epsilon}, delta = 1e-3, unit = "patient" }}'


def lay_out(
    folder: Path,
    base: Path,
    *,
    epsilon: float | None = None,
    sites: int = 3,
    rounds: int = 2,
    rate: float = 1.0,
    secure: bool = True,
    colluding: int = 1,
) -> tuple[Study, list[Site]]:
    """Write a study and its sites; epsilon None: privacy is off."""
    folder.mkdir(parents=True, exist_ok=True)
    off = epsilon is None
    privacy = '"off"' if off else PRIVATE.format(epsilon=epsilon).replace("{{", "{")
    text = STUDY.format(
        base=base,
        privacy=privacy.replace("}}", "}"),
        unit='unit = "patient"' if off else "",
        sites=sites,
        rounds=rounds,
        rate=rate,
    )
    if secure:
        text += f"[secure_aggregation]\ncolluding = {colluding}\n"
    (folder / "study.toml").write_text(text)
    loaded = []
    for at, name in enumerate(NAMES[:sites]):
        rows = [
            {"q": f"{name} asks {n % 3}", "a": f"answer {(n + at) % 5}", "who": f"{name}{n}"}
            for n in range(14 + at)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.toml").write_text(SITE.format(name=name))
        loaded.append(load_site(folder / f"{name}.toml"))
    return load_study(folder / "study.toml"), loaded


def adapter_of(run: Any) -> dict[str, np.ndarray]:
    return load_file(Path(run.folder) / "adapter" / "adapter_model.safetensors")


__all__ = ["adapter_of", "fedtune", "lay_out"]
