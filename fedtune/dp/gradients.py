"""Per-unit gradients from Opacus' per-sample gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleModule

from fedtune.models.cache import Batch, Cached
from fedtune.objectives import Objective

_CHUNK_BYTES = 64 * 2**20  # fp32 gradients held at once; the clip needs about four times that


class UnitGradientEngine:
    """The gradients of whole units: for a record itself, for a patient the mean over that
    patient's records (clipped once, later; Charles et al. 2024, user-level sampling).

    Guarantee: each sampled unit is one row, computed from its own records alone; every gradient
    that was not noised is dropped from the model before the next chunk."""

    def __init__(self, data: Cached, objective: Objective) -> None:
        self.data, self.objective = data, objective
        self.parameters = list(data.network.parameters().values())
        self.dimension = sum(p.numel() for p in self.parameters)

    def __call__(self, units: list[int]) -> Iterator[torch.Tensor]:
        """fp32 (units in chunk, dimension) at a time, in the order of `units`."""
        size = max(1, _CHUNK_BYTES // (4 * self.dimension))
        with self._watched():
            for start in range(0, len(units), size):
                yield self._rows(units[start : start + size])

    def _rows(self, units: list[int]) -> torch.Tensor:
        by_unit, examples = self.data.dataset.by_unit, self.data.dataset.examples
        row_of = {unit: row for row, unit in enumerate(units)}
        share = torch.tensor([1.0 / len(by_unit[unit]) for unit in units])
        total = torch.zeros(len(units), self.dimension)
        indices = [index for unit in units for index in by_unit[unit]]
        for batch in self.data.batches(indices):
            rows = torch.tensor([row_of[examples[i].unit] for i in batch.index.tolist()])
            total.index_add_(0, rows, self._per_record(batch) * share[rows, None])
        return total

    def _per_record(self, batch: Batch) -> torch.Tensor:
        torch.autograd.backward(self.objective.losses(self.data.network, batch).sum())
        gradients = []
        for parameter in self.parameters:
            each = parameter.grad_sample  # type: ignore[attr-defined]  # set by Opacus
            if each is None or each.shape[0] != len(batch.index):
                raise RuntimeError("a trainable layer gave no per-record gradient")
            gradients.append(each.detach().float().flatten(1))
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
        return torch.cat(gradients, dim=1)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Opacus' hooks on the trainable layers, for the time of one step only."""
        trained = self.data.network.trained
        watcher = GradSampleModule(trained, loss_reduction="sum", strict=False)
        # Opacus records activations in training mode only. Nothing here has dropout or running
        # statistics, but the base stays in eval mode to be sure.
        trained.eval()
        for module in trained.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.train()
        try:
            with warnings.catch_warnings():
                # The lowest adapter's input needs no gradient (all below is frozen). Opacus needs
                # only the gradient at the output, which the hook does get.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                yield
        finally:
            for parameter in self.parameters:
                parameter.grad = None
            watcher.cleanup()
            trained.eval()
