"""Opacus' per-sample gradients, by its hooks on the trainable layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn


class OpacusHooks:
    """Any layer that Opacus knows. Gradients of frozen activations are recorded by module hooks,
    so a layer that is recomputed in the backward pass gives none.

    Reference: Yousefpour et al. 2021, "Opacus", section 3."""

    name = "opacus"

    def __init__(self, trained: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._trained, self._parameters = trained, parameters

    @contextmanager
    def watching(self) -> Iterator[None]:
        watcher = GradSampleModule(self._trained, loss_reduction="sum", strict=False)
        # Opacus records activations in training mode only. Nothing here has dropout or running
        # statistics, but the base stays in eval mode to be sure.
        self._trained.eval()
        for module in self._trained.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.train()
        try:
            with warnings.catch_warnings():
                # The lowest adapter's input needs no gradient (all below is frozen). Opacus needs
                # only the gradient at the output, which the hook does get.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                yield
        finally:
            for each in self._taken():
                if each is not None:
                    each.zero_()
            watcher.cleanup()
            self._trained.eval()

    def __call__(self, losses: torch.Tensor) -> list[torch.Tensor | None]:
        torch.autograd.backward(losses.sum())
        return self._taken()

    def _taken(self) -> list[torch.Tensor | None]:
        """What Opacus left on the parameters, which then hold nothing; autograd's own sums are
        zeroed."""
        found: list[torch.Tensor | None] = []
        for parameter in self._parameters:
            each = getattr(parameter, "grad_sample", None)
            found.append(each.detach() if isinstance(each, torch.Tensor) else None)
            if parameter.grad is not None:
                parameter.grad.detach().zero_()
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        return found
