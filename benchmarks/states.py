"""Measure training from cached hidden states: in memory, in the encrypted file, or not cached.

    OMP_NUM_THREADS=2 python -m benchmarks.states --data DATA

SmolLM2-135M with adapters in the last two of its 30 blocks; the demo's notes with one target token,
and answers from DATA/medquad/train.jsonl. The gradients of the same records in each of the
three ways, in turns in one process: medians of real tokens a second of processor time over threads,
and what a record's states take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks.padding import BASE, SETS, read
from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.data.dataset import Dataset
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.prefix_store import PREFIX_STORE
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.unit_gradients import UnitGradientEngine

STORAGES = {"in memory": 2**50, "in the file": 0, "not kept": None}


def rows(network: Network, name: str, data: Dataset, repeats: int) -> Iterator[str]:
    count, tokens = len(data.examples), sum(len(e.input_ids) for e in data.examples)
    caches: dict[str, CachedDataset | None] = {}
    sizes: dict[str, int] = {}
    for storage, memory in STORAGES.items():
        before = PREFIX_STORE.in_memory + PREFIX_STORE.on_disk
        network.states.clear()  # each way has states of its own
        caches[storage] = None if memory is None else CachedDataset(network, data, memory)
        if cached := caches[storage]:
            cached.warm()
        sizes[storage] = PREFIX_STORE.in_memory + PREFIX_STORE.on_disk - before
    times: dict[str, list[float]] = {storage: [] for storage in STORAGES}
    for _ in range(repeats):
        for storage, cached in caches.items():
            network.states.clear()
            times[storage].append(_seconds(cached or CachedDataset(network, data)))
    for storage, seconds in times.items():
        kib, speed = sizes[storage] / count / 1024, tokens / median(seconds)
        yield f"| {name} | {storage} | {count} | {tokens / count:.0f} | {kib:.1f} | {speed:.0f} |"


def _seconds(data: CachedDataset) -> float:
    engine = UnitGradientEngine(data, CausalLM(), sampling_unit="record")
    start = time.process_time()
    for chunk in engine(list(range(engine.n_rows))):
        chunk.wipe()
    return (time.process_time() - start) / torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    lora = LoraTable(rank=16, modules=("gate_proj", "up_proj", "down_proj"), last_layers=2)
    network = Network(find_base(BASE), torch.bfloat16, lora, labels=0)
    print("| data | states | records | tokens each | KiB each | tokens/s |")
    print("|---|---|---|---|---|---|")
    for name, columns, limit in SETS:
        if limit in (64, 256):
            dataset = read(chosen.data, name, columns, limit)
            some = dataset.examples[:: max(1, len(dataset.examples) // chosen.records)]
            data = Dataset(some[: chosen.records], len(dataset.examples), dataset.rejected)
            for row in rows(network, name, data, chosen.repeats):
                print(row, flush=True)


if __name__ == "__main__":
    main()
