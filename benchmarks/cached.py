"""Measure the speed-up of later epochs from cached hidden states, with the last blocks adapted.

    python -m benchmarks.cached [--data DATA]

LoRA on the last 2 of SmolLM2's 30 blocks; the demo's notes (one target token each) and, with DATA,
MedQuAD's answers. All arms pass over the same records, in turns: plain PEFT on all blocks, plain
PEFT on the same two (it computes the frozen blocks again), ours from cached states. Writes
OUT/cached.md and .json."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import measure, texts
from benchmarks.measure import Bound, Table
from benchmarks.variants import Ours, PlainPeft, Setting, World
from fedtune.core.data.dataset import Dataset

ALL, SAME, OURS = "plain PEFT, all blocks", "plain PEFT, last 2 blocks", "ours, cached"
LAST = 2


def arms(setting: Setting, dataset: Dataset) -> list[Any]:
    """Each passes over the whole dataset in one `step()`; ours has been through the first epoch."""
    full_world = World(setting, dataset)
    last_blocks_world = World(replace(setting, last_layers=LAST), dataset, full_world.model)
    all_arms = [PlainPeft(full_world), PlainPeft(last_blocks_world), Ours(last_blocks_world)]
    for arm, name in zip(all_arms, (ALL, SAME, OURS), strict=True):
        arm.name = name
    all_arms[-1].data.warm()
    return all_arms


def rows(setting: Setting, name: str, dataset: Dataset, rounds: int) -> list[dict[str, Any]]:
    took = measure.interleaved(arms(setting, dataset), rounds, setting.device)
    number, tokens = len(dataset.examples), texts.tokens(dataset)
    return [
        {
            "records": name,
            "arm": arm,
            "trained": setting.train,
            "pass, s": measure.spread(took[arm]),
            "records/s": number / median(took[arm]),
            "tokens/s": tokens / median(took[arm]),
            "times faster than all blocks": measure.ratio(took[ALL], took[arm]),
            "than the same blocks": measure.ratio(took[SAME], took[arm]),
            "machine": measure.machine(setting.weights, setting.device),
        }
        for arm in (ALL, SAME, OURS)
    ]


def run(setting: Setting, sets: dict[str, Dataset], rounds: int) -> Table:
    table = Table("cached", f"Epochs after the first, {rounds} paired passes (median, range)")
    gains: dict[str, dict[str, Any]] = {}
    for name, dataset in sets.items():
        measured_rows = rows(setting, name, dataset, rounds)
        table.rows += measured_rows
        gains[name] = measured_rows[-1]
        mean = texts.tokens(dataset) / len(dataset.examples)
        table.notes.append(f"{name}: {len(dataset.examples)} records of {mean:.0f} tokens.")

    def gain(name: str, column: str) -> float | None:
        return gains[name][column] if name in gains else None

    everything, same = "times faster than all blocks", "than the same blocks"
    table.bounds = [
        Bound("notes, times faster than all blocks", gain("notes", everything), 15, least=True),
        Bound("notes, than the same blocks", gain("notes", same), 8, least=True),
        Bound("MedQuAD, than the same blocks", gain("MedQuAD", same), 1.8, least=True),
    ]
    table.notes.append(f"Plain PEFT in batches of {setting.batch}, in file order; ours one step.")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    parser.add_argument("--data", type=Path, help="the folder of data sets, for MedQuAD")
    parser.add_argument("--notes", type=int, default=64)
    parser.add_argument("--answers", type=int, default=32, help="of MedQuAD")
    parser.add_argument("--batch", type=int, default=8, help="plain PEFT's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--train", choices=["AB", "B"], default="AB")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    chosen = parser.parse_args()
    measure.start(chosen)
    rounds = chosen.rounds
    if chosen.quick:
        chosen.notes, chosen.answers, rounds = 16, 4, 2
    setting = Setting(
        dtype=chosen.dtype, train=chosen.train, batch=chosen.batch, device=chosen.device
    )
    sets = {"notes": texts.notes(chosen.notes)}
    if chosen.data:
        sets["MedQuAD"] = texts.medquad(chosen.data, chosen.answers)
    table = run(setting, sets, rounds)
    table.save(chosen.out)
    print(table.markdown())


if __name__ == "__main__":
    main()
