"""What test_site.py and test_site_refusals.py share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedtune.core.config import Site
from fedtune.core.files.room import BLOCK, LEDGER, Room
from fedtune.core.vault.worker import SiteWorker
from fedtune.public.start import Start, start
from tests.dp.conftest import study


def notes(folder: Path, patients: int = 12) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "notes.jsonl"
    rows = [
        {"who": f"p{p}", "note": f"fever and cough, day {n}", "answer": "yes" if p % 2 else "no"}
        for p in range(patients)
        for n in range(1 + p % 3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_site(folder: Path, policy: dict[str, object] | None = None, **columns: str) -> Site:
    return Site.model_validate(
        {
            "site": {"name": "a", "declared_size": 12, "state": str(folder / "state")},
            "data": {
                "path": str(folder / "notes.jsonl"),
                "columns": {"prompt": "note", "completion": "answer"} | columns,
            },
            "policy": {"bases": "any", "max_delta": 1e-4} | (policy or {}),
        },
        strict=False,
    )


def room_of(site: Site) -> int:
    """Return the length that the file beside a site's ledger has to have now."""
    room = Room(site.site.state, site.site.declared_size)
    files = [site.site.state / LEDGER, *site.site.state.glob("audit*.jsonl")]
    return room.size - sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files)


def begun(base: Path, **changes: object) -> Start:
    privacy = {"epsilon": 6.0, "delta": 1e-4, "unit": "patient"}
    body: dict[str, object] = {"base": {"model": str(base), "dtype": "float32"}, "privacy": privacy}
    return start(study(**(body | changes)))


def trains(worker: SiteWorker, made: Start, round_: int) -> dict[str, np.ndarray]:
    return worker.train(made.study.digest, round_, made.adapter).delta
