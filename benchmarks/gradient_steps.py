"""One release of class statistics against twenty private steps of a head, on the same vectors.

    python -m benchmarks.gradient_steps --data DATA --out runs/prototypes

The steps as `init --task classify` wrote them before the release: the head starts at the regression
on public records; every round all units' gradients, clipped, with each site's own noise, and
momentum; how far a round moves the head is chosen on further public records, half as many, by the
coordinator's own code. The release has no use for these, and both are judged on the rest. Sets,
divisions, δ and vectors are those of `benchmarks.prototypes`. OUT/steps.json has every cell,
OUT/steps.md the table.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.special import logsumexp  # type: ignore[import-untyped]

from benchmarks import prototypes
from benchmarks.prototypes import EPSILONS, SETS, SILENT, SITES, Array, Division, Labels, Records
from fedtune.core.dp.accountant import calibrate
from fedtune.report.delta import delta_for
from fedtune.server import step
from fedtune.strategies.fedavg import FedAvg

SEEDS = range(12)
ROUNDS, PATIENCE = 20, 3
BOUND, MOMENTUM = 10.0, 0.5
NOISE = 0.14  # standard deviation of a weight's noise after the last round, from which the rate is
LEFT_OUT = ("mts_described", "vqa_rad", "sources_lacking")
Head = dict[str, np.ndarray]


@dataclass
class Progress:
    """What the choice of a step reads of a run."""

    origin: Head
    adapter: Head
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Chooser:
    """The loss on the public records that choose."""

    vectors: Array
    labels: Labels

    def measure(self, head: Head) -> dict[str, float]:
        scores = self.vectors @ head["head.weight"].T.astype(float) + head["head.bias"]
        own = scores[np.arange(len(scores)), self.labels]
        return {"loss": float((logsumexp(scores, axis=1) - own).mean())}


def chosen_by_and_judged_by(name: str, mine: Records, parts: Division) -> tuple[Labels, Labels]:
    """Divide the records that judge: the first, half as many as public ones, choose the steps."""
    count = len(parts.public) // 2
    chooses, judges = parts.test[:count], parts.test[count:]
    if SETS[name].lacks:
        chooses = chooses[np.isin(mine.labels[chooses], mine.labels[parts.public])]
    return chooses, judges


def trained(
    mine: Records, parts: Division, chooses: Labels, epsilon: float, delta: float, seed: list[int]
) -> Array:
    """Train a head (K, H + 1) by private steps."""
    x, y, classes = mine.vectors, mine.labels, len(mine.classes)
    sigma, total = calibrate(epsilon, delta, 1.0, ROUNDS), len(parts.units)
    spread = sigma * math.sqrt(SITES)
    rate = min(1.0, NOISE * total * (1 - MOMENTUM) / (spread * math.sqrt(ROUNDS))) / BOUND
    start = prototypes.fitted(x[parts.public], y[parts.public], classes)
    head = _arrays(start)
    progress, strategy = Progress(head, head), FedAvg(momentum=MOMENTUM)
    chooser = cast("Any", Chooser(x[chooses], y[chooses]))
    random = np.random.default_rng(seed)
    for _ in range(ROUNDS):
        total_change = _sum_of_gradients(mine, parts, progress.adapter)
        total_change += spread * BOUND * random.standard_normal(total_change.shape)
        strategy.add(_arrays(-rate * total_change / total), 1.0)
        proposed = strategy.apply(progress.adapter)
        progress.adapter, entry = step.choose(chooser, cast("Any", progress), proposed)
        progress.history.append(entry)
        if not any(e["step"] or e["keep"] < 1 for e in progress.history[-PATIENCE:]):
            break
    weight, bias = progress.adapter["head.weight"], progress.adapter["head.bias"]
    return np.concatenate([weight, bias[:, None]], axis=1).astype(float)


def _sum_of_gradients(mine: Records, parts: Division, head: Head) -> Array:
    """Sum the units' gradients (K, H + 1), each the mean of its records', of length BOUND at most.

    A unit of one record has its length from the two factors of its gradient."""
    classes = len(mine.classes)
    rows = np.concatenate([mine.vectors, np.ones((len(mine.vectors), 1))], axis=1)
    scores = mine.vectors @ head["head.weight"].T.astype(float) + head["head.bias"]
    wrong = np.exp(scores - logsumexp(scores, axis=1, keepdims=True)) - np.eye(classes)[mine.labels]
    one = np.array([unit[0] for unit in parts.units if len(unit) == 1], dtype=np.int64)
    lengths = np.linalg.norm(wrong[one], axis=1) * np.linalg.norm(rows[one], axis=1)
    scale = np.minimum(1.0, BOUND / np.maximum(lengths, 1e-12))
    found = (wrong[one] * scale[:, None]).T @ rows[one]
    for unit in (unit for unit in parts.units if len(unit) > 1):
        gradient = wrong[unit].T @ rows[unit] / len(unit)
        found += gradient / max(1.0, float(np.linalg.norm(gradient)) / BOUND)
    return np.asarray(found)


def _arrays(head: Array) -> Head:
    return {
        "head.weight": head[:, :-1].astype(np.float32),
        "head.bias": head[:, -1].astype(np.float32),
    }


def compared(name: str, mine: Records, size: int, seed: int) -> dict[str, float]:
    """Accuracy of every way at one size and seed."""
    parts = prototypes.divided(SETS[name], mine, size, seed)
    chooses, judges = chosen_by_and_judged_by(name, mine, parts)
    x, y, delta = mine.vectors, mine.labels, delta_for(size)
    heads = {"start": prototypes.fitted(x[parts.public], y[parts.public], len(mine.classes))}
    for epsilon in EPSILONS:
        sigma, draw = calibrate(epsilon, delta, 1.0, 1), [seed, size, round(10 * epsilon)]
        heads[f"steps-{epsilon:g}"] = trained(mine, parts, chooses, epsilon, delta, draw)
        heads[f"release-{epsilon:g}"] = prototypes.released(mine, parts, sigma, SITES, 1.0, draw)
        heads["public"] = prototypes.released(mine, parts, sigma, SITES, SILENT, draw)
    return {
        arm: float((prototypes.found_by(head, x[judges]) == y[judges]).mean())
        for arm, head in heads.items()
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each set and size, means over seeds."""
    cells: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for key, row in results.items():
        name, size, _ = key.split("/")
        cells[name, size].append(row)
    lines = [
        "| set | units a site | regression on public records | twenty steps from it, "
        "ε = 1 / 3 / 6 | discriminant of public records | one release, ε = 1 / 3 / 6 | "
        "release minus steps, ε = 1 / 3 / 6 (95 %) |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, size), rows in cells.items():
        mean = {arm: float(np.mean([row[arm] for row in rows])) for arm in rows[0]}
        less = []
        for epsilon in EPSILONS:
            change = np.array([r[f"release-{epsilon:g}"] - r[f"steps-{epsilon:g}"] for r in rows])
            half = prototypes.half_width(change)
            less.append(f"{change.mean():+.3f} ± {half:.3f}".replace("-", "−"))
        by_epsilon = {
            arm: " / ".join(f"{mean[f'{arm}-{epsilon:g}']:.3f}" for epsilon in EPSILONS)
            for arm in ("steps", "release")
        }
        lines.append(
            f"| {SETS[name].title} | {size} | {mean['start']:.3f} | {by_epsilon['steps']} | "
            f"{mean['public']:.3f} | {by_epsilon['release']} | {' / '.join(less)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "steps.json"
    results: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    for name in (name for name in SETS if name not in LEFT_OUT):
        mine = prototypes.records(name, args.data, args.out.resolve())
        for size in SETS[name].sizes:
            for seed in SEEDS:
                key = f"{name}/{size}/{seed}"
                if key not in results:
                    results[key] = compared(name, mine, size, seed)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (args.out / "steps.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
