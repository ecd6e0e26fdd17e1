"""Measure processor time and memory of commands that read and compute nothing large.

    OMP_NUM_THREADS=1 python -m benchmarks.startup [--repeats 5]

Each command in a process of its own, on the study and site that `fedtune init` writes and on the
kept run of tests/formats; processor time is user and system together, so that other work on the
machine counts little. Medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

STORED_RUN = Path(__file__).parents[1] / "tests" / "formats" / "data" / "1"
# A study.toml has no digest to sign before its base is loaded and the adapter's frozen factor made.
RESOLVES = ("review", "triage.toml", "--site", "site-north.toml", "--digest")
COMMANDS = (
    ("--help",),
    ("models", "list"),
    ("plan", "new/study.toml", "--size", "200"),
    ("plan", "triage.toml", "--size", "200"),
    ("status", "triage", "--once"),
    ("versions", "daily"),
    ("ledger", "site-north.toml"),
    ("review", "triage/plan.json", "--site", "site-north.toml"),
    ("review", "triage.toml", "--site", "site-north.toml"),
    RESOLVES,
)


class Cost(NamedTuple):
    seconds: float  # of processor time
    memory: float  # MiB at most


def world(folder: Path) -> Path:
    """A new study and a copy of the kept run, its secrets readable by their owner alone."""
    shutil.copytree(STORED_RUN, folder, symlinks=True)
    for secret in (*folder.glob("state-*/site.key"), *folder.glob("state-*/salt")):
        secret.chmod(0o600)
    once(("init", "new"), folder)
    return folder


def once(command: tuple[str, ...], folder: Path) -> Cost:
    """Run `command` in `folder`. Errors: RuntimeError where it fails."""
    arguments = [sys.executable, "-m", "fedtune", *command]
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(arguments, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {output.read().decode()[-500:]}")
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    print("| command | processor time, s | memory, MiB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        folder_of_world = world(Path(folder) / "world")
        for command in COMMANDS:
            costs = [once(command, folder_of_world) for _ in range(chosen.repeats)]
            seconds, memory = (median(column) for column in zip(*costs, strict=True))
            print(f"| `fedtune {' '.join(command)}` | {seconds:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
