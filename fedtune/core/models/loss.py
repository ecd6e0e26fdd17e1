"""Compute cross-entropy with a frozen head, without ever holding positions × vocabulary.

The head is the largest layer of a small model, and it is not trained: training needs only the
gradient at its input. This gradient is computed together with the loss, for some positions at a
time."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fedtune.core.objectives._shapes import split_evenly

_CHUNK_BYTES = 32 * 2**20  # fp32 logits held at once: enough rows for a matrix product to be quick


def head_loss(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the negative log-likelihood (nats) of `targets` (n,) under softmax(states Wᵀ), fp32
    (n,).

    states: (n, H); weight: the frozen head's, (V, H), in the type of `states`. Products are
    computed in that type, softmax and loss in fp32, as if the head and cross_entropy ran one after
    the other.
    Reference: Hsu et al. 2024, "Liger kernel", section 3.2 (FusedLinearCrossEntropy)."""
    losses: torch.Tensor = _apply(states, weight, targets)
    return losses


def _apply(*inputs: torch.Tensor) -> Any:
    return _HeadLoss.apply(*inputs)  # type: ignore[no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Compute the losses of `head_loss`, fp32 (n,), and keep the gradient at `states` for
        `backward`.

        - ctx: PyTorch's context of this call
        - states: (n, H)
        - weight: the frozen head's, (V, H)
        - targets: the token to predict from each state, (n,)"""
        losses = torch.empty(len(states), dtype=torch.float32, device=states.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradients = torch.empty_like(states) if needs_gradient else None
        rows = max(1, _CHUNK_BYTES // (4 * len(weight)))
        for part, _ in split_evenly(len(states), rows):
            logits = (states[part] @ weight.T).float()
            at = targets[part, None]
            total = torch.logsumexp(logits, dim=1, keepdim=True)
            losses[part] = (total - logits.gather(1, at))[:, 0]
            if gradients is not None:  # softmax minus one at the target
                probabilities = logits.sub_(total).exp_()
                probabilities.scatter_add_(1, at, torch.full_like(total, -1.0))
                gradients[part] = probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * grad[:, None].to(gradients.dtype), None, None
