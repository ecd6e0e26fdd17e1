"""Draw quality against ε from the results of `benchmarks.tables`, one panel a data set.

    python -m benchmarks.picture --out docs/quality.png
    python -m benchmarks.picture --out mine.png medquad=runs/medquad mts_dialog=runs/mts

Without names: docs/measured/NAME.json, which are the results.json that docs/quality.md shows.
Prints the same figures as tables, as they stand there.

Each panel: mean and every seed's gain over the base at each ε, with each site's own noise and with
one dose for all; lines for the same recipe without noise and, if it was measured, the best one
without privacy.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measure import mean_sd
from benchmarks.tables import SETS, TWIN
from fedtune.report.plot import COST, FAINT, GOOD, INK

SHARED = "#7b4fa3"

SERIES = {
    "each site's own noise": (re.compile(r"epsilon-([0-9.]+)"), GOOD),
    "one dose of noise for all (t = 1)": (re.compile(r"shared-1-([0-9.]+)"), SHARED),
}
COLUMNS = {
    "each site's own noise": "epsilon-",
    "one dose, t = 1": "shared-1-",
    "one dose, t = 2": "shared-2-",
}
BEST = ("best-lora", "best-head")
MEASURED = Path(__file__).parents[1] / "docs" / "measured"


def gains(results: dict[str, Any], metric: str) -> dict[str, list[float]]:
    """By arm, each seed's gain over its base; of loss a fall is a gain."""
    sign = -1 if metric == "loss" else 1
    by_arm: dict[str, list[float]] = {}
    for arms in results.values():
        for name, figures in arms.items():
            by_arm.setdefault(name, []).append(sign * (figures[metric] - arms["base"][metric]))
    return by_arm


def read(place: Path) -> dict[str, Any]:
    file = place / "results.json" if place.is_dir() else place
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def by_epsilon(name: str, results: dict[str, Any]) -> str:
    """A Markdown table of one set: a row for each ε, mean ± sd over the seeds of the fall of the
    loss, else of the metric itself, and the ε whatever happens where sites share their noise."""
    metric = SETS[name].metric
    values = gains(results, metric)
    if metric != "loss":
        arms = {arm for by_arm in results.values() for arm in by_arm}
        values = {a: [r[a][metric] for r in results.values() if a in r] for a in arms}
    what = "fall of the loss, nats" if metric == "loss" else metric
    head = ["ε"]
    for title, prefix in COLUMNS.items():
        head += [title, *(["ε whatever happens"] if prefix.startswith("shared") else [])]
    lines = [f"{SETS[name].title}, {what}:", "", _line(head), "|---" * len(head) + "|"]
    for epsilon in sorted({float(a[8:]) for a in values if a.startswith("epsilon-")}):
        cells = [f"{epsilon:g}"]
        for prefix in COLUMNS.values():
            arm = f"{prefix}{epsilon:g}"
            cells.append(mean_sd(values[arm]) if arm in values else "–")
            if prefix.startswith("shared"):
                fallback = [r[arm]["fallback"] for r in results.values() if arm in r]
                cells.append(f"{max(fallback):.2f}" if fallback else "–")
        lines.append(_line(cells))
    for title, arms_of in (("no noise, same recipe", (TWIN,)), ("best without privacy", BEST)):
        lines += [
            _line([title, mean_sd(values[arm]), *([""] * (len(head) - 2))])
            for arm in arms_of
            if arm in values
        ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def panel(axes: Any, name: str, place: Path) -> None:
    dataset = SETS[name]
    by_arm = gains(read(place), dataset.metric)
    ticks = set[float]()
    for title, (pattern, color) in SERIES.items():
        points = sorted(
            (float(match[1]), values)
            for arm, values in by_arm.items()
            if (match := pattern.fullmatch(arm))
        )
        for epsilon, values in points:
            axes.plot([epsilon] * len(values), values, "o", color=color, alpha=0.35, markersize=4)
        middle = [mean(values) for _, values in points]
        axes.plot([e for e, _ in points], middle, color=color, marker="o", label=title)
        ticks |= {e for e, _ in points}
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    lines = {"same recipe, no noise": by_arm.get(TWIN), "best without privacy": None}
    for best in BEST:
        lines["best without privacy"] = lines["best without privacy"] or by_arm.get(best)
    for (title, values), color in zip(lines.items(), (INK, COST), strict=True):
        if values:
            axes.axhline(mean(values), color=color, linestyle="--", linewidth=1)
            axes.annotate(
                title, (0, mean(values)), xycoords=("axes fraction", "data"), xytext=(3, 3),
                textcoords="offset points", fontsize=8, color=color,
            )  # fmt: skip
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{e:g}" for e in sorted(ticks)])
    axes.minorticks_off()
    axes.set_xlabel(f"ε per {dataset.unit} (δ = {dataset.delta:g})")
    what = "fall of the loss, nats" if dataset.metric == "loss" else f"gain of {dataset.metric}"
    axes.set_title(f"{dataset.title}: {what}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kept = [f"{file.stem}={file}" for file in sorted(MEASURED.glob("*.json"))]
    parser.add_argument("sets", nargs="*", metavar="NAME=FOLDER", default=kept)
    parser.add_argument("--out", type=Path, required=True, help="a .png file")
    args = parser.parse_args()
    pairs = [text.partition("=")[::2] for text in args.sets]
    figure = Figure(figsize=(4.6 * len(pairs), 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, folder) in zip(
        figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True
    ):
        panel(axes, name, Path(folder))
        print(by_epsilon(name, read(Path(folder))))
    figure.savefig(args.out, metadata={"Software": None})


if __name__ == "__main__":
    main()
