"""Traps 11, 13, 28: layers whose per-record gradients are missing, shared or one per tile.

Small networks in which the trap is real, under the shipped gradient engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedtune.core.errors import ModelError
from fedtune.core.objectives._interface import Batch
from fedtune.core.training.engines import EngineName
from fedtune.core.training.unit_gradients import UnitGradientEngine

B, L, H = 4, 3, 5
ENGINES: tuple[EngineName, ...] = ("auto", "opacus")


class Sound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, 2)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.linear(states).sum(dim=(1, 2)) ** 2  # type: ignore[no-any-return]


class Checkpointed(Sound):
    """Two layers recomputed in the backward pass: Opacus' hooks come too late for the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(H, H)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out = checkpoint(lambda x: self.linear(self.first(x).tanh()), states, use_reentrant=False)
        return out.sum(dim=(1, 2)) ** 2  # type: ignore[no-any-return]


class Positions(Sound):
    """As in GPT-2: the position embedding is looked up once for all records."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(L, H)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states + self.position(torch.arange(L)[None]))


class Tiles(Sound):
    """As in vision: each record becomes two rows, and the rows' results are summed again."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        tiled = torch.cat([states, 2 * states], dim=1).view(2 * len(states), L, H)
        return self.linear(tiled).view(len(states), -1).sum(dim=1) ** 2  # type: ignore[no-any-return]


class Data:
    """What the engine asks of a dataset, around any module."""

    operators = nullcontext

    def __init__(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        self.network = SimpleNamespace(
            trained=module,
            update_parameters=lambda: dict(module.named_parameters()),
            has_row_per_tile=lambda parameter: False,
            preconditioner={},
        )
        self.dataset = SimpleNamespace(by_unit=[[i] for i in range(B)], examples=[None] * B)
        self.states = torch.randn(B, L, H, generator=torch.Generator().manual_seed(1))

    def work_of_blocks(self, indices: Sequence[int], most: int | None = None) -> int:
        return len(indices)

    def compute_blocks(
        self, compute: Any, indices: Sequence[int], *_: Any, **more: Any
    ) -> Iterator[tuple[Batch, Any]]:
        rows = torch.tensor(list(indices))
        mask = torch.ones(len(rows), L, dtype=torch.bool)
        empty = torch.full((len(rows), L), -100)
        states = self.states[rows].clone().requires_grad_()
        batch = Batch(states, mask, empty, empty[:, 0], rows, count=len(rows))
        yield batch, compute(batch)


class Objective:
    def may_run_beside(self, batch: Batch) -> bool:
        return True

    def losses(self, network: Any, batch: Batch) -> torch.Tensor:
        return network.trained(batch.prefix)  # type: ignore[no-any-return]


def rows_of(module: nn.Module, engine: EngineName) -> torch.Tensor:
    found = UnitGradientEngine(Data(module), Objective(), engine=engine)  # type: ignore[arg-type]
    return found.matrix(range(B))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_stand_in_is_sound(engine: EngineName) -> None:
    """The twin: without a trap the same stand-in gives each record's own gradient."""
    module = Sound()
    assert_own(module, rows_of(module, engine))


def test_a_layer_that_is_recomputed_gives_its_own_gradients_in_one_pass() -> None:
    module = Checkpointed()
    assert_own(module, rows_of(module, "auto"))


def assert_own(module: nn.Module, rows: torch.Tensor) -> None:
    data = Data(module)
    for row in range(B):
        loss = module(data.states[row : row + 1]).sum()
        alone = torch.autograd.grad(loss, list(module.parameters()))
        assert torch.allclose(rows[row], torch.cat([g.flatten() for g in alone]), rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "engine"),
    [(Checkpointed, "opacus"), *((k, e) for k in (Positions, Tiles) for e in ENGINES)],
)
def test_a_layer_without_one_gradient_per_record_stops_the_step(
    kind: type[nn.Module], engine: EngineName
) -> None:
    with pytest.raises(ModelError, match="per-record gradient"):
        rows_of(kind(), engine)
