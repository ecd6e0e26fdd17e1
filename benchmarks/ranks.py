"""What the demo learns, and sends, where hospitals train different ranks of one adapter.

    python -m benchmarks.ranks --seeds 0 1 2 --out runs/ranks
    python -m benchmarks.ranks --seeds 1 --arms 8-4-2 --out runs/ranks   # one arm; the rest is kept

An arm is the demo's study (rank 8, ε = 8) with `lora.min_rank = 2` and a `site.lora_rank` for each
hospital, from ledgers of its own. Bytes are those of the report, by hospital and round. Writes
OUT/table.md and OUT/results.json; an arm that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.demo import _arm
from fedtune.demo.generate import write

HOSPITALS = ("harbour", "lakeside", "northgate")
ARMS = {"8-8-8": (8, 8, 8), "8-4-2": (8, 4, 2), "2-2-2": (2, 2, 2)}
Results = dict[str, dict[str, Any]]  # seed -> arm -> what was found


def one_arm(seed: int, arm: str, out: Path) -> dict[str, Any]:
    """Accuracy, ε, and the mean bytes up a round, by hospital."""
    write(out / "data", seed=seed)
    lines = {name: f"lora_rank = {k}" for name, k in zip(HOSPITALS, ARMS[arm], strict=True)}
    accuracy = _arm(out, arm, [("rank = 8", "rank = 8\nmin_rank = 2")], lines)
    body = json.loads((out / arm / "report.json").read_text())
    up = {name: mean(entry["bytes_up"][name] for entry in body["rounds"]) for name in HOSPITALS}
    return {"accuracy": accuracy, "epsilon": body["privacy"]["epsilon"], "up": up}


def table(results: Results) -> str:
    """Markdown: mean ± sd over seeds; bytes are the same for every seed, but for a few."""
    lines = [
        f"| ranks at {', '.join(HOSPITALS)} | accuracy | by seed | bytes up, round and hospital |",
        "|---|---|---|---|",
    ]
    for arm, ranks in ARMS.items():
        found = [by_arm[arm] for by_arm in results.values() if arm in by_arm]
        if not found:
            continue
        values = [each["accuracy"] for each in found]
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        by_seed = ", ".join(f"{value:.3f}" for value in values)
        up = ", ".join(f"{mean(each['up'][name] for each in found):,.0f}" for name in HOSPITALS)
        named = ", ".join(map(str, ranks))
        lines.append(f"| {named} | {mean(values):.3f}{spread} | {by_seed} | {up} |")
    worst = max(each["epsilon"] for by_arm in results.values() for each in by_arm.values())
    return "\n".join([*lines, "", f"Largest ε of any hospital: {worst:.4f}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    kept = chosen.out / "results.json"
    results: Results = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in chosen.seeds:
        for arm in chosen.arms:
            by_arm = results.setdefault(str(seed), {})
            if arm in by_arm:
                continue
            by_arm[arm] = one_arm(seed, arm, chosen.out / f"seed-{seed}")
            kept.write_text(json.dumps(results, indent=1) + "\n")
            (chosen.out / "table.md").write_text(table(results))
            print(seed, arm, by_arm[arm], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
