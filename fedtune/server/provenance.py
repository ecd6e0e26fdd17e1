"""Describe in a report how a run was made: times, machine, versions, settings, and who signed.

The figures come from the coordinator's clock, machine and packages, from the plan, and from the
sites' declarations. No figure is measured at a site, and no site sends one for this purpose."""

from __future__ import annotations

import os
import platform
import sys
import time
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import fedtune
from fedtune.server.store import Progress

LIBRARIES = ("flwr", "torch", "transformers", "peft", "opacus", "dp-accounting")
CPU = Path("/proc/cpuinfo")
UTC_SECONDS = "%Y-%m-%dT%H:%M:%SZ"


def clock_round(started: float) -> dict[str, Any]:
    """Return a round's duration in seconds since `started` (monotonic clock), and the time at which
    it ended (UTC).

    >>> sorted(clock_round(0.0))
    ['ended', 'seconds']
    """
    ended = datetime.now(UTC).strftime(UTC_SECONDS)
    return {"seconds": round(time.monotonic() - started, 3), "ended": ended}


def describe_provenance(progress: Progress) -> dict[str, Any]:
    """Return a report's sections "ran" (times, machine, versions), "settings" (of the plan) and
    "signed" (site -> its declared size, its key, and the number of rounds in which its signed
    update counted)."""
    return {
        "ran": _times(progress.history) | {"machine": machine(), "versions": versions()},
        "settings": _settings(progress),
        "signed": _describe_signers(progress),
    }


def machine() -> dict[str, Any]:
    """Describe this machine without its name, for a report: "system", "processor", "cores" and
    "gpu". What is not known, or not there, is left out."""
    facts = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "gpu": _gpu(),
    }
    return {name: fact for name, fact in facts.items() if fact}


def versions() -> dict[str, str]:
    """Return package -> version for fedtune, Python and the packages on which a run's figures
    depend, as far as they are installed."""
    found = {"fedtune": fedtune.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = CPU.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor()


def _gpu() -> str:
    torch = sys.modules.get("torch")  # imported if this process trained or measured anything
    if torch is None or not torch.cuda.is_available():
        return ""
    count = torch.cuda.device_count()
    return f"{count} × {torch.cuda.get_device_name(0)}"


def _times(history: list[dict[str, Any]]) -> dict[str, str]:
    """Return "began", the time at which the first round began (its end minus its duration), and
    "ended", the time at which the last round ended, both in UTC; {} if there was no round, or the
    rounds were saved by an earlier release, which stored no times."""
    ended = [entry["ended"] for entry in history if "ended" in entry]
    if not ended or "ended" not in history[0]:
        return {}
    first = datetime.strptime(ended[0], UTC_SECONDS).replace(tzinfo=UTC)
    began = first - timedelta(seconds=history[0]["seconds"])
    return {"began": began.strftime(UTC_SECONDS), "ended": ended[-1]}


def _settings(progress: Progress) -> dict[str, Any]:
    study, training = progress.study, progress.study.training
    facts = {
        "objective": study.objective.name,
        "strategy": study.strategy.name,
        "options": dict(study.strategy.options),
        "weights": study.strategy.weights,
        "optimizer": training.optimizer,
        "learning_rate": training.learning_rate,
        "rounds": training.rounds,
        "local_steps": training.local_steps,
    }
    return {name: fact for name, fact in facts.items() if fact not in (None, {})}


def _describe_signers(progress: Progress) -> dict[str, Any]:
    rounds = [entry["participants"] for entry in progress.history]
    return {
        name: {
            "declared_size": progress.sizes[name],
            "key": progress.keys.get(name),
            "updates": sum(name in participants for participants in rounds),
        }
        for name in sorted(progress.sizes)
    }
