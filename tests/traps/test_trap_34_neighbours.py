"""Trap 34: a row's last digit depends on how many rows are beside it, and weights that are made for
it turn the last digit into another answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import ModelError
from fedtune.core.models import cache
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import LARGEST
from fedtune.core.models.network import Network
from fedtune.core.objectives._interface import Batch
from fedtune.core.objectives._tokens import select_labelled
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.objectives.classify import Classify
from fedtune.core.progress import OnWork
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import make_plan
from tests.traps import neighbour_rows

COUNTS = [*range(1, 10), 17, 18, 19, 25, 26, 27]
C = 1.0


def crafted(network: Network, others: int) -> tuple[Dataset, torch.Tensor, torch.Tensor]:
    """`others` units that read the same and one more, and a head whose first logit of the others is
    some 1e8: whose second, a constant, lies between two roundings of it where there are two."""
    draw = np.random.default_rng(3)
    shared, own = (draw.integers(3, 280, size=12, dtype=np.int32) for _ in range(2))
    none = np.full(12, -100, np.int32)
    examples = [Example(shared, none, 0, unit) for unit in range(others)]
    dataset = Dataset([*examples, Example(own, none, 2, others)], others + 1, Counter())
    (batch,) = CachedDataset(network, dataset).batches([0])
    state = network.pool(network.hidden(batch.prefix, batch.mask), batch.mask)[0]
    for seed in range(200):
        direction = torch.randn(len(state), generator=torch.Generator().manual_seed(seed))
        weight = torch.zeros(3, len(state))
        weight[0] = 1e8 * direction * torch.sign(direction @ state)
        found = {
            float(torch.nn.functional.linear(state.repeat(n, 1), weight)[0, 0])
            for n in (others, others + 1)
        }
        if len(found) == 2:
            break
    bias = torch.tensor([0.0, sum(found) / len(found), -1e9])
    return dataset, weight, bias


class Unbounded(UnitGradientEngine):
    """With micro-batches of as many records as there are: what the engine was."""

    def __call__(self, rows: list[int], on_work: OnWork | None = None) -> Iterator[Chunk]:
        self.data.compute_blocks = self._as_they_come  # type: ignore[method-assign]
        return super().__call__(rows)

    def _as_they_come(
        self, compute: Any, indices: list[int], *_: Any, **more: Any
    ) -> Iterator[tuple[Batch, Any]]:
        return ((batch, compute(batch)) for batch in self.data.batches(indices))


def moved(network: Network, folder: Path, others: int, kind: type[UnitGradientEngine]) -> float:
    """How far the sum of the others' rows moves when one more unit is there, in C; through the
    shipped step, with noise of next to nothing."""
    dataset, weight, bias = crafted(network, others)
    assert network.head is not None
    with torch.no_grad():  # what a coordinator could send, were it not refused
        network.head.weight.copy_(weight)
        network.head.bias.copy_(bias)
    plan = make_plan(noise_multiplier=1e-10, max_grad_norm=C, divisor=1.0)
    last = dataset.examples[-1:]
    alone = Dataset([Example(*last[0].passages[0], last[0].label, 0)], 1, Counter())
    sums = [
        plan.step(d.n_units, e.dimension, e, StepLog(folder / "log"), 1).double()
        for d in (dataset, Dataset(dataset.examples[:-1], others, Counter()), alone)
        for e in [kind(CachedDataset(network, d), Classify())]
    ]
    return float((sums[0] - sums[1] - sums[2]).norm()) / C


@pytest.fixture(scope="module")
def network(tiny_encoder: Path) -> Network:
    return Network(find_base(str(tiny_encoder)), torch.float32, None, labels=3)


@pytest.mark.parametrize("others", range(1, 10))
def test_nobody_moves_another_whatever_the_weights(
    network: Network, tmp_path: Path, others: int
) -> None:
    assert moved(network, tmp_path, others, UnitGradientEngine) < 1e-6


def by_parity(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A head's product on a processor whose last digits follow from whether the number of rows is
    odd. Not every processor's depend on the number: an AMD EPYC's only on whether it is 1."""
    product = x @ weight.T
    if len(weight) == 3 and len(x) % 2:
        above = torch.nextafter(product, torch.full_like(product, torch.inf))
        product = product + 8 * (above - product).detach()
    return product if bias is None else product + bias


def test_rows_beside_as_many_as_there_are_is_caught(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: some of them flip together, by this processor's own kernel or by one that is known
    to depend on the number of rows."""
    most = max(moved(network, tmp_path, n, Unbounded) for n in range(1, 10))
    if most <= 0.9:
        monkeypatch.setattr(torch.nn.functional, "linear", by_parity)
        most = moved(network, tmp_path, 26, Unbounded)
        assert moved(network, tmp_path, 26, UnitGradientEngine) < 1e-6
    assert most > 0.9


def test_a_row_is_the_same_beside_any_others(tiny_base: Path) -> None:
    assert neighbour_rows.differing(tiny_base, [4], ("causal_lm", "classify")) == []


def with_targets(base: Path, length: int, counts: Sequence[int]) -> CachedDataset:
    """Records of one length, the last `counts` tokens of which are targets."""
    lora = LoraTable(rank=2, modules=("q_proj",), last_layers=2)
    network = Network(find_base(str(base)), torch.float32, lora, labels=0)
    draw, examples = np.random.default_rng(0), []
    for unit, count in enumerate(counts):
        ids, targets = draw.integers(3, 280, (2, length), dtype=np.int32)
        targets[: length - count] = -100
        examples.append(Example(ids, targets, -100, unit))
    return CachedDataset(network, Dataset(examples, len(examples), Counter()))


def in_blocks(data: CachedDataset) -> list[list[int]]:
    blocks = data.compute_blocks(lambda _: None, range(len(data.dataset.examples)))
    return [b.index[: b.count].tolist() for b, _ in blocks]


def test_records_of_other_counts_of_targets_share_no_block(tiny_base: Path) -> None:
    """How many positions reach the head is a bucket's, not the most that a neighbour has."""
    found = in_blocks(with_targets(tiny_base, 16, [1, 2, 3, 4, 6, 8, 1]))
    assert found == [[0, 6], [1], [2, 3], [4, 5]]


def test_records_share_a_block_where_the_head_runs_at_every_position(tiny_base: Path) -> None:
    found = in_blocks(with_targets(tiny_base, 64, [64, 48, 49, 56, 57, 48]))
    assert found == [[1, 5], [0, 2, 3, 4]]


def scored(data: CachedDataset) -> list[int]:
    """At how many positions the head runs in the block of each record."""

    def score(batch: Batch) -> int:
        return select_labelled(batch.target_ids)[1].shape[1]

    found = dict[int, int]()
    for batch, positions in data.compute_blocks(score, range(len(data.dataset.examples))):
        found |= dict.fromkeys(batch.index[: batch.count].tolist(), positions)
    return [found[index] for index in sorted(found)]


def test_the_head_runs_at_as_many_positions_beside_any_others(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every count of targets; with a twin that leaves them out of the bucket."""
    counts = range(49)
    alone = [scored(with_targets(tiny_base, 48, [count]))[0] for count in counts]
    assert scored(with_targets(tiny_base, 48, counts)) == alone
    data = with_targets(tiny_base, 48, counts)
    every = UnitGradientEngine(data, CausalLM()).matrix(counts)
    for some in ([48, 7, 40], [*counts[::-5]]):
        assert torch.equal(UnitGradientEngine(data, CausalLM()).matrix(some), every[some])
    monkeypatch.setattr(cache, "head_positions", lambda length, targets: length)
    assert scored(with_targets(tiny_base, 48, counts)) != alone


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 16])
def test_a_row_is_the_same_beside_any_number(tiny_base: Path, threads: int) -> None:
    assert told_apart(tiny_base, threads, COUNTS) == ""


def told_apart(base: Path, threads: int, counts: list[int]) -> str:
    """What tests/traps/neighbour_rows.py found, with so many threads."""
    options = [str(base), ",".join(map(str, counts))]
    run = subprocess.run(
        [sys.executable, "-m", "tests.traps.neighbour_rows", *options],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_an_adapter_that_could_tell_last_digits_is_refused(network: Network) -> None:
    kept = {n: np.zeros_like(a) for n, a in network.trainable().items()}
    for value in (2 * LARGEST, -2 * LARGEST):
        given = {n: a.copy() for n, a in kept.items()}
        given["head.bias"][1] = value
        with pytest.raises(ModelError, match="larger than 1000"):
            network.load_trainable(given)
    network.load_trainable({n: np.full_like(a, LARGEST) for n, a in kept.items()})
    network.load_trainable(kept)
