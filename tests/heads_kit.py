"""Runs with a head, or with choices, made on the spot: a plan, random trained arrays, a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.core.config import Study
from fedtune.core.models.build import build
from fedtune.core.run_folder import write_plan
from fedtune.runs.run import Run

LABELS = ("fever", "cough", "no finding")
TEXTS = (
    "The patient was seen with fever.",
    "Blood pressure 120 over 80; a cough for two weeks.",
    "Discharged.",
    "Question: does aspirin lower the risk of stroke? Answer: maybe.",
)
CLASSIFY = {"name": "classify", "labels": list(LABELS), "max_length": 64}
ENCODER_LORA = {"rank": 2, "modules": ["query", "value"]}
CAUSAL_LORA = {"rank": 2, "modules": ["q_proj", "down_proj"], "last_layers": 2}
REPORT = {
    "study": "notes",
    "private": True,
    "base": {},
    "privacy": {"epsilon": 3.0, "delta": 1e-4, "unit": "record", "relation": "add or remove one"},
}


def made_run(folder: Path, base: Path | str, objective: dict[str, Any], **tables: Any) -> Run:
    """A finished run whose trained arrays are random numbers, equal at every call."""
    study = Study.model_validate(
        {
            "study": {"name": "notes"},
            "base": {"model": str(base), "dtype": "float32"},
            "lora": None,
            "objective": objective,
            "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 0.1},
            "clipping": {},
            "privacy": {"epsilon": 3.0, "delta": 1e-4},
        }
        | tables,
        strict=False,
    )
    network = build(study)
    before, draw = network.trainable(), np.random.default_rng(0)
    network.draw_factor(1)
    arrays = {n: draw.normal(size=a.shape).astype(np.float32) for n, a in before.items()}
    arrays = {n: a if n.startswith("head") else a / 2 for n, a in arrays.items()}
    with network.loaded(trainable=arrays):
        network.save(folder / "adapter")
    write_plan(folder, study)
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "report.md").write_text("# notes\n\nε = 3.\n")
    return Run(folder)


def evaluation(path: Path, columns: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"path": str(path), "columns": columns, **more}
