"""Compute gradients of units or single records from per-record gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from fedtune.core.dp.clip import Chunk
from fedtune.core.errors import ModelError, describe, is_fault
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import LARGEST
from fedtune.core.models.network import Network
from fedtune.core.models.preconditioner import multiplier_of
from fedtune.core.models.prefix_store import make_room_after
from fedtune.core.models.rank_slice import ALL, trained_slice
from fedtune.core.objectives._interface import Batch, Objective
from fedtune.core.progress import OnWork
from fedtune.core.training import engines
from fedtune.core.training.round_loss import RoundLoss

log = logging.getLogger("fedtune.dp")
_CHUNK_BYTES = 128 * 2**20  # fp32 gradients held at once


class _Factor(NamedTuple):
    """The matrix M of one B's public preconditioner, M = identity · I + sign · wide wideᵀ, with
    `wide` a tensor (1, outputs, rank)."""

    identity: float
    sign: int
    wide: torch.Tensor

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        """Multiply each record's gradient of a B from the left by M, in place, and return the
        gradients, (records, outputs, columns). Each record has a product of its own, so its result
        depends neither on its position nor on the other records."""
        wide = self.wide.expand(len(gradient), -1, -1)
        low = torch.bmm(wide.transpose(1, 2), gradient)
        try:
            projected = torch.bmm(wide, low)
        finally:
            low.zero_()
        gradient.mul_(self.identity).add_(projected, alpha=self.sign)
        projected.zero_()
        return gradient


class _Move(NamedTuple):
    """A B that has a public preconditioner M, and the change to this B: B = before + M · change.

    - view: the trained columns of B in the network
    - before: a copy of their values when the engine was made
    - change: what the steps train, zero at first
    - factor: M"""

    view: torch.Tensor
    before: torch.Tensor
    change: torch.Tensor
    factor: _Factor


def _factor(network: Network, name: str, parameter: torch.Tensor) -> _Factor | None:
    """Return the matrix M of the public preconditioner of the trainable tensor `name`; None if the
    tensor has no preconditioner. parameter: the tensor itself, whose device and number format M
    gets."""
    found = multiplier_of(name, network.preconditioner)
    if found is None:
        return None
    wide = torch.from_numpy(found.wide).to(parameter)[None]
    return _Factor(found.identity, found.sign, wide)


class NoRowGradient(ModelError):
    """A trainable layer does not give one gradient per record. A check on generated records finds
    this before any record of the site is read."""


class UnitGradientEngine:
    """Computes the gradients of rows, the units or records that a step can draw.

    - data: the tokenised records, with the network whose parameters are trained
    - objective: gives each record's loss
    - sampling_unit: "unit" for user-level sampling (Charles et al. 2024): a row is one unit, and
      its gradient is the mean over the unit's records, which the caller clips once. "record" for
      example-level sampling: a row is one record
    - engine: the name of the engine that computes per-record gradients, one of those that
      `engines.choose` takes
    - columns: the columns of each B whose gradients are computed; by default all
    - losses: an object to which the records' losses are added; they stay at the site. None: they
      are not recorded

    The attribute `trained` lists the tensors that a step updates. Without a preconditioner each is
    a view into a parameter. If a B has a public preconditioner M, the step updates a tensor X
    instead, which is zero at first, with B = B₀ + M X. The gradient with respect to X is M g, where
    g is the gradient with respect to B. `write` puts B₀ + M X into the network.

    Guarantee: each sampled row is computed from its own records alone, to the last bit: in blocks
    (records that are computed together) whose shapes follow from the record's padded shapes (its
    bucket) alone. A row's records are added in the order of their buckets. Every gradient without
    noise is handed to the caller, or zeroed and dropped, before the next chunk."""

    def __init__(
        self,
        data: CachedDataset,
        objective: Objective,
        sampling_unit: Literal["unit", "record"] = "unit",
        engine: engines.EngineName = "auto",
        columns: slice = ALL,
        losses: RoundLoss | None = None,
    ) -> None:
        self.data = data
        self.objective = objective
        self._losses = losses
        named = data.network.update_parameters()
        self.parameters = list(named.values())
        views = [trained_slice(name, p.detach(), columns) for name, p in named.items()]
        self._factors = [_factor(data.network, name, p) for name, p in named.items()]
        self.trained: list[torch.Tensor] = []
        self._moves: list[_Move] = []
        for view, factor in zip(views, self._factors, strict=True):
            if factor is not None:
                self._moves.append(
                    _Move(view, view.clone(), torch.zeros(view.shape).to(view), factor)
                )
            self.trained.append(view if factor is None else self._moves[-1].change)
        self.dimension = sum(t.numel() for t in self.trained)
        self._engine = engines.choose(engine, data.network.trained, self.parameters, columns)
        self._columns = columns
        single_records = [[index] for index in range(len(data.dataset.examples))]
        self._members = data.dataset.by_unit if sampling_unit == "unit" else single_records
        n_parameters = sum(p.numel() for p in self.parameters)  # all columns, trained or not
        self._max_rows = max(1, _CHUNK_BYTES // (4 * n_parameters))  # rows at once

    @property
    def name(self) -> str:
        """Name of the per-record gradient engine."""
        return self._engine.name

    @property
    def n_rows(self) -> int:
        """Number of rows to sample from. This number is as private as the records."""
        return len(self._members)

    def __call__(
        self,
        rows: list[int],
        on_work: OnWork | None = None,
        raises: tuple[type[Exception], ...] = (),
    ) -> Iterator[Chunk]:
        """Yield the gradients of `rows` in chunks, each with the gradients of some rows. Every row
        comes once; the order of the rows and the size of the chunks are chosen for speed.

        - on_work: called after each block (records that are computed together) with the work done
          so far and the whole work; None: nothing is called
        - raises: classes of errors that are passed on to the caller, for checks on generated
          records. In a round it is (), since no error of a record may end a round

        A row that cannot be computed, for whatever other reason, gets a gradient of zeros; other
        rows are not affected."""
        pending = dict.fromkeys(rows)
        try:
            for chunk in self._chunks(rows, on_work):
                for row in chunk.rows:
                    del pending[row]
                yield chunk
            return
        except raises:
            raise
        except BaseException as error:
            if not is_fault(error):
                raise
            log.error("rows of a block failed (%s); retrying one by one", describe(error))
            make_room_after(error)
        for row in pending:
            yield self._single_row(row, raises)

    def write(self) -> None:
        """Write each B that has a preconditioner M to the network, as B₀ + M X: B₀ is what B was at
        first, and X is the tensor in `trained` that the steps have changed."""
        for view, before, change, factor in self._moves:
            view.copy_(factor(change.clone()[None])[0].add_(before).clamp_(-LARGEST, LARGEST))

    def _single_row(self, row: int, raises: tuple[type[Exception], ...]) -> Chunk:
        """Compute the gradient of one row by itself, with one block of its records at a time. If
        that fails, log the error, and return zeros for the row. An error of the classes `raises` is
        passed on to the caller instead."""
        try:
            (chunk,) = self._chunks([row], None, alone=True)
            return chunk
        except raises:
            raise
        except BaseException as error:
            if not is_fault(error):
                raise
            log.error("a unit's gradient failed (%s); it takes no part", describe(error))
            return Chunk([row], [t.new_zeros(1, t.numel()) for t in self.trained])

    def _chunks(
        self, rows: list[int], on_work: OnWork | None, *, alone: bool = False
    ) -> Iterator[Chunk]:
        single = [row for row in rows if len(self._members[row]) == 1]
        several = [row for row in rows if len(self._members[row]) > 1]
        parts = [several[at : at + self._max_rows] for at in range(0, len(several), self._max_rows)]
        work = [
            self.data.work_of_blocks(
                [i for row in part for i in self._members[row]], self._max_rows
            )
            for part in (single, *parts)
        ]

        def report_part(part: int) -> OnWork:
            before, total = sum(work[:part]), sum(work)
            return lambda done, _: on_work(before + done, total) if on_work else None

        # A unit of several records is averaged here, with as many operator threads as its blocks.
        with self._engine.watching(), self.data.operators():
            yield from self._single_records(single, report_part(0), alone)
            for number, part in enumerate(parts, 1):
                yield self._means(part, report_part(number), alone)

    def matrix(self, rows: Sequence[int]) -> torch.Tensor:
        """Compute the gradients of `rows` as one tensor (rows, d), in their order. This is for
        tests, and for checks on generated records. Errors: NoRowGradient."""
        matrix = torch.empty(len(rows), self.dimension)
        positions = {row: position for position, row in enumerate(rows)}
        for chunk in self(list(rows), raises=(NoRowGradient,)):
            matrix[[positions[row] for row in chunk.rows]] = chunk.flat().to(matrix)
            chunk.wipe()
        return matrix

    def _single_records(self, rows: list[int], on_work: OnWork, alone: bool) -> Iterator[Chunk]:
        """Yield the gradients of rows that have one record each, a chunk for each block (records
        that are computed together). on_work: called after each block with the work done so far and
        the whole work; alone: whether only one block is computed at a time."""
        row_of = {self._members[row][0]: row for row in rows}
        for indices, gradients in self._of_records(list(row_of), on_work, alone):
            yield Chunk([row_of[i] for i in indices], gradients)

    def _means(self, rows: list[int], on_work: OnWork, alone: bool) -> Chunk:
        """Return one chunk with the gradients of rows that have several records. A row's gradient
        is the mean over its records, added up block by block.

        - rows: the numbers of the rows
        - on_work: called after each block (records that are computed together) with the work done
          so far and the whole work
        - alone: whether only one block is computed at a time"""
        positions = {i: position for position, row in enumerate(rows) for i in self._members[row]}
        weights = {i: 1.0 / len(self._members[row]) for row in rows for i in self._members[row]}
        means = [t.new_zeros(len(rows), t.numel()) for t in self.trained]
        chunk = Chunk(rows, means)
        try:
            for indices, per_parameter in self._of_records(list(positions), on_work, alone):
                try:
                    for mean, gradients in zip(means, per_parameter, strict=True):
                        # One by one: the atomic additions of index_add_ on a GPU have no order.
                        for i, gradient in zip(indices, gradients, strict=True):
                            mean[positions[i]] += gradient.mul_(weights[i])
                finally:
                    _wipe(per_parameter)
        except BaseException:
            chunk.wipe()
            raise
        return chunk

    def _of_records(
        self, records: list[int], on_work: OnWork, alone: bool
    ) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
        """Yield the gradients of `records`, each record once, in blocks of records that are
        computed together. For each block, yield the records' indices, and a list with a tensor of
        gradients for each parameter.

        - records: the indices of the records
        - on_work: called after each block with the work done so far and the whole work
        - alone: whether only one block is computed at a time. If not, several are computed at the
          same time, as far as network, engine and objective allow it"""
        computed = self.data.compute_blocks(
            self._per_record,
            records,
            self._max_rows,
            on_work,
            may_share=lambda batch: (
                not alone and self._engine.side_by_side and self.objective.may_run_beside(batch)
            ),
            discard=_discard,
        )
        for batch, (losses, gradients) in computed:
            if self._losses is not None:
                self._losses.add(losses)
            yield batch.index[: batch.count].tolist(), gradients

    def _per_record(self, batch: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Compute the losses of a block's real records, (count,), and a list of their gradients,
        one tensor (count, the parameter's size) for each parameter. The copies that fill the block
        up get no result, and their gradients are wiped.

        A record may have several passages, and in a projector several tiles of an image; their
        gradients are summed here, before any norm is taken. The number of tiles is declared by
        batch and network, never inferred from a gradient's shape."""
        losses = self.objective.losses(self.data.network, batch)
        gradients = self._engine(losses)
        made: list[torch.Tensor] = []
        try:
            return losses[: batch.count].detach(), self._flatten(batch, gradients, made)
        except BaseException:
            _wipe([*gradients, *made])
            raise

    def _flatten(
        self,
        batch: Batch,
        gradients: Sequence[torch.Tensor | None],
        made: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Bring the engine's gradients into one form: for each parameter a tensor with one row per
        real record of the batch, (count, the parameter's size).

        - batch: the block for which the gradients were computed
        - gradients: the gradient of each parameter, by record, passage or tile; None if there is
          none
        - made: a list to which every new tensor of gradients is added at once, so that the caller
          can wipe it

        Errors: NoRowGradient if a parameter has no gradient per record."""
        flat = []
        n_records = len(batch.index)
        n_passages = len(batch.mask)
        layers = zip(self.parameters, self.trained, gradients, self._factors, strict=True)
        for parameter, trained, gradient, factor in layers:
            tiles = batch.tiles if self.data.network.has_row_per_tile(parameter) else 1
            expected_lengths = (n_records, n_passages) if tiles == 1 else (n_passages * tiles,)
            if gradient is None or gradient.shape[0] not in expected_lengths:
                raise NoRowGradient("a trainable layer gave no per-record gradient")
            gradient = _slice_columns(gradient, trained.shape[-1], self._columns)
            made.append(gradient)
            if gradient.shape[0] == n_records:
                per_record = gradient.flatten(1)
                made.append(per_record)
                if per_record.untyped_storage().data_ptr() != gradient.untyped_storage().data_ptr():
                    gradient.zero_()  # of this layout `flatten` makes a copy
            else:
                passages = len(gradient) // n_records
                per_passage = gradient.view(n_records, passages, *gradient.shape[1:])
                per_record = per_passage.sum(dim=1).flatten(1)
                made.append(per_record)
                gradient.zero_()
            if factor is not None:
                factor(per_record.view(n_records, *trained.shape))
            per_record[batch.count :].zero_()
            flat.append(per_record[: batch.count])
        return flat


def _discard(computed: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Overwrite a block's gradients, which have no noise, with zeros; the engine calls this if it
    drops the block's result because something failed. computed: the block's losses, which stay as
    they are, and its gradients."""
    _wipe(computed[1])


def _wipe(gradients: Sequence[torch.Tensor | None]) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()


def _slice_columns(gradient: torch.Tensor, width: int, columns: slice) -> torch.Tensor:
    """Return `columns` of a gradient that is wider than `width`, and set the whole original to
    zero. A gradient that is exactly `width` wide is returned as it is."""
    if gradient.shape[-1] == width:
        return gradient
    selected = gradient[..., columns].clone()
    gradient.zero_()
    return selected
