"""Rank 1 of a team of two, for tests, in a process of its own.

Each message says what to add up, and how: honestly, or broken in a way that a test must see."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedtune.core.dp import noise
from fedtune.core.dp.clip import Chunk
from fedtune.core.errors import InfrastructureError
from fedtune.core.training.data_parallel import Group, sum_over_workers
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import make_plan

SIZES = [1, 3, 2, 1, 4, 2, 1]  # records of each patient of the real engine


def synthetic(dimension: int) -> Any:
    """Each row's gradient as a function of its number alone."""

    def gradients(rows: list[int]) -> Iterator[Chunk]:
        for row in rows:
            draw = torch.Generator().manual_seed(row)
            yield Chunk([row], [torch.randn(1, dimension, generator=draw)])

    return gradients


def zeros(dimension: int) -> Any:
    def gradients(rows: list[int]) -> Iterator[Chunk]:
        yield Chunk(rows, [torch.zeros(len(rows), dimension)])

    return gradients


def engine(base: str) -> UnitGradientEngine:
    """The shipped engine over generated patients."""
    from fedtune.core.bases.find import find_base
    from fedtune.core.config import LoraTable
    from fedtune.core.models.cache import CachedDataset
    from fedtune.core.models.network import Network
    from fedtune.core.objectives.causal_lm import CausalLM
    from tests.dp.conftest import records

    lora = LoraTable(rank=4, alpha=8.0, modules=("q_proj", "gate_proj"), last_layers=2)
    network = Network(find_base(base), torch.float32, lora, labels=0)
    return UnitGradientEngine(CachedDataset(network, records(SIZES)), CausalLM())


def gradients_of(header: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    if header["rows"] == "synthetic":
        return synthetic(header["dimension"])
    if header["rows"] == "zeros":
        return zeros(header["dimension"])
    if header["rows"] == "given":  # computed elsewhere: the share of rank 1, row by row
        matrix = tensors[1]
        return lambda rows: iter([Chunk(rows, [matrix])] if rows else [])
    return engine(header["base"])


def main(place: str) -> NoReturn:
    torch.set_num_threads(1)
    group = Group(1, 2, None, Path(place))
    while True:
        header, tensors = group.receive()
        plan, how = make_plan(**header["plan"]), header["how"]

        def own(
            rows: list[int],
            header: Any = header,
            tensors: Any = tensors,
            plan: Any = plan,
            how: str = how,
        ) -> torch.Tensor:
            if how == "dies":
                os._exit(1)
            if how == "hangs":
                time.sleep(600)
            if how == "raises":
                raise ValueError("Mrs Example has a fever")
            dimension = header["dimension"]
            found: torch.Tensor = plan.clipped_sum(rows, dimension, gradients_of(header, tensors))
            if how == "adds noise":
                found += noise.gaussian_on_grid(dimension, plan.noise_multiplier, plan.grid)
            return found

        sampled = tensors[0].tolist()
        if how == "skips an empty share" and len(sampled) < 2:
            continue
        if how == "takes rank 0's rows":
            group.rank = 0
        try:
            sum_over_workers(group, sampled, header["dimension"], own)
        except (ValueError, InfrastructureError):
            pass
        finally:
            group.rank = 1
