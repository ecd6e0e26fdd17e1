"""Measure students of several sizes: the demo's run distilled into its base with fewer layers.

    python -m benchmarks.distillation --seeds 0 1 2 --layers 24 20 --out runs/students

Each seed: the run of the demo's three hospitals at ε = 8 is the teacher; a student is distilled on
public notes (the demo's own 180, or --prompts of the same kind) and measured on the test patients.
Settings are chosen with --held-out validation. Writes OUT/results.json and OUT/table.md; existing
teachers and rows are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

from benchmarks import measure
from fedtune import (
    Columns,
    DistillSettings,
    PublicTable,
    Run,
    distill,
    evaluate,
    load_sites,
    load_study,
    simulate,
)
from fedtune.demo.generate import NINE, public_notes, write


def teacher(out: Path, seed: int) -> Path:
    """The run of the demo's hospitals with nine desks, trained unless it is there."""
    run = out / f"teacher-{seed}"
    if not (run / "report.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        study = load_study(write(run / "data", seed, NINE))
        simulate(study, load_sites(run / "data" / "sites"), run)
    return run


def prompts(out: Path, run: Path, seed: int, count: int | None) -> Path:
    """The demo's public notes, or `count` of the same kind."""
    if count is None:
        return run / "data" / "public.jsonl"
    path = out / f"public-{seed}-{count}.jsonl"
    rows = public_notes(random.Random(f"distillation:{seed}"), count, NINE)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measured(run: Path, data: Path) -> tuple[float, float]:
    """Accuracy of the run's base and of its adapter."""
    result = evaluate(Run(run), data)
    return result["before"]["accuracy"], result["after"]["accuracy"]


def student(
    out: Path, seed: int, layers: int, settings: DistillSettings, count: int | None, held_out: str
) -> dict[str, float]:
    """One row of the table at one seed. kept: of the teacher's gain over its own base."""
    run = teacher(out, seed)
    test = run / "data" / f"{held_out}.jsonl"
    base, teacher_accuracy = measured(run, test)
    file = PublicTable(
        path=prompts(out, run, seed, count), columns=Columns(prompt="note"), licence="CC0-1.0"
    )
    folder, started = out / "student", time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    report = distill([Run(run)], file, folder, layers=layers, settings=settings).report
    took = time.monotonic() - started
    student_base, student_accuracy = measured(folder, test)
    size = report["base"]["parameters"]
    return {
        "teacher": teacher_accuracy,
        "base": student_base,
        "student": student_accuracy,
        "parameters": size,
    } | {
        "kept": (student_accuracy - base) / (teacher_accuracy - base),
        "seconds": round(took, 1),
    }


def table(results: measure.Results) -> str:
    """Means and standard deviations over the seeds, as Markdown; what is kept of the teacher's gain
    with the lower end of Student's 95 % interval."""
    lines = [
        "| student | seeds | accuracy | its own base | teacher | of its gain | least of a seed | "
        "at least, 95 % | seconds |",
        "|---" * 9 + "|",
    ]

    def over(rows: list[dict[str, float]], figure: str) -> str:
        values = [row[figure] for row in rows]
        return measure.mean_sd(values)

    for name, seeds in results.items():
        rows = list(seeds.values())
        cells = [over(rows, figure) for figure in ("student", "base", "teacher", "kept")]
        shares = [row["kept"] for row in rows]
        took = [row["seconds"] for row in rows]
        cells = [name, ", ".join(seeds), *cells, f"{min(shares):.3f}", measure.at_least(shares)]
        cells.append(f"{min(took):.0f}–{max(took):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[24], help="of the student")
    parser.add_argument(
        "--last-layers", type=int, help="that get an adapter (default: as the teacher)"
    )
    parser.add_argument("--rank", type=int, help="of the adapter (default: the teacher's)")
    parser.add_argument("--epochs", type=int, default=DistillSettings.epochs)
    parser.add_argument("--rate", type=float, default=DistillSettings.learning_rate)
    parser.add_argument("--prompts", type=int, help="public notes (default: the demo's own 180)")
    parser.add_argument("--held-out", choices=("test", "validation"), default="test")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    out = args.out.resolve()
    settings = DistillSettings(
        rank=args.rank,
        last_layers=args.last_layers,
        epochs=args.epochs,
        learning_rate=args.rate,
        new_tokens=1,
    )
    rows = {}
    for layers in args.layers:
        name = f"{layers} layers, {args.prompts or 180} notes"
        if args.last_layers is not None:
            name += f", adapters in the last {args.last_layers or layers}"
        name += f", rank {args.rank}" if args.rank else ""
        name += f", {args.epochs} epochs, rate {args.rate:g}" if args.epochs else ", not taught"
        rows[name + (", validation" if args.held_out == "validation" else "")] = layers

    def run(name: str, seed: str) -> dict[str, float]:
        return student(out, int(seed), rows[name], settings, args.prompts, args.held_out)

    measure.resume(out, [(name, str(seed)) for name in rows for seed in args.seeds], run, table)


if __name__ == "__main__":
    main()
