"""From how many units on a release of class statistics is worth its ε: measure it, and draw it.

    python -m benchmarks.units --data DATA --out runs/prototypes
    python -m benchmarks.units --picture docs/units.png

The gain in accuracy over what public records alone give (the same discriminant without a release)
against the units of a site; the mechanism in numpy, as `benchmarks.prototypes` has it. Every size
has the same 100 public records and the same 290 that judge; a larger site has the smaller one's
units and more. *Shared*: noise that all sites share, of which any one may collude. OUT/units.json
has every seed, and OUT the bases' vectors. The second line draws docs/measured/further/units.json.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import prototypes
from benchmarks.prototypes import EPSILONS, SEEDS, SETS, SILENT, Division, Records
from fedtune.core.dp.accountant import calibrate
from fedtune.report.delta import delta_for
from fedtune.report.plot import COST, FAINT, GOOD, INK

CHOSEN = ("mts_sections", "medquad_types", "medmcqa_lacking")
SITES, UNITS = (3, 9), (30, 60, 120, 240, 360, 600, 900)
PUBLIC, TEST, DRAWS = 100, 290, 2
COLORS = dict(zip(EPSILONS, (COST, "#7b4fa3", GOOD), strict=True))
MEASURED = Path(__file__).parents[1] / "docs" / "measured" / "further" / "units.json"
Curves = dict[str, dict[str, list[float]]]


def divided(name: str, mine: Records, units: int, seed: int) -> Division:
    """Divide the records of a set whose units are records: `units` of all sites together."""
    order = np.random.default_rng([seed, 11]).permutation(len(mine.labels))
    public = order[TEST : TEST + PUBLIC]
    if SETS[name].lacks:
        classes = len(mine.classes)
        lacking = np.random.default_rng([seed, 5]).permutation(classes)[: round(classes / 3)]
        public = public[~np.isin(mine.labels[public], lacking)]
    theirs = order[TEST + PUBLIC :][:units]
    return Division([[int(i)] for i in theirs], public, order[:TEST], [])


def doses(sites: int) -> dict[str, float]:
    """How many doses of noise the sum has."""
    return {"own": sites, "shared": sites / (sites - 1)}


def measured(name: str, mine: Records, sites: int, units: int) -> dict[str, list[float]]:
    """Measure each seed's gain, mean over draws of the noise, by arm ("own/6"; "none")."""
    arms: dict[str, list[float]] = defaultdict(list)
    for seed in SEEDS:
        parts = divided(name, mine, sites * units, seed)
        start = accuracy(mine, parts, units, max(EPSILONS), sites, noise=SILENT)
        arms["start"].append(start)
        without = accuracy(mine, parts, units, max(EPSILONS), sites, noise=0.0)
        arms["none"].append(without - start)
        for epsilon in EPSILONS:
            for arm, dose in doses(sites).items():
                found = [
                    accuracy(mine, parts, units, epsilon, dose, draw=draw) for draw in range(DRAWS)
                ]
                arms[f"{arm}/{epsilon:g}"].append(float(np.mean(found)) - start)
    return arms


def accuracy(
    mine: Records,
    parts: Division,
    units: int,
    epsilon: float,
    dose: float,
    noise: float = 1.0,
    draw: int = 0,
) -> float:
    """Measure one release's head on the records that judge."""
    sigma = calibrate(epsilon, delta_for(units), 1.0, 1)
    numbers = [units, len(parts.units), round(10 * epsilon), int(parts.test[0]), draw]
    head = prototypes.released(mine, parts, sigma, dose, noise, numbers)
    found = prototypes.found_by(head, mine.vectors[parts.test])
    return float((found == mine.labels[parts.test]).mean())


def reached(mine: Records, sites: int) -> list[int]:
    """Return the sizes of a site for which the set has enough records."""
    return [units for units in UNITS if sites * units <= len(mine.labels) - PUBLIC - TEST]


def as_lines(curves: Curves) -> str:
    """Return JSON with a line for each point."""
    lines = [f" {json.dumps(key)}: {json.dumps(arms)}" for key, arms in curves.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def draw(curves: Curves, file: Path) -> None:
    """Draw a column for each set and a row for each number of sites."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [*dict.fromkeys(key.split("/")[0] for key in curves)]
    figure = Figure(figsize=(3.4 * len(names), 2.5 * len(SITES)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(SITES), len(names), squeeze=False, sharex="col", sharey="col")
    for row, sites in zip(rows, SITES, strict=True):
        for axes, name in zip(row, names, strict=True):
            panel(axes, curves, name, sites)
            axes.set_title(f"{SETS[name].title}, {sites} sites", loc="left", fontsize=9)
        row[0].set_ylabel("gain of accuracy")
    for axes in rows[-1]:
        axes.set_xlabel("units at each site")
    rows[0][0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(file, metadata={"Software": None})


def panel(axes: Any, curves: Curves, name: str, sites: int) -> None:
    """Draw the mean over seeds, and a band of one standard error, of sites' own noise."""
    points = {
        int(key.split("/")[2]): arms
        for key, arms in curves.items()
        if key.startswith(f"{name}/{sites}/")
    }

    def line(arm: str, **style: Any) -> None:
        gains = [np.mean(arms[arm]) for arms in points.values()]
        axes.plot([*points], gains, linewidth=1.2, **style)

    axes.axhline(0, color=FAINT, linewidth=1)
    line("none", color=INK, linestyle=":", label="no noise")
    for epsilon, color in reversed(COLORS.items()):
        line(f"own/{epsilon:g}", color=color, marker="o", markersize=3, label=f"ε = {epsilon:g}")
        is_first = epsilon == max(COLORS)  # one line of the legend for all dashed ones
        title = "noise that sites share" if is_first else None
        line(f"shared/{epsilon:g}", color=color, linestyle="--", label=title)
        rows = np.array([arms[f"own/{epsilon:g}"] for arms in points.values()])
        error = rows.std(axis=1, ddof=1) / np.sqrt(rows.shape[1])
        middle = rows.mean(axis=1)
        axes.fill_between([*points], middle - error, middle + error, color=color, alpha=0.12)
    if points:
        axes.set_xscale("log")
        sizes = [units for units in UNITS if f"{name}/{min(SITES)}/{units}" in curves]
        axes.set_xticks(sizes, [str(units) for units in sizes], fontsize=8)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder of data sets, to measure")
    parser.add_argument("--out", type=Path, help="the folder to write what is measured")
    parser.add_argument("--picture", type=Path, help="a .png file, of what is in docs/measured")
    args = parser.parse_args()
    if args.data and args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        curves: Curves = {}
        for name in CHOSEN:
            mine = prototypes.records(name, args.data, args.out.resolve())
            for sites in SITES:
                for units in reached(mine, sites):
                    arms = measured(name, mine, sites, units)
                    curves[f"{name}/{sites}/{units}"] = {
                        arm: [round(each, 4) for each in gains] for arm, gains in arms.items()
                    }
                    (args.out / "units.json").write_text(as_lines(curves))
    if args.picture:
        draw(json.loads(MEASURED.read_text(encoding="utf-8")), args.picture)


if __name__ == "__main__":
    main()
