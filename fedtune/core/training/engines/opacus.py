"""Compute Opacus' per-sample gradients with its hooks on the trainable layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn


class OpacusHooks:
    """Computes per-record gradients by Opacus' module hooks, for any layer that Opacus knows. A
    layer that is recomputed in the backward pass (activation checkpointing) gives no gradient.

    Reference: Yousefpour et al. 2021, "Opacus", section 3."""

    side_by_side = False  # a layer holds what it has seen until its gradient is taken
    name = "opacus"

    def __init__(self, trained: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._trained, self._parameters = trained, parameters

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = [(part, frozenset(vars(part))) for part in self._parts()]
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
            for gradient in self._take_gradients():
                if gradient is not None:
                    gradient.zero_()
            watcher.cleanup()
            self._trained.eval()
            # Opacus leaves inputs on a layer whose backward pass did not end, and sizes later
            # blocks by them: one record that failed would decide what becomes of all others.
            for part, names in before:
                for name in vars(part).keys() - names:
                    delattr(part, name)

    def __call__(self, losses: torch.Tensor) -> list[torch.Tensor | None]:
        torch.autograd.backward(losses.sum())
        return self._take_gradients()

    def _parts(self) -> Iterator[nn.Module | nn.Parameter]:
        """Yield the modules and parameters on which Opacus may set an attribute: all of the trained
        module's."""
        yield from self._trained.modules()
        yield from self._trained.parameters()

    def _take_gradients(self) -> list[torch.Tensor | None]:
        """Return Opacus' per-sample gradients, detached: for each parameter (B, *shape), None if it
        has none. Remove them from the parameters. Overwrite with zeros the sum over the batch that
        autograd left in `grad`, and remove it too."""
        gradients: list[torch.Tensor | None] = []
        for parameter in self._parameters:
            gradient = getattr(parameter, "grad_sample", None)
            gradients.append(gradient.detach() if isinstance(gradient, torch.Tensor) else None)
            if parameter.grad is not None:
                parameter.grad.detach().zero_()
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        return gradients
