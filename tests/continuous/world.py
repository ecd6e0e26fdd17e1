"""Two small hospitals and a study without a last round, on a clock that nobody waits for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.core.config import load_study
from fedtune.core.registry import process_cache
from fedtune.server import rounds
from fedtune.server.parts import Dependencies, Settings
from fedtune.server.schedule import SimulatedClock
from tests.guarantee.world import ANSWERS, NAMES, SITE, STUDY, Recorder, Row, patients

SCHEDULE = """
[evaluation]
path = "public.jsonl"
columns = { prompt = "q", completion = "a" }
[schedule]
every = "1h"
start = "2026-01-05T00:00:00Z"
"""
# At q = 1 and δ = 1e-3, LIFE rounds of a patient's life (test_cohorts holds it to that).
SIGMA, DELTA, LIFE = 2.5, 1e-3, 5
PRIVACY = f"epsilon = 3.0\nnoise_multiplier = {SIGMA}\n"


def study_text(base: Path, **changes: str) -> str:
    text = STUDY.format(base=base, objective="causal_lm").replace("rounds = 3\n", "")
    text = text.replace("noise_multiplier = 0.849\n", changes.get("privacy", PRIVACY))
    text = text.replace("sampling_rate = 0.5", "sampling_rate = 1.0")
    return text + changes.get("schedule", SCHEDULE)


def lay_out(
    folder: Path, base: Path, north: list[Row], policy: str = "max_epsilon = 3.0", **changes: str
) -> Path:
    """study.toml, the public records, and both sites; the southern one has twelve patients."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "north.jsonl", north)
    write(folder / "south.jsonl", patients(12))
    write(folder / "public.jsonl", [{"q": r["q"], "a": r["a"]} for r in patients(8)])
    for name in NAMES:
        (folder / f"site-{name}.toml").write_text(
            SITE.format(name=name, answers=ANSWERS["causal_lm"]) + policy + "\n"
        )
    (folder / "study.toml").write_text(study_text(base, **changes))
    return folder / "study.toml"


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(
    study: Path,
    upto: int,
    on_round: Callable[[int], None] | None = None,
    clock: SimulatedClock | None = None,
    **parts: Any,
) -> Recorder:
    """Rounds up to `upto`, going on from where the run stands; on_round: after each of them."""
    process_cache.clear("workers")
    grid = Recorder([study.parent / f"site-{name}.toml" for name in NAMES])

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "round" and on_round:
            on_round(data["round"])

    parts.setdefault("report", lambda out, body: None)  # its picture takes longest
    parts.setdefault("skip", False)  # what fails now fails again, for ever
    how = {name: parts.pop(name) for name in ("skip", "key", "receipts") if name in parts}
    clock = clock or SimulatedClock(1.8e9)
    settings = Settings(patience=0.0, pause=0.0, clock=clock, upto=upto, **how)
    made = Dependencies(settings=settings, **parts)
    out = study.parent / "run"
    rounds.run(grid, load_study(study), out, resume=True, parts=made, on_event=on_event)
    return grid
