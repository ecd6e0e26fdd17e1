"""Ask three sites about held-out dialogues of MTS-Dialog, by section and by length.

    python -m benchmarks.held_out_groups --data DATA --out DIR [--sigma 2] [--held-out 180]

The eight most frequent sections; 180 dialogues train at each site, as many are held out, and the
others are public. It writes the files that `fedtune init --task classify` writes, adds the tables
of docs/private-evaluation.md, runs the study and prints the coordinator's table, with what each
figure is without noise, which no coordinator could compute."""

from __future__ import annotations

import argparse
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

from examples.write import jsonl, read_jsonl
from fedtune import load_sites, load_study, simulate
from fedtune.core.config import EvaluationTable
from fedtune.core.registry.bands import band_names, band_of
from fedtune.evaluation.evaluator import Evaluator
from fedtune.presets import Records, write
from fedtune.report.held_out import EVERY_SITE, write_shown
from fedtune.runs.run import Run

SITES, SECTIONS, TRAIN = ("north", "south", "west"), 8, 180
EDGES = (8, 16)  # turns of a dialogue
PLAN = """
[private_evaluation]
noise_multiplier = {sigma}
score = "accuracy"
classes = true
bands = {{ turns = [{edges}] }}
"""
EVALUATION = """
[evaluation]
path = "{held}"
disjoint_from = ["records"]
groups = {{ turns = "turns" }}
columns = {{ text = "dialogue", label = "section" }}

[policy]
release = ["evaluation"]
"""


def rows_of(data: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(data / "mts_dialog" / "train.jsonl")
    kept = {name for name, _ in Counter(row["section"] for row in rows).most_common(SECTIONS)}
    chosen = [row for row in rows if row["section"] in kept]
    random.Random(0).shuffle(chosen)
    names = ("dialogue", "section")
    return [
        {name: row[name] for name in names} | {"turns": len(row["dialogue"].splitlines())}
        for row in chosen
    ]


def lay_out(data: Path, out: Path, sigma: float, held_out: int) -> Path:
    """Write the sites' and the public files, and the study; returns study.toml."""
    rows, each = rows_of(data), TRAIN + held_out
    files = []
    for at, name in enumerate(SITES):
        mine = rows[at * each : (at + 1) * each]
        files.append(out / "data" / f"{name}.jsonl")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        jsonl(files[-1], mine[:TRAIN])
        jsonl(out / "data" / f"held-{name}.jsonl", mine[TRAIN:])
    jsonl(out / "data" / "public.jsonl", rows[len(SITES) * each :])
    records = Records(
        prompt="dialogue",
        target="section",
        data=tuple(files),
        evaluation=out / "data" / "public.jsonl",
        size=TRAIN,
    )
    study, *_ = write(out / "study", "classify", records)
    edges = ", ".join(map(str, EDGES))
    study.write_text(study.read_text() + PLAN.format(sigma=sigma, edges=edges))
    for name in SITES:
        path = out / "study" / "sites" / name / "site.toml"
        held = (out / "data" / f"held-{name}.jsonl").absolute()
        text = path.read_text().replace("[policy]\n", EVALUATION.format(held=held), 1)
        path.write_text(text)
    return study


def without_noise(run: Run, data: Path) -> dict[tuple[str, str], tuple[int, float]]:
    """Compute what all sites together would have answered without noise: by row of the table, how
    many dialogues there are and the share of them that is right."""
    columns = {"text": "dialogue", "label": "section"}
    right = dict[tuple[str, str], list[bool]]()
    for name in SITES:
        file = data / f"held-{name}.jsonl"
        table = EvaluationTable.model_validate(
            {"path": file, "columns": columns, "metric": "accuracy"}
        )
        asked = run.study.model_copy(update={"evaluation": table})
        scores = Evaluator(asked, {}).scores(run.adapter())
        for row, is_right in zip(read_jsonl(file), scores.exact.tolist(), strict=True):
            band = band_names(EDGES)[band_of(str(row["turns"]), EDGES) or 0]
            for cell in ("all", f"class: {row['section']}", f"turns: {band}"):
                for site in (EVERY_SITE, name):
                    right.setdefault((cell, site), []).append(bool(is_right))
    return {key: (len(found), sum(found) / len(found)) for key, found in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--sigma", type=float, default=2.0, help="noise of an answer")
    parser.add_argument("--held-out", type=int, default=180, help="dialogues at each site")
    options = parser.parse_args()
    study = lay_out(options.data, options.out, options.sigma, options.held_out)
    run = simulate(load_study(study), load_sites(study.parent / "sites"), options.out / "run")
    shown, exact = write_shown(run.report), without_noise(run, options.out / "data")
    assert shown is not None
    for row in shown.rows:
        count, share = exact.get((row[0], row[1]), (0, math.nan))
        print("|", " | ".join((*row, f"{share:.2f} of {count}")), "|")
    print(*shown.lines, sep="\n")
    print("ε of the held-out dialogues:", run.report["privacy"]["evaluation"]["epsilon"])


if __name__ == "__main__":
    main()
