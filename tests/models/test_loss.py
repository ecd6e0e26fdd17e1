"""The fused loss against the head and cross_entropy apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune.core.models import loss
from fedtune.core.models.loss import head_loss

N, H, V = 37, 16, 301


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(N, H, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=draw).to(dtype)
    targets = torch.randint(V, (N,), generator=draw)
    return states, weight, targets, torch.rand(N, generator=draw)


def apart(
    states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    each = functional.cross_entropy((states @ weight.T).float(), targets, reduction="none")
    (slope,) = torch.autograd.grad((each * shares).sum(), states)
    return each.detach(), slope


@pytest.mark.parametrize("rows", [1, 7, 37, 1000])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradient_are_those_of_the_parts(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype, near: float
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_BYTES", rows * 4 * V)
    states, weight, targets, shares = drawn(dtype)
    expected, slope = apart(states, weight, targets, shares)
    found = head_loss(states, weight, targets)
    (ours,) = torch.autograd.grad((found * shares).sum(), states)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert float((ours - slope).norm() / slope.norm()) < near
    assert (found.dtype, ours.dtype) == (torch.float32, dtype)


def test_no_position_and_no_gradient() -> None:
    states, weight, targets, _ = drawn(torch.float32)
    assert head_loss(states[:0], weight, targets[:0]).shape == (0,)
    with torch.no_grad():
        found = head_loss(states, weight, targets)
    assert not found.requires_grad
    assert torch.allclose(found, apart(*drawn(torch.float32))[0], rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def largest(function: Any) -> int:
    states, weight, targets, shares = drawn(torch.float32)
    with Largest() as seen:
        (function(states, weight, targets) * shares).sum().backward()
    return seen.numbers


def test_positions_times_vocabulary_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin holds them all, and the same look at it shows that."""
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 4 * 4 * V)
    assert largest(head_loss) <= max(4 * V, H * V)
    plain = lambda s, w, t: functional.cross_entropy(s @ w.T, t, reduction="none")  # noqa: E731
    assert largest(plain) == N * V
