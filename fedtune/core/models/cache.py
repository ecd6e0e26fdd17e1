"""Form micro-batches of a dataset, with the states below the cut computed once per record.

The kernel of a matrix product, and its order of addition, depend on the matrices' shapes, so the
last digits of a record's results depend on the number of records beside it. Every result that is
summed under the guarantee is therefore computed in blocks: micro-batches whose shapes all follow
from the padded shapes of the record itself, its bucket (docs/decisions/0025-fixed-shapes.md). Each
block is computed on a core of its own (docs/decisions/0092-blocks-side-by-side.md)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fedtune.core.data.dataset import NO_TARGET, Dataset, Passage
from fedtune.core.data.media import Media
from fedtune.core.errors import is_fault
from fedtune.core.models.cores import POSITIONS_PER_CORE, compute_side_by_side, one_operator_thread
from fedtune.core.models.network import BLOCK_POSITIONS, PREFIX_POSITIONS, Network
from fedtune.core.models.prefix_store import (
    PREFIX_STORE,
    Altered,
    HiddenStates,
    Unavailable,
    make_room_after,
)
from fedtune.core.objectives._interface import Batch
from fedtune.core.objectives._shapes import EIGHT, head_positions, padded_length
from fedtune.core.progress import OnWork, report

log = logging.getLogger("fedtune.models")

Indices = Sequence[int]
Result = TypeVar("Result")


class Bucket(NamedTuple):
    """The padded shapes of one record, which depend on no other record. Records share a micro-batch
    only if all their shapes are equal.

    - length: the padded number of positions whose states are kept, for the longest of the record's
      passages (token sequences)
    - tiles: number of tiles into which the base splits the record's file; 1 without a file
    - targets: number of positions of a passage at which the base's own head runs; 0 for a record
      without targets, or if only a head is trained
    - full: whether there is no padding; only for an encoder, which reads a padding mask"""

    length: int
    tiles: int = 1
    targets: int = 0
    full: bool = False


class CachedDataset:
    """A dataset whose records' states at a network's cut are computed once and cached.

    If something below the adapters is frozen, each record's states are computed once and kept
    unpadded (2 · positions · H bytes in bf16, for states of H numbers; prefix_store.py), and every
    later step starts at the cut. This is exact, since below the cut there is no dropout and no
    adapter. The states of all positions are kept, with two exceptions. If no layer above the cut
    mixes positions, only the states of positions with a target are kept, or that of the last
    position if the record has no target. If only a head is trained, the one pooled vector is kept.
    Guarantee: a record's states at the cut, and its results in `compute_blocks`, come from matrix
    products whose shapes follow from the record's own bucket (padded shapes), not from other
    records.

    - network: the network whose frozen part computes the states
    - dataset: the tokenised records
    - memory: bytes of states that the process may hold before more go to the encrypted file; None:
      the process's share of a quarter of the machine's memory

    Datasets that hold the same record over the same network share its states. The states are named
    by a digest of token ids, kept positions and media file. The ids reflect tokenizer, template and
    length, and a network has one base, dtype, quantisation and cut."""

    def __init__(
        self, network: Network, dataset: Dataset, memory: int | None = None, *, alone: bool = False
    ) -> None:
        """Prepare the dataset; no state is computed yet.

        - network, dataset, memory: see the class
        - alone: whether each block holds one record only. It always does if results of this base
          would depend on the other records of a block (`network.shares_blocks` is False)"""
        self.network = network
        self._alone = alone or not network.shares_blocks
        self.dataset = dataset
        self._memory = memory
        # How many blocks are computed at once. None: one block, on all cores or on a GPU. A block
        # of several records is never computed by more than one thread of operators.
        self.cores: int | None = None
        if network.keeps_apart and network.device.type == "cpu":
            self.cores = torch.get_num_threads() if network.side_by_side else 1
        # k passages of each record, record by record.
        self._passages = [s for example in dataset.examples for s in example.passages]
        self._n_passages = len(dataset.examples[0].passages) if dataset.examples else 1
        assert len(self._passages) == self._n_passages * len(dataset.examples)
        self._positions = [self._positions_to_keep(passage) for passage in self._passages]
        self._tiles = [example.tiles for example in dataset.examples]
        media = [e.media.digest if e.media else b"" for e in dataset.examples]
        self._names = [
            _name(s, positions, media[row // self._n_passages])
            for row, (s, positions) in enumerate(zip(self._passages, self._positions, strict=True))
        ]
        self._tower_states: dict[bytes, HiddenStates] = {}  # by the file's digest
        self._states = [network.states.get(name) for name in self._names]
        self._failed: set[int] = set()  # passages whose states cannot be computed
        self._logps = torch.full((len(dataset.examples), self._n_passages), torch.nan)
        self._buckets = [self._bucket(record) for record in range(len(dataset.examples))]

    def of(self, dataset: Dataset) -> CachedDataset:
        """Return `dataset` cached over the same network, with the same limit `memory`."""
        return CachedDataset(self.network, dataset, self._memory)

    def operators(self) -> AbstractContextManager[None]:
        """Return a context in which this thread uses as many of PyTorch's operator threads as a
        block is computed with: one if `cores` is set, else all."""
        return nullcontext() if self.cores is None else one_operator_thread()

    @property
    def states(self) -> list[HiddenStates]:
        """Return the stored states of all passages for which they were computed so far. While the
        caller holds these objects, the states are not erased."""
        return [state for state in self._states if state is not None]

    def _positions_to_keep(self, passage: Passage) -> npt.NDArray[np.int64]:
        if self.network.pooled:
            return np.zeros(1, dtype=np.int64)
        length = len(passage.input_ids)
        targets = np.flatnonzero(passage.target_ids != -100)
        if not self.network.positionwise:
            return np.arange(length)
        return targets if len(targets) else np.array([length - 1])

    def _bucket(self, record: int) -> Bucket:
        rows = self._rows([record])
        length = padded_length(max(len(self._positions[row]) for row in rows))
        tiles = self._tiles[record]
        if self.network.pooled:
            return Bucket(length, tiles)
        max_targets = max(int((self._passages[row].target_ids != -100).sum()) for row in rows)
        full = self.network.kind == "encoder" and all(
            len(self._positions[row]) == length for row in rows
        )
        targets = head_positions(length, max_targets) if max_targets else 0
        return Bucket(length, tiles, targets, full)

    def _prefix_bucket(self, row: int) -> Bucket:
        """Return the bucket (padded shapes) of a passage in the pass through the frozen part. row:
        the passage's number in the dataset."""
        length = len(self._passages[row].input_ids)
        padded = padded_length(length)
        full = self.network.kind == "encoder" and length == padded
        return Bucket(padded, self._tiles[row // self._n_passages], full=full)

    def _prefix_block(self, bucket: Bucket) -> int:
        """Return how many passages of this bucket form a block in the pass through the frozen
        part."""
        if self._alone:
            return 1
        positions = bucket.length + self.network.frames(bucket.tiles)
        rows = PREFIX_POSITIONS[self.network.device.type] // positions
        return _fit_to_vectors(rows, *self._rows_of_products(bucket))

    def _rows_of_products(self, bucket: Bucket) -> tuple[int, int, int]:
        """Return how many rows the products have for one passage of the bucket: in the text's
        layers, in what reads the tower's states, and in the projector."""
        frames = self.network.frames(bucket.tiles)
        return bucket.length, frames, self.network.projected(bucket.tiles)

    def warm(self) -> None:
        """Compute all records' states at the cut that are missing now, and report the progress."""
        if not self.network.cached:
            return
        self._states = [self.network.states.get(name) for name in self._names]
        missing = (row for row, state in enumerate(self._states) if state is None)
        # One answer may be in several pairs: equal passages are computed once.
        new = list({self._names[row]: row for row in missing}.values())
        groups = list(_group_by_bucket(new, self._prefix_bucket, self._prefix_block))
        # A block takes as long as its positions, also if some of its rows only fill it up.
        work = [
            self._prefix_block(bucket) * (bucket.length + self.network.frames(bucket.tiles))
            for bucket, _ in groups
        ]
        done = 0
        total = sum(work)
        label = "reading records once through the frozen layers"
        if total:
            report(label, done, total, once=True)
        self._encode_files()
        passes = self._prefix_passes([rows for _, rows in groups])
        for positions, _ in zip(work, passes, strict=True):
            done += positions
            report(label, done, total, once=True)
        self._states = [self.network.states.get(name) for name in self._names]
        self._failed = {row for row, state in enumerate(self._states) if state is None}
        if not self.network.reads_tower:
            self._tower_states.clear()

    def _encode_files(self) -> None:
        """Compute and store the states of the tower (the base's frozen encoder of images or audio)
        for all files that have none yet. At the first file that fails, stop: the rest are encoded
        with the records that need them."""
        files = {e.media.digest: e.media for e in self.dataset.examples if e.media is not None}
        missing = [file for file in files.values() if self._stored_tower_states(file) is None]

        def encode(file: Media) -> torch.Tensor:
            return self.network.encode_media(self.network.reader.tensor(file)).cpu()

        try:
            share = POSITIONS_PER_CORE  # a tower's frames are more than a text's positions
            found = compute_side_by_side(encode, missing, self.cores, positions_of=lambda _: share)
            for file, states in found:
                self._store_tower_states(file, states)
        except BaseException as error:  # its text may quote a record, so it is not logged
            if not is_fault(error):
                raise
            log.error("a file cannot be read by the base (%s)", type(error).__name__)
            make_room_after(error)

    def _prefix_passes(self, groups: Sequence[list[int]]) -> Iterator[None]:
        """Compute and store the states of passages, block by block; yield after each block, so that
        the caller can report the progress. groups: for each block, the numbers of its passages.

        If a block fails, each of its passages is computed again by itself. A passage that fails
        again is left without states, and raises when it is read."""
        done = 0
        while done < len(groups):
            blocks = ((rows, self._encode_media(self._filled(rows))) for rows in groups[done:])
            try:
                passes = compute_side_by_side(
                    self._pass_through_prefix,
                    blocks,
                    self.cores,
                    positions_of=lambda block: len(block[0]) * self._prefix_positions(block[0]),
                )
                for (rows, _), states in passes:
                    self._store(rows, states)
                    done += 1
                    yield
            except BaseException as error:  # its text may quote a record, so it is not logged
                if not is_fault(error):
                    raise
                log.error("a block cannot be read by the base (%s)", type(error).__name__)
                make_room_after(error)
            if done < len(groups):  # outside `except`, so that the error holds no memory any more
                for row in groups[done]:
                    self._compute_alone(row)
                done += 1
                yield

    def _compute_alone(self, row: int) -> None:
        """Compute and store the states of one passage while nothing else is computed. Log the error
        if this fails. row: the passage's number in the dataset."""
        try:
            with self.operators():
                tower_states = self._encode_media(self._filled([row]))
                self._store([row], self._pass_through_prefix(([row], tower_states)))
        except BaseException as error:  # its text may quote a record, so it is not logged
            if not is_fault(error):
                raise
            log.error("a record cannot be read by the base (%s)", type(error).__name__)
            make_room_after(error)

    def _prefix_positions(self, rows: list[int]) -> int:
        """Return how many positions the frozen part computes for one passage: its tokens with
        padding, and the states that the tower (frozen encoder) gives for its file. rows: which
        passages, by their numbers in the dataset; all are padded to the same shapes (one bucket),
        so the result is the same for each."""
        bucket = self._prefix_bucket(rows[0])
        return bucket.length + self.network.frames(bucket.tiles)

    def _filled(self, rows: list[int]) -> list[int]:
        return _fill_block(rows, self._prefix_block(self._prefix_bucket(rows[0])))

    def _pass_through_prefix(self, block: tuple[list[int], torch.Tensor | None]) -> torch.Tensor:
        """Compute the states at the cut of passages of one bucket (padded shapes), at most as many
        as a block holds. Return them for a whole block, with padding, (passages, length, H), on the
        CPU. block: a pair of the passages' numbers, and the states that the tower (frozen encoder)
        gives for the whole block's files (None without files)."""
        rows, tower_states = block
        hidden = self.network.prefix(*self._tokens(self._filled(rows)), tower_states)
        return hidden.cpu()  # none stay in a GPU's memory

    def _store(self, rows: list[int], states: torch.Tensor) -> list[torch.Tensor]:
        """Store the states of passages, and return them without padding, one tensor for each
        passage. rows: the passages' numbers; states: their padded states, (passages, length, H)."""
        computed = []
        for row, index in enumerate(rows):
            name, positions = self._names[index], torch.from_numpy(self._positions[index])
            computed.append(states[row, positions])
            state = PREFIX_STORE.keep(computed[-1], name, self._memory)
            self.network.states[name] = self._states[index] = state
        return computed

    def batches(
        self, indices: Indices, token_budget: int = 4096, on_work: OnWork | None = None
    ) -> Iterator[Batch]:
        """Yield the records `indices`, each once, in micro-batches. Use this for public or local
        results only, since the last digits of a record's result depend on the other records of its
        micro-batch.

        - indices: the records' places in the dataset's examples
        - token_budget: the most positions of a micro-batch, whose records are all of one bucket
          (padded shapes). It may be exceeded only by a micro-batch of one record
        - on_work: called with the work done so far and the total, each time the next micro-batch is
          requested; None: not called"""
        self._ensure_warm(indices)

        def size(bucket: Bucket) -> int:
            return max(1, token_budget // self._positions_per_record(bucket))

        groups = list(_group_by_bucket(indices, self._buckets.__getitem__, size))
        done, total = 0, sum(self._work(bucket, len(records)) for bucket, records in groups)
        for bucket, records in groups:
            yield self._batch(bucket, records, len(records))
            done += self._work(bucket, len(records))
            if on_work:
                on_work(done, total)

    def compute_blocks(
        self,
        compute: Callable[[Batch], Result],
        indices: Indices,
        limit: int | None = None,
        on_work: OnWork | None = None,
        *,
        may_share: Callable[[Batch], bool] = lambda _: True,
        discard: Callable[[Result], None] = lambda _: None,
    ) -> Iterator[tuple[Batch, Result]]:
        """Compute records block by block: yield each block with `compute(block)`. Blocks are
        micro-batches of a fixed shape: each holds the same number of records of a bucket (padded
        shapes); a block with fewer is filled up with copies of its first record. Use it for
        everything that is summed over units and noised.

        - compute: called with each block, in several threads at once if the network allows it
        - indices: the records' places in the dataset's examples, each once
        - limit: the most records of a block; None: as many as BLOCK_POSITIONS positions hold
        - on_work: called with the work done so far and the total, after each block; None: not
          called
        - may_share: returns whether this block may be computed while `compute` runs in other
          threads; if not, it is computed alone
        - discard: called with each result that was computed and is not yielded, because an earlier
          block failed or the caller stopped

        Guarantee: a record's result follows from the record and its bucket, to the last bit, at any
        number of cores."""
        self._ensure_warm(indices)
        groups = self._block_groups(indices, limit)
        blocks = (self._batch(b, _fill_block(r, size), len(r)) for b, size, r in groups)
        total = sum(self._work(bucket, size) for bucket, size, _ in groups)
        computed = compute_side_by_side(
            compute,
            blocks,
            self.cores,
            positions_of=lambda batch: batch.mask.numel(),
            may_share=may_share,
            discard=discard,
        )
        done = 0
        for (bucket, size, _), (batch, result) in zip(groups, computed, strict=True):
            yield batch, result
            done += self._work(bucket, size)
            if on_work:
                on_work(done, total)

    def work_of_blocks(self, indices: Indices, limit: int | None = None) -> int:
        """Return how many multiplications it takes to compute these records in blocks. It is the
        total that `compute_blocks` reports to `on_work`.

        - indices: the records' places in the dataset's examples
        - limit: the most records of a block; None: as many as BLOCK_POSITIONS positions hold"""
        return sum(
            self._work(bucket, size) for bucket, size, _ in self._block_groups(indices, limit)
        )

    def _block_groups(
        self, indices: Indices, limit: int | None
    ) -> list[tuple[Bucket, int, list[int]]]:
        """Group records into blocks. Return a triple for each block: its bucket (padded shapes),
        its fixed size in records, and its records, which may be fewer than the size.

        - indices: the records' places in the dataset's examples
        - limit: the most records of a block; None: as many as BLOCK_POSITIONS positions hold"""

        def size(bucket: Bucket) -> int:
            if self._alone or (self.network.head is not None and not self.network.pooled):
                return 1  # with few rows and labels, results depend on a row's place all the same
            budget = BLOCK_POSITIONS[self.network.device.type]
            positions = self._positions_per_record(bucket)
            # For a record without targets, the head still runs at one position.
            heads = self._n_passages * max(1, bucket.targets)
            heads = positions if self.network.pooled else heads
            rows = min(budget // positions, limit or budget)
            return _fit_to_vectors(rows, *self._rows_of_products(bucket), heads)

        groups = _group_by_bucket(indices, self._buckets.__getitem__, size)
        return [(bucket, size(bucket), records) for bucket, records in groups]

    def _work(self, bucket: Bucket, records: int) -> int:
        """Count the multiplications of a pass of `records` records of a bucket through the layers
        above the cut. The time of the pass and the time of a gradient are proportional to this
        number; only ratios matter."""
        of_position, of_target = self.network.products
        positions = self._positions_per_record(bucket)
        targets = self._n_passages * bucket.targets
        return records * (1 + positions * of_position + targets * of_target)

    def _ensure_warm(self, indices: Indices) -> None:
        rows = set(self._rows(indices)) - self._failed
        if self.network.cached and any(self._states[at] is None for at in rows):
            self.warm()
        elif self.network.reads_tower:
            self._encode_files()

    def _positions_per_record(self, bucket: Bucket) -> int:
        """Count the positions that one record of the bucket holds in memory. The positions of the
        record's image, recording or clip are included if the layers above the cut read its states,
        or if nothing is cached."""
        held = self.network.reads_tower or not self.network.cached
        frames = self.network.frames(bucket.tiles) if held else 0
        return self._n_passages * (bucket.length + frames)

    def _batch(self, bucket: Bucket, records: list[int], count: int) -> Batch:
        rows = self._rows(records)
        tower_states = self._encode_media(rows) if self.network.reads_tower else None
        mask = torch.zeros(len(rows), bucket.length, dtype=torch.bool)
        targets = torch.full((len(rows), bucket.length), -100, dtype=torch.long)
        for row, passage in enumerate(rows):
            positions = self._positions[passage]
            mask[row, : len(positions)] = True
            if not self.network.pooled:
                real = np.asarray(self._passages[passage].target_ids, dtype=np.int64)[positions]
                targets[row, : len(positions)] = torch.from_numpy(real)
        check_tokens(targets, self.network.rows, targets=True)
        device, examples = self.network.device, self.dataset.examples
        return Batch(
            prefix=self._prefix(rows, bucket.length, tower_states).to(device),
            mask=mask.to(device),
            target_ids=targets.to(device),
            label=torch.tensor([examples[i].label for i in records], device=device),
            index=torch.tensor(records),
            soft=self._pad_soft_targets(records),
            tower_states=tower_states,
            tiles=bucket.tiles,
            count=count,
            reference_logps=self._logps,
        )

    def _pad_soft_targets(self, records: Indices) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Pad the teacher's soft targets of `records` to one shape. Return a pair: token ids (or
        labels) and their log-probabilities, both (records, targets, outcomes); None if the records
        have no soft targets.

        The number of targets after padding depends on all records in the block. A record's loss
        does not: it reads only the record's own targets, at the record's own positions
        (objectives/distill.py), and no sum runs over the padding."""
        marks = [mark for i in records if (mark := self.dataset.examples[i].soft) is not None]
        if not marks:
            return None
        shape = (len(marks), max(len(m.tokens) for m in marks), marks[0].tokens.shape[1])
        tokens, logp = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for row, mark in enumerate(marks):
            tokens[row, : len(mark.tokens)] = torch.from_numpy(mark.tokens.astype(np.int64))
            logp[row, : len(mark.logp)] = torch.from_numpy(mark.logp)
        check_tokens(tokens, self.network.rows)
        return tokens.to(self.network.device), logp.to(self.network.device)

    def _encode_media(self, rows: list[int]) -> torch.Tensor | None:
        """Return the states that the tower (frozen encoder) gives for the passages' files, (rows,
        tiles, P, W) with P states of length W for each tile; None if the records have no files.
        Each file is encoded once, and all files have the same number of tiles. rows: the passages'
        numbers."""
        files = [self.dataset.examples[row // self._n_passages].media for row in rows]
        if files[0] is None:
            return None
        states: dict[bytes, torch.Tensor] = {}
        for file in files:
            assert file is not None  # every record of a multimodal base has one
            if file.digest not in states:
                states[file.digest] = self._tower_states_of(file)
        return torch.stack([states[f.digest] for f in files if f]).to(self.network.device)

    def _tower_states_of(self, file: Media) -> torch.Tensor:
        """Return the states that the tower (frozen encoder) gives for a file, (tiles, P, W). They
        are read from the store or, if it does not have them, computed and stored now."""
        stored = self._stored_tower_states(file)
        if stored is not None:
            try:
                return stored.read()
            except Unavailable as error:
                _warn_if_altered(error)
        states = self.network.encode_media(self.network.reader.tensor(file)).cpu()
        self._store_tower_states(file, states)
        return states

    def _stored_tower_states(self, file: Media) -> HiddenStates | None:
        """Return the object with the stored states that the tower (frozen encoder) gave for a file;
        None if none are stored. This dataset then refers to the object, so that the states are not
        dropped."""
        name = _name_of_file(file)
        stored = self._tower_states.get(name) or self.network.states.get(name)
        if stored is not None:
            self._tower_states[name] = stored
        return stored

    def _store_tower_states(self, file: Media, states: torch.Tensor) -> None:
        name = _name_of_file(file)
        stored = PREFIX_STORE.keep(states, name, self._memory)
        self.network.states[name] = self._tower_states[name] = stored

    def _rows(self, records: Indices) -> list[int]:
        """Return the numbers of all passages of `records`, record by record."""
        return [
            record * self._n_passages + k for record in records for k in range(self._n_passages)
        ]

    def _prefix(
        self, rows: list[int], length: int, tower_states: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the passages' states at the cut, (rows, length, H). They are read from the cache,
        with zeros on padding. For a network whose states are not cached (`network.cached`), they
        are computed here, and those on padding are not zero.

        - rows: the passages' numbers
        - length: the padded length
        - tower_states: the states that the tower (frozen encoder) gives for the passages' files,
          used only if nothing is cached; None if they are to be computed, or there are no files"""
        if not self.network.cached:
            if tower_states is None:
                tower_states = self._encode_media(rows)
            return self.network.prefix(*self._tokens(rows, length), tower_states)
        states = self._read(rows)
        padded = torch.zeros(len(rows), length, states[0].shape[-1], dtype=states[0].dtype)
        for row, state in enumerate(states):
            padded[row, : len(state)] = state
        return padded

    def _read(self, rows: list[int]) -> list[torch.Tensor]:
        """Read the states of passages, one tensor without padding for each of `rows` (the passages'
        numbers). States that the store has lost are computed again, in blocks of the same shapes as
        the first time."""
        read: dict[int, torch.Tensor] = {}
        lost: list[int] = []
        for index in dict.fromkeys(rows):  # a block may be filled with its first record
            state = self._states[index]
            if state is None:
                raise RuntimeError("the base could not read this record")
            try:
                read[index] = state.read()
            except Unavailable as error:
                _warn_if_altered(error)
                lost.append(index)
        for _, block in _group_by_bucket(lost, self._prefix_bucket, self._prefix_block):
            with self.operators():
                tower_states = self._encode_media(self._filled(block))
                states = self._pass_through_prefix((block, tower_states))
            read |= zip(block, self._store(block, states), strict=True)
        return [read[index] for index in rows]

    def _tokens(self, rows: list[int], length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad passages of one bucket (padded shapes). Return a pair: their token ids, 0 on padding,
        and their mask, False on padding, both (rows, length).

        - rows: the passages' numbers
        - length: the padded length; 0: as the longest of these passages needs"""
        passages = [self._passages[row].input_ids for row in rows]
        length = length or padded_length(max(map(len, passages)))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(passages):
            ids[row, : len(text)] = torch.from_numpy(np.asarray(text, dtype=np.int64))
            mask[row, : len(text)] = True
        return check_tokens(ids, self.network.rows), mask


def check_tokens(tokens: torch.Tensor, rows: int, *, targets: bool = False) -> torch.Tensor:
    """Check that the base's tables have a row for each of `tokens`, and return `tokens`. This is
    done before the tokens reach a GPU, where an index beyond a table would end all work of the
    process, on every other record too. Here only the record with that token fails.

    - tokens: token ids. A tokenizer may have more tokens than its base, or ids below 0
    - rows: the number of rows of the base's tables
    - targets: whether NO_TARGET may be among `tokens`

    Errors: IndexError if there is no row for a token."""
    known = tokens[tokens != NO_TARGET] if targets else tokens
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < rows:
        raise IndexError("the base has no row for a token")
    return tokens


def _group_by_bucket(
    indices: Iterable[int], bucket_of: Callable[[int], Bucket], size: Callable[[Bucket], int]
) -> Iterator[tuple[Bucket, list[int]]]:
    """Group records by bucket (padded shapes). Yield each group as a pair, its bucket and its
    records' numbers, in the order of the buckets.

    - indices: the records' numbers
    - bucket_of: returns the bucket of a record
    - size: returns the most records of a group of this bucket"""
    members: dict[Bucket, list[int]] = {}
    for index in indices:
        members.setdefault(bucket_of(index), []).append(index)
    for bucket, grouped in sorted(members.items()):
        limit = size(bucket)
        for start in range(0, len(grouped), limit):
            yield bucket, grouped[start : start + limit]


def _warn_if_altered(error: Unavailable) -> None:
    if isinstance(error, Altered):
        log.warning("%s. The altered states are computed again; check this machine's disk", error)


def _fit_to_vectors(rows: int, *positions: int) -> int:
    """Return how many rows a block has, at most `rows`, and at least 1.

    A processor computes functions such as `sigmoid`, `silu` and `softplus` for a vector of numbers
    at a time: 8 to 64 numbers, by processor and precision. The numbers that are left at the end of
    a tensor are computed one by one, by other formulas, so the last rows of a tensor would get
    other last digits than the same rows at its beginning. Therefore a tensor with one number for
    each row must be shorter than a vector, or as long as a whole number of vectors, whichever
    length a vector has here. So must a tensor with H numbers for each position; this holds if H is
    a multiple of 8. A base with other widths has blocks of one row (`has_whole_widths`). A loss
    must not apply such functions to a tensor with one number for each position.

    Thus layers and head compute a multiple of 8 rows, or one record alone: these numbers of rows
    are what a machine is tried with (`places.rows_keep_digits`).

    positions: at how many positions of a row layers and the head compute; each a multiple of 8, or
    1, 2 or 4"""
    if rows >= EIGHT:
        return 1 << rows.bit_length() - 1
    return rows if rows > 1 and all(n % EIGHT == 0 for n in positions) else 1


def _fill_block(indices: list[int], size: int) -> list[int]:
    return indices + indices[:1] * (size - len(indices))


def _name_of_file(file: Media) -> bytes:
    """Return the digest that names the tower's (frozen encoder's) states of a file in the store."""
    return hashlib.sha256(b"seen" + file.digest).digest()


def _name(passage: Passage, positions: npt.NDArray[np.int64], media: bytes = b"") -> bytes:
    """Return the digest that names a passage's states in the store. passage: the passage, whose
    token ids count; positions: the positions whose states are kept; media: the digest of its file;
    b"" without a file."""
    parts = (passage.input_ids.tobytes(), positions.tobytes(), *([media] if media else []))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
