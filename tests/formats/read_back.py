"""What the public functions read from a set of files: written down when the set is made, and asked
of every later release."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from fedtune.core.config import load_site, load_study
from fedtune.core.dp.steplog import StepLog
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.spending import budget
from fedtune.core.run_folder import load_plan
from fedtune.observe.status import read_status
from fedtune.report.run_files import read_report
from fedtune.runs.verify_model import verify
from fedtune.server.store import load
from fedtune.server.versions import Versions

SITES = ("north", "south")
FINISHED = ("notes", "triage", "daily")
STUDIES = (*FINISHED, "broken")


def expected(folder: Path) -> dict[str, Any]:
    """Everything below; `folder` must be the working directory, since the plans name the base
    relative to it."""
    return {
        "sites": {name: site(folder / f"site-{name}.toml") for name in SITES},
        "runs": {name: run(folder / name) for name in FINISHED},
        "versions": versions(folder / "daily"),
        "checkpoint": checkpoint(folder / "broken", folder / "broken.toml"),
    }


def site(path: Path) -> dict[str, Any]:
    """What a site's ledger and step log say it spent, on whom, and whether it was sent."""
    here = load_site(path)
    ledger, dataset = Ledger(here.site.state), here.data.name
    ledger.verify()
    spent = ledger.spending(dataset)
    steps = Counter(step.study for step in StepLog(here.site.state / "steps.jsonl").steps())
    plans = [load_plan(path.parent / study).digest for study in STUDIES]
    return {
        "head": list(ledger.head),
        "datasets": ledger.datasets,
        "charges": [
            {"seq": s.seq, "kind": s.kind, "released": s.released, **s.charge.fields()}
            for s in spent
        ],
        "epsilon": budget(dataset, spent, here.policy).epsilon,
        "cohorts": [
            {
                "units": cohort.units,
                "charges": len(cohort.spent),
                "epsilon": budget(dataset, cohort.spent, here.policy).epsilon,
            }
            for cohort in ledger.cohorts(dataset)
        ],
        "unknown": len(ledger.unknown(dataset, "patient")),
        "withdrawn": len(ledger.withdrawn()),
        "admitted": [plan for plan in plans if ledger.admitted(plan)],
        "kept_updates": sum(
            ledger.released(s.charge.study, s.charge.round, s.adapter) is not None for s in spent
        ),
        "steps": dict(sorted(steps.items())),
    }


def run(folder: Path) -> dict[str, Any]:
    """What a finished run's plan, report, metrics, status and adapter say."""
    body = read_report(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    name, digest = verify(str(folder))
    return {
        "name": name,
        "digest": digest,
        "plan": load_plan(folder).digest,
        "privacy": body["privacy"],
        "quality": body["quality"],
        "rounds": [json.loads(line)["round"] for line in lines],
        "state": read_status(folder).state,
    }


def versions(folder: Path) -> list[list[Any]]:
    """What was decided about each version, and which is in use."""
    index = Versions(folder).index()
    assert index is not None
    return [[v.number, v.decision, v.number == index.champion] for v in index.versions]


def checkpoint(folder: Path, study: Path) -> dict[str, Any]:
    """Where an interrupted run is."""
    kept = load(folder, load_study(study))
    assert kept is not None
    return {
        "phase": str(kept.phase),
        "round": kept.round,
        "rounds": kept.history,
        "state": read_status(folder).state,
        "sites": kept.sizes,
        "receipts": sorted(kept.receipts),
    }
