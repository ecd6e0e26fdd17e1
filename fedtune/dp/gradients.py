"""Gradients of whole units or single records, from Opacus' per-sample gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from opacus.grad_sample import GradSampleModule

from fedtune.models.cache import Batch, Cached
from fedtune.objectives import Objective

_CHUNK_BYTES = 64 * 2**20  # fp32 gradients held at once; the clip needs about four times that


class UnitGradientEngine:
    """The gradients of rows. by "unit": a row is a unit: a record itself, for a patient the mean
    over that patient's records (clipped once, later). by "record": a row is one record. (Charles et
    al. 2024, user-level and example-level sampling.)

    Guarantee: each sampled row is computed from its own records alone; every gradient that was not
    noised is zeroed and dropped from the model before the next chunk."""

    def __init__(
        self, data: Cached, objective: Objective, by: Literal["unit", "record"] = "unit"
    ) -> None:
        self.data, self.objective = data, objective
        self.parameters = list(data.network.parameters().values())
        self.dimension = sum(p.numel() for p in self.parameters)
        each_alone = [[index] for index in range(len(data.dataset.examples))]
        self._members = data.dataset.by_unit if by == "unit" else each_alone

    @property
    def n_rows(self) -> int:
        """How many rows there are to draw from: as private as the data."""
        return len(self._members)

    def __call__(self, rows: list[int]) -> Iterator[torch.Tensor]:
        """fp32 (rows in chunk, dimension) at a time, in the order of `rows`."""
        size = max(1, _CHUNK_BYTES // (4 * self.dimension))
        with self._watched():
            for start in range(0, len(rows), size):
                yield self._rows(rows[start : start + size])

    def _rows(self, rows: list[int]) -> torch.Tensor:
        place = {i: at for at, row in enumerate(rows) for i in self._members[row]}
        share = {i: 1.0 / len(self._members[row]) for row in rows for i in self._members[row]}
        total = torch.zeros(len(rows), self.dimension)
        for batch in self.data.batches(list(place)):
            indices = batch.index.tolist()
            each = self._per_record(batch)
            each *= torch.tensor([share[i] for i in indices])[:, None]
            total.index_add_(0, torch.tensor([place[i] for i in indices]), each)
            each.zero_()
        return total

    def _per_record(self, batch: Batch) -> torch.Tensor:
        torch.autograd.backward(self.objective.losses(self.data.network, batch).sum())
        found = torch.empty(len(batch.index), self.dimension)
        start = 0
        for parameter in self.parameters:
            each = parameter.grad_sample  # type: ignore[attr-defined]  # set by Opacus
            if each is None or each.shape[0] != len(batch.index):
                raise RuntimeError("a trainable layer gave no per-record gradient")
            found[:, start : start + parameter.numel()] = each.detach().flatten(1)
            start += parameter.numel()
        self._wipe()
        return found

    def _wipe(self) -> None:
        """Zero what Opacus and autograd left on the parameters, then drop it."""
        for parameter in self.parameters:
            for left in (getattr(parameter, "grad_sample", None), parameter.grad):
                if isinstance(left, torch.Tensor):
                    left.detach().zero_()
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]

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
            self._wipe()
            watcher.cleanup()
            trained.eval()
