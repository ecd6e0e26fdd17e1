"""Gradients of whole units or single records, from the records' own gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from fedtune.dp.clip import Chunk
from fedtune.errors import FedtuneError, ModelError
from fedtune.models.cache import CachedDataset
from fedtune.models.rank_slice import ALL, trained_slice
from fedtune.objectives._interface import Batch, Objective
from fedtune.training import engines

log = logging.getLogger("fedtune.dp")
_CHUNK_BYTES = 128 * 2**20  # fp32 gradients held at once


class UnitGradientEngine:
    """The gradients of rows. by "unit": a row is a unit: a record itself, for a patient the mean
    over that patient's records (clipped once, later). by "record": a row is one record. (Charles et
    al. 2024, user-level and example-level sampling.) columns: of each B these alone.

    trained: what a step moves, as views into the network's parameters, in the update's order.

    Guarantee: each sampled row is computed from its own records alone, to the last bit: in blocks
    whose shapes follow from the record's own bucket, added up in an order of the unit's own. Every
    gradient that was not noised is handed to the caller, or zeroed and dropped, before the next
    chunk."""

    def __init__(
        self,
        data: CachedDataset,
        objective: Objective,
        by: Literal["unit", "record"] = "unit",
        engine: engines.Wanted = "auto",
        columns: slice = ALL,
    ) -> None:
        self.data, self.objective = data, objective
        named = data.network.parameters()
        self.parameters = list(named.values())
        self.trained: list[torch.Tensor] = [
            trained_slice(name, parameter.detach(), columns) for name, parameter in named.items()
        ]
        self.dimension = sum(t.numel() for t in self.trained)
        self._each = engines.choose(engine, data.network.trained, self.parameters, columns)
        self._columns = columns
        each_alone = [[index] for index in range(len(data.dataset.examples))]
        self._members = data.dataset.by_unit if by == "unit" else each_alone
        whole = sum(p.numel() for p in self.parameters)  # an engine may give more than is trained
        self._most = max(1, _CHUNK_BYTES // (4 * whole))  # rows at once

    @property
    def name(self) -> str:
        """Which engine computes the records' gradients."""
        return self._each.name

    @property
    def n_rows(self) -> int:
        """How many rows there are to draw from: as private as the data."""
        return len(self._members)

    def __call__(self, rows: list[int]) -> Iterator[Chunk]:
        """The gradients of `rows`, each once, in whatever order and chunks are quickest.

        Whatever the records of a row make a library raise costs that row alone: it is zero, as one
        that is not finite. Errors: FedtuneError (a disk, a layer that is not watched), which no
        record decides."""
        left = dict.fromkeys(rows)
        try:
            for chunk in self._chunks(rows):
                for row in chunk.rows:
                    del left[row]
                yield chunk
            return
        except FedtuneError:
            raise
        except Exception as error:  # its words may quote a record
            log.error("rows of a block failed (%s); each is computed alone", type(error).__name__)
        for row in left:
            yield self._by_itself(row)

    def _by_itself(self, row: int) -> Chunk:
        try:
            (chunk,) = self._chunks([row])
            return chunk
        except FedtuneError:
            raise
        except Exception as error:
            log.error("a unit's gradient failed (%s); it takes no part", type(error).__name__)
            return Chunk([row], [t.new_zeros(1, t.numel()) for t in self.trained])

    def _chunks(self, rows: list[int]) -> Iterator[Chunk]:
        single = [row for row in rows if len(self._members[row]) == 1]
        several = [row for row in rows if len(self._members[row]) > 1]
        with self._each.watching():
            yield from self._alone(single)
            for start in range(0, len(several), self._most):
                yield self._means(several[start : start + self._most])

    def matrix(self, rows: Sequence[int]) -> torch.Tensor:
        """Compute the gradients of `rows` as one tensor (rows, d), in their order: for tests, on
        records that are nobody's."""
        found = torch.empty(len(rows), self.dimension)
        place = {row: at for at, row in enumerate(rows)}
        for chunk in self(list(rows)):
            found[[place[row] for row in chunk.rows]] = chunk.flat().to(found)
            chunk.wipe()
        return found

    def _alone(self, rows: list[int]) -> Iterator[Chunk]:
        """Rows of one record each: a micro-batch is a chunk, as it is."""
        row_of = {self._members[row][0]: row for row in rows}
        for batch in self.data.blocks(list(row_of), self._most):
            indices = batch.index[: batch.count].tolist()
            yield Chunk([row_of[i] for i in indices], self._per_record(batch))

    def _means(self, rows: list[int]) -> Chunk:
        """Rows of several records each, whose gradients are averaged over micro-batches."""
        place = {i: at for at, row in enumerate(rows) for i in self._members[row]}
        share = {i: 1.0 / len(self._members[row]) for row in rows for i in self._members[row]}
        total = [t.new_zeros(len(rows), t.numel()) for t in self.trained]
        for batch in self.data.blocks(list(place), self._most):
            indices = batch.index[: batch.count].tolist()
            for mean, each in zip(total, self._per_record(batch), strict=True):
                # One by one: an atomic addition, as index_add_ is on a GPU, has no order.
                for i, gradient in zip(indices, each, strict=True):
                    mean[place[i]] += gradient.mul_(share[i])
                each.zero_()
        return Chunk(rows, total)

    def _per_record(self, batch: Batch) -> list[torch.Tensor]:
        """For each parameter (count, its size), what fills the block wiped. A record's passages,
        and in a projector the tiles of their images, are added up here, before any norm is taken.
        How many tiles there are is declared, by the batch and by the network, and never inferred
        from a gradient's shape."""
        found, records, rows = [], len(batch.index), len(batch.mask)
        gradients = self._each(self.objective.losses(self.data.network, batch))
        for parameter, part, each in zip(self.parameters, self.trained, gradients, strict=True):
            tiles = batch.tiles if self.data.network.meets_tiles(parameter) else 1
            known = (records, rows) if tiles == 1 else (rows * tiles,)
            if each is None or each.shape[0] not in known:
                raise ModelError("a trainable layer gave no per-record gradient")
            each = _cut(each, part.shape[-1], self._columns)
            if each.shape[0] == records:
                whole = each.flatten(1)
            else:
                parts = each.view(records, len(each) // records, *each.shape[1:])
                whole = parts.sum(dim=1).flatten(1)
                each.zero_()
            whole[batch.count :].zero_()
            found.append(whole[: batch.count])
        return found


def _cut(each: torch.Tensor, width: int, columns: slice) -> torch.Tensor:
    """These columns, where an engine gave more than `width`; the others are wiped."""
    if each.shape[-1] == width:
        return each
    kept = each[..., columns].clone()
    each.zero_()
    return kept
