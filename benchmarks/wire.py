"""What the demo loses and saves where numbers travel as fp16 or int8.

    python -m benchmarks.wire --seeds 0 1 2 --out runs/wire
    python -m benchmarks.wire --seeds 1 --arms int8 --out runs/wire    # one arm; the rest is kept

An arm is the demo's study at ε = 8 with one [wire] table, from ledgers of its own. Bytes are those
of the report: all that was sent, plan and frozen factor included. They are compared with a plain
LoRA of the same rank that sends A and B in fp32, to a site and back, in every round. Writes
OUT/table.md and OUT/results.json; an arm that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

from safetensors import safe_open

from benchmarks import demo, measure
from fedtune.demo.generate import NINE, write

ARMS = {
    "float32": ("float32", "float32"),  # update, adapter
    "float16": ("float16", "float16"),
    "int8-float16": ("int8", "float16"),
    "int8": ("int8", "int8"),
}


def one_arm(seed: int, name: str, out: Path) -> dict[str, Any]:
    """Accuracy, and bytes by round and site (means) up and down, and of a plain LoRA one way."""
    write(out / "data", seed, NINE)
    update, adapter = ARMS[name]
    changes = {"wire": {"update": update, "adapter": adapter}}
    accuracy = demo.arm(out, name, changes)
    report = json.loads((out / name / "report.json").read_text())
    rounds, sites = len(report["rounds"]), len(report["rounds"][0]["bytes_up"])
    result: dict[str, Any] = {"accuracy": accuracy, "epsilon": report["privacy"]["epsilon"]}
    for direction in ("bytes_up", "bytes_down"):
        total = sum(sum(entry[direction].values()) for entry in report["rounds"])
        result[direction] = total / rounds / sites
    return result | {"plain": _fp32_bytes(out / name / "adapter")}


def _fp32_bytes(adapter: Path) -> int:
    """Bytes of A and B in fp32, by their shapes."""
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return 4 * sum(math.prod(shape) for shape in shapes)


def table(results: measure.Results) -> str:
    """Markdown: mean ± sd over seeds; bytes are the same for every seed, but for a few."""
    head = "| wire: update, adapter | accuracy | by seed | up | down | of A+B in fp32 |"
    lines = [head, "|---|---|---|---:|---:|---:|"]
    for arm, names in ARMS.items():
        results_of_arm = [by_arm[arm] for by_arm in results.values() if arm in by_arm]
        if not results_of_arm:
            continue
        values = [result["accuracy"] for result in results_of_arm]
        up, down = (
            mean(result[direction] for result in results_of_arm)
            for direction in ("bytes_up", "bytes_down")
        )
        share = (up + down) / 2 / results_of_arm[0]["plain"]
        by_seed = ", ".join(f"{value:.3f}" for value in values)
        lines.append(
            f"| {', '.join(names)} | {measure.mean_sd(values)} | {by_seed} | {up:,.0f} "
            f"| {down:,.0f} | {share:.3f} |"
        )
    fp32_bytes = next(result["plain"] for by_arm in results.values() for result in by_arm.values())
    note = f"Bytes by round and site. A and B in fp32: {fp32_bytes:,} each way."
    return "\n".join([*lines, "", note]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()

    def run(seed: str, arm: str) -> dict[str, Any]:
        return one_arm(int(seed), arm, chosen.out / f"seed-{seed}")

    pairs = [(str(seed), arm) for seed in chosen.seeds for arm in chosen.arms]
    measure.resume(chosen.out, pairs, run, table)


if __name__ == "__main__":
    main()
