"""What test_private_evaluation.py and test_private_evaluation_wire.py share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.core.dp.steplog import StepLog
from fedtune.core.vault.prepared import Update
from fedtune.core.wire.codec import VALUES
from tests.guarantee.world import NAMES, lay_out, patients
from tests.server.fakes import Trial

WILLING = 'release = ["evaluation"]\n'
HELD_OUT = """[evaluation]
path = "held-{name}.jsonl"
columns = {{ prompt = "q", completion = "a", patient = "who" }}
"""


APART = 'disjoint_from = ["records"]\n'


def held_out(count: int, records: int = 2) -> list[dict[str, str]]:
    return [
        {"who": f"held-out-{p}", "q": f"a cough since {p * 5 + n} weeks", "a": "ny"[p % 2]}
        for p in range(count)
        for n in range(records + p % 2)
    ]


def world(
    folder: Path,
    base: Path,
    sigma: float,
    north: list[dict[str, str]] | None = None,
    *,
    every: int = 2,
    policy: str = WILLING,
    table: str = HELD_OUT + APART,
) -> Path:
    """The two hospitals with held-out records; `north` replaces the first one's. Queries after
    rounds 2 and 3."""
    study = lay_out(folder, base, patients(12))
    with study.open("a") as file:
        file.write(f"[private_evaluation]\nnoise_multiplier = {sigma}\nevery = {every}\n")
    for name in NAMES:
        rows = held_out(12) if north is None or name != "north" else north
        (folder / f"held-{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        with (folder / f"site-{name}.toml").open("a") as file:
            file.write(policy + table.format(name=name))
    return study


def log(study: Path, name: str) -> StepLog:
    return StepLog(study.parent / f"state-{name}" / "steps.jsonl")


def found(run: Trial) -> list[dict[str, Any]]:
    lines = (run.folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [e["private_quality"] for e in map(json.loads, lines) if "private_quality" in e]


def sums(*values: float, **event: float) -> Callable[[Update], Update]:
    """An answer with other numbers, or another event."""

    def changed(update: Update) -> Update:
        delta = {VALUES: np.array(values, np.float32)} if values else update.delta
        return Update(delta, [{**each, **event} for each in update.events])

    return changed
