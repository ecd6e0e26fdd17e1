"""What the forecast of a release's gain says, against what the release then gains.

    python -m benchmarks.expected_gain --data DATA --out runs/prototypes

The cells of benchmarks.prototypes: the same sets, sizes, ε, seeds, divisions and noise. The
forecast sees a division's public records, the sites' sizes and the noise; of classes that public
records lack, the share that the sites' units have. Both gains are over the discriminant of public
records alone. OUT/expected.json has every cell, OUT/expected.md the table.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import prototypes
from benchmarks.prototypes import EPSILONS, SETS, SILENT, Division, Records
from fedtune.core.dp.accountant import calibrate
from fedtune.evaluation.expected_gain import DRAWS, LEAST, Sites, World
from fedtune.report.delta import delta_for
from fedtune.strategies import _posterior as posterior

CHOSE = ("mts_sections", "medquad_types")  # these chose WIDENED
CHOSE_WIDER = ("mts_lacking", "medquad_lacking")
NORMAL = 1.645  # of a 90 % interval


def cell(mine: Records, parts: Division, size: int, epsilon: float, seed: int) -> dict[str, Any]:
    """Foretell one release's gain, and measure it."""
    sigma = calibrate(epsilon, delta_for(size), 1.0, 1)
    sites = Sites((size,) * prototypes.SITES, sigma, prototypes.SITES)
    began = time.process_time()
    known = world(mine, parts, sites)
    drawn = known.draw(sites, DRAWS)
    seconds = time.process_time() - began
    seen, whole = known.interval(drawn.on_few(len(parts.test))), known.interval(drawn.gains)
    right = {}
    for arm, noise in (("release", 1.0), ("public", SILENT)):
        draw = [seed, size, round(10 * epsilon)]
        head = prototypes.released(mine, parts, sigma, prototypes.SITES, noise, draw)
        found = prototypes.found_by(head, mine.vectors[parts.test])
        right[arm] = (found == mine.labels[parts.test]).astype(float)
    changes = right["release"] - right["public"]
    return {
        "found": changes.mean(),
        "noise": NORMAL * changes.std() / math.sqrt(len(changes)),
        "seen": [seen.mean, seen.low, seen.high],
        "gain": [whole.mean, whole.low, whole.high],
        "start": [drawn.starts.mean(), right["public"].mean()],
        "seconds": seconds,
    }


def world(mine: Records, parts: Division, sites: Sites) -> World:
    """Return what the public part of a division says of the classes."""
    vectors, labels = mine.vectors[parts.public], mine.labels[parts.public]
    classes, named = len(mine.classes), mine.names is not None
    noise = sites.sigma * math.sqrt(sites.doses)
    k = posterior.directions_for(classes, len(labels), noise, sites.units, named)
    basis = posterior.choose(vectors, mine.names, k, posterior.WEIGHT)
    known = posterior.summarise_public(basis, vectors, labels, classes, mine.names)
    hits = posterior.held_out_hits(basis, vectors, labels, known, mine.names)
    assert hits is not None
    theirs = mine.labels[np.concatenate(parts.units).astype(np.int64)]
    shares = {
        number: float((theirs == number).mean())
        for number in np.flatnonzero(known.counts == 0).tolist()
        if (theirs == number).any()
    }
    return World(basis, known, hits[0] / hits[1], shares)


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each set, size and ε, over seeds; and how often the forecast held."""
    grouped: dict[tuple[str, int, float], list[dict[str, Any]]] = defaultdict(list)
    for key, each in cells.items():
        name, size, epsilon, _ = key.split("/")
        grouped[name, int(size), float(epsilon)].append(each)
    lines = [
        "| set | units a site | ε | foretold (90 %) | found, by seed | found, mean | inside | "
        "width over real seeds' |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, size, epsilon), rows in sorted(grouped.items(), key=_place):
        found = np.array([row["found"] for row in rows])
        mean, low, high = np.mean([row["seen"] for row in rows], axis=0)
        spread = 2 * NORMAL * found.std(ddof=1) if len(found) > 1 else math.nan
        title = SETS[name].title + (" †" if name in CHOSE + CHOSE_WIDER else "")
        lines.append(
            f"| {title} | {size} | {epsilon:g} | {mean:+.3f} ({low:+.3f} to {high:+.3f}) | "
            f"{', '.join(f'{each:+.3f}' for each in found)} | {found.mean():+.3f} | "
            f"{sum(map(is_inside, rows))} of {len(rows)} | {(high - low) / max(spread, 1e-9):.1f} |"
        )
    groups: dict[str, Sequence[str]] = {
        "Sets that chose the constant": [*CHOSE],
        "Others whose public records have every class": [
            name for name, each in SETS.items() if name not in CHOSE and not each.lacks
        ],
        "Sets whose public records lack a third, that chose the factor for these": CHOSE_WIDER,
        "Others whose public records lack a third": [
            name for name, each in SETS.items() if each.lacks and name not in CHOSE_WIDER
        ],
    }
    for title, names in groups.items():
        rows = [row for key, row in cells.items() if key.split("/")[0] in names]
        if rows:
            lines += ["", f"{title}: {held(rows)}"]
    return "\n".join(lines) + "\n"


def held(rows: list[dict[str, Any]]) -> str:
    """Say how often the forecast held."""
    none = [row for row in rows if row["gain"][2] < LEAST]
    unsure = [row for row in rows if row["gain"][1] <= 0 and row["gain"][2] >= LEAST]
    sure = [row for row in rows if row["gain"][1] > 0]
    within = sum(row["found"] <= LEAST + row["noise"] for row in none)
    better = sum(row["found"] > 0 for row in sure)
    return (
        f"{sum(map(is_inside, rows))} of {len(rows)} found gains inside their interval; of "
        f'{len(none)} cells that are "not worth it" {within} found no gain beyond its noise; of '
        f"{len(sure)} that are worth it {better} found one above zero; {len(unsure)} are unsure. "
        f"{np.mean([row['seconds'] for row in rows]):.1f} s of CPU a forecast."
    )


def is_inside(row: dict[str, Any]) -> bool:
    return bool(row["seen"][1] - 1e-9 <= row["found"] <= row["seen"][2] + 1e-9)


def _place(each: tuple[tuple[str, int, float], Any]) -> tuple[int, int, float]:
    (name, size, epsilon), _ = each
    return [*SETS].index(name), size, epsilon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[*prototypes.SEEDS])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "expected.json"
    cells: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in args.sets:
        mine = prototypes.records(name, args.data, args.out.resolve())
        for size in SETS[name].sizes:
            for seed in args.seeds:
                parts = prototypes.divided(SETS[name], mine, size, seed)
                for epsilon in EPSILONS:
                    key = f"{name}/{size}/{epsilon:g}/{seed}"
                    if key not in cells:
                        cells[key] = cell(mine, parts, size, epsilon, seed)
                file.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
                (args.out / "expected.md").write_text(table(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
