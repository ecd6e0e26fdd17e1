"""Micro-batches of a dataset, with the states below the cut computed once per record.

Which kernel multiplies two matrices, and in what order it adds, is chosen by their shapes, so the
last digits of a record's figures follow from how many others are beside it. What is added up under
the guarantee is therefore computed in blocks: micro-batches whose every shape is a function of the
record's own bucket (docs/decisions/0025-fixed-shapes.md)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fedtune.data.dataset import Dataset, Passage
from fedtune.data.media import Media
from fedtune.errors import FedtuneError
from fedtune.models.network import Network
from fedtune.models.prefix_store import PREFIX_STORE, Altered, HiddenStates
from fedtune.objectives._interface import Batch
from fedtune.objectives._shapes import padded_length
from fedtune.progress import report

log = logging.getLogger("fedtune.models")

Indices = Sequence[int]
# Positions of a block: enough for a matrix product to be quick, and few to fill; few where a
# processor has more threads than may share a block of several records. A pass through the frozen
# part is made once, of everything, so that it may fill more.
STEP, MANY_THREADS = {"cpu": 256, "cuda": 1024}, 64
ONCE = {"cpu": 256, "cuda": 4096}
# On a processor, threads that share a block of several records. With more, a product's terms are
# added in an order that follows from the row's place, and so do an activation's last digits.
THREADS = 2


class Bucket(NamedTuple):
    """What a record shares a micro-batch by; a function of that record alone. length: of its
    longest passage, padded; targets: the most that a passage has, padded in the same way; full: of
    an encoder, to which padding is told by a mask, whether there is none."""

    length: int
    tiles: int = 1
    targets: int = 0
    full: bool = False


class CachedDataset:
    """A dataset seen through a network.

    Where something below the adapters is frozen, each record's states are computed once, kept
    unpadded (2 · positions · H bytes in bf16; models/prefix_store.py), and every later step starts
    at the cut. Exact: there is no dropout and no adapter below it. Kept are all positions, or those
    with a target where above the cut each position stands for itself (of a record without one, the
    last).
    Guarantee: states at the cut, and what a block (`blocks`) makes of a record, come from products
    whose shapes follow from the record's own bucket, whoever else is in the dataset.
    memory: bytes of states that the process may hold before more go to the encrypted file; None: a
    quarter of the machine's.

    Whoever sees the same record through the same network shares its states. Their name there is the
    digest of token ids, kept positions and file: the ids say what tokenizer, template and length
    made of the record, and the network is one base, dtype, quantisation and cut.
    """

    def __init__(self, network: Network, dataset: Dataset, memory: int | None = None) -> None:
        self.network, self.dataset, self._memory = network, dataset, memory
        # Passages, k of each record, one record's after another's.
        self._passages = [s for example in dataset.examples for s in example.passages]
        self._each = len(dataset.examples[0].passages) if dataset.examples else 1
        assert len(self._passages) == self._each * len(dataset.examples)
        self._kept = [self._positions(passage) for passage in self._passages]
        self._tiles = [example.tiles for example in dataset.examples]
        media = [e.media.digest if e.media else b"" for e in dataset.examples]
        self._names = [
            _name(s, kept, media[at // self._each])
            for at, (s, kept) in enumerate(zip(self._passages, self._kept, strict=True))
        ]
        self._seen: dict[
            bytes, HiddenStates
        ] = {}  # what the tower makes of each file, by its digest
        self._states = [network.states.get(name) for name in self._names]
        self._failed: set[int] = set()  # passages that nothing can be computed of
        self._before = torch.full((len(dataset.examples), self._each), torch.nan)
        self._buckets = [self._bucket(record) for record in range(len(dataset.examples))]

    def _positions(self, passage: Passage) -> npt.NDArray[np.int64]:
        if self.network.pooled:
            return np.zeros(1, dtype=np.int64)
        length = len(passage.input_ids)
        targets = np.flatnonzero(passage.target_ids != -100)
        if not self.network.positionwise:
            return np.arange(length)
        return targets if len(targets) else np.array([length - 1])

    def _bucket(self, record: int) -> Bucket:
        rows = self._rows([record])
        length = padded_length(max(len(self._kept[at]) for at in rows))
        tiles = self._tiles[record]
        if self.network.pooled:
            return Bucket(length, tiles)
        most = max(int((self._passages[at].target_ids != -100).sum()) for at in rows)
        full = self.network.kind == "encoder" and all(len(self._kept[at]) == length for at in rows)
        return Bucket(length, tiles, padded_length(most) if most else 0, full)

    def _read_bucket(self, row: int) -> Bucket:
        """That of a passage on its way through the frozen part."""
        length = len(self._passages[row].input_ids)
        padded = padded_length(length)
        full = self.network.kind == "encoder" and length == padded
        return Bucket(padded, self._tiles[row // self._each], full=full)

    def _read_block(self, bucket: Bucket) -> int:
        """Passages of a block of the frozen part."""
        if self._crowded:
            return 1
        positions = bucket.length + self.network.frames(bucket.tiles)
        return max(1, ONCE[self.network.device.type] // positions)

    def warm(self) -> None:
        """Fill the cache now, reporting progress by records. Errors: InfrastructureError (disk)."""
        if not self.network.cached:
            return
        self._states = [self.network.states.get(name) for name in self._names]
        missing = (at for at, state in enumerate(self._states) if state is None)
        # One answer may be in several pairs: what reads the same is computed once.
        new = list({self._names[at]: at for at in missing}.values())
        done = 0
        for _, rows in _grouped(new, self._read_bucket, self._read_block):
            self._compute_each(rows)
            done += len(rows)
            report("reading records once through the frozen layers", done, len(new))
        self._states = [self.network.states.get(name) for name in self._names]
        self._failed = {at for at, state in enumerate(self._states) if state is None}
        if not self.network.sees:
            self._seen.clear()

    def _compute_each(self, rows: list[int]) -> None:
        """As `_compute`; what one record makes a library raise costs that record alone, which fails
        again when it is asked for."""
        try:
            self._compute(rows)
        except FedtuneError:
            raise
        except Exception as error:  # its words may quote a record
            log.error("a record cannot be read by the base (%s)", type(error).__name__)
            for row in rows if len(rows) > 1 else ():
                self._compute_each([row])

    def _compute(self, rows: list[int]) -> None:
        """States of passages of one bucket, at most a block, from their tokens."""
        filled = _filled(rows, self._read_block(self._read_bucket(rows[0])))
        found = self.network.prefix(*self._tokens(filled), self._look(filled))
        states = found.cpu()  # a GPU's memory holds none
        for row, index in enumerate(rows):
            name, kept = self._names[index], torch.from_numpy(self._kept[index])
            state = PREFIX_STORE.keep(states[row, kept], name, self._memory)
            self.network.states[name] = self._states[index] = state

    def batches(self, indices: Indices, token_budget: int = 4096) -> Iterator[Batch]:
        """The records `indices`, each once, in micro-batches of one bucket and at most
        `token_budget` positions (always at least one record). For what is public or one's own: the
        last digits follow from the others in the batch."""
        self._warmed(indices)

        def size(bucket: Bucket) -> int:
            return max(1, token_budget // self._positions_of(bucket))

        for bucket, records in _grouped(indices, self._buckets.__getitem__, size):
            yield self._batch(bucket, records, len(records))

    def blocks(self, indices: Indices, most: int | None = None) -> Iterator[Batch]:
        """Yield micro-batches of a fixed shape, blocks: of a bucket always as many records, at most
        `most`, filled with the first again. For whatever is added up over units and noised; on a
        block of several records no more than THREADS work, until the next is asked for."""
        self._warmed(indices)

        def size(bucket: Bucket) -> int:
            positions = MANY_THREADS if self._crowded else STEP[self.network.device.type]
            found = max(1, positions // self._positions_of(bucket))
            if self.network.head is not None and not self.network.pooled:
                found = 1  # a few rows by a few labels: here a row's place counts
            return min(found, most or found)

        for bucket, records in _grouped(indices, self._buckets.__getitem__, size):
            filled = _filled(records, size(bucket))
            with _threads(None if len(filled) == 1 else THREADS):
                yield self._batch(bucket, filled, len(records))

    @property
    def _crowded(self) -> bool:
        """Whether more threads work than may share a block of several records."""
        return self.network.device.type == "cpu" and torch.get_num_threads() > THREADS

    def _warmed(self, indices: Indices) -> None:
        rows = set(self._rows(indices)) - self._failed
        if self.network.cached and any(self._states[at] is None for at in rows):
            self.warm()

    def _positions_of(self, bucket: Bucket) -> int:
        """Of a record, those of its file among them where they are held."""
        held = self.network.sees or not self.network.cached
        frames = self.network.frames(bucket.tiles) if held else 0
        return self._each * (bucket.length + frames)

    def _batch(self, bucket: Bucket, records: list[int], count: int) -> Batch:
        rows = self._rows(records)
        seen = self._look(rows) if self.network.sees else None
        mask = torch.zeros(len(rows), bucket.length, dtype=torch.bool)
        targets = torch.full((len(rows), bucket.length), -100, dtype=torch.long)
        for row, at in enumerate(rows):
            kept = self._kept[at]
            mask[row, : len(kept)] = True
            if not self.network.pooled:
                real = np.asarray(self._passages[at].target_ids, dtype=np.int64)[kept]
                targets[row, : len(kept)] = torch.from_numpy(real)
        device, examples = self.network.device, self.dataset.examples
        return Batch(
            prefix=self._prefix(rows, bucket.length, seen).to(device),
            mask=mask.to(device),
            target_ids=targets.to(device),
            label=torch.tensor([examples[i].label for i in records], device=device),
            index=torch.tensor(records),
            soft=self._soft(records),
            seen=seen,
            tiles=bucket.tiles,
            count=count,
            before=self._before,
        )

    def _soft(self, records: Indices) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What a teacher expects of `records`, each one's own."""
        marks = [mark for i in records if (mark := self.dataset.examples[i].soft) is not None]
        if not marks:
            return None
        shape = (len(marks), max(len(m.tokens) for m in marks), marks[0].tokens.shape[1])
        tokens, logp = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for row, mark in enumerate(marks):
            tokens[row, : len(mark.tokens)] = torch.from_numpy(mark.tokens.astype(np.int64))
            logp[row, : len(mark.logp)] = torch.from_numpy(mark.logp)
        return tokens.to(self.network.device), logp.to(self.network.device)

    def _look(self, rows: list[int]) -> torch.Tensor | None:
        """The tower's states of the files of passages with one number of tiles, (rows, tiles, P,
        W); each file is looked at once."""
        files = [self.dataset.examples[at // self._each].media for at in rows]
        if files[0] is None:
            return None
        states = []
        for file in files:
            assert file is not None  # of a base that reads files every record has one
            name = hashlib.sha256(b"seen" + file.digest).digest()
            kept = self._seen.get(name) or self.network.states.get(name)
            if kept is None:
                new = self.network.see(self.network.reader.tensor(file)).cpu()
                kept = self.network.states[name] = PREFIX_STORE.keep(new, name, self._memory)
            self._seen[name] = kept
            states.append(self._intact(kept, name, file))
        return torch.stack(states).to(self.network.device)

    def _intact(self, kept: HiddenStates, name: bytes, file: Media) -> torch.Tensor:
        try:
            return kept.read()
        except Altered as error:
            log.warning("%s; they are computed again. Check this machine's disk", error)
            del self._seen[name]
            return self.network.see(self.network.reader.tensor(file)).cpu()

    def _rows(self, records: Indices) -> list[int]:
        """The passages of some records."""
        return [i * self._each + k for i in records for k in range(self._each)]

    def _prefix(self, rows: list[int], length: int, seen: torch.Tensor | None) -> torch.Tensor:
        """(rows, length, H), zero on padding."""
        if not self.network.cached:
            if seen is None:
                seen = self._look(rows)
            return self.network.prefix(*self._tokens(rows, length), seen)
        states = [self._read(index) for index in rows]
        padded = torch.zeros(len(rows), length, states[0].shape[-1], dtype=states[0].dtype)
        for row, state in enumerate(states):
            padded[row, : len(state)] = state
        return padded

    def _read(self, index: int) -> torch.Tensor:
        """One passage's states; computed again where the file does not hold what was written."""
        state = self._states[index]
        if state is None:
            raise RuntimeError("a record that the base could not read")
        try:
            return state.read()
        except Altered as error:
            log.warning("%s; they are computed again. Check this machine's disk", error)
            self._compute([index])
            return self._read(index)

    def _tokens(self, rows: list[int], length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask (rows, length) of passages of one bucket, padded to its length."""
        texts = [self._passages[at].input_ids for at in rows]
        length = length or padded_length(max(map(len, texts)))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.from_numpy(np.asarray(text, dtype=np.int64))
            mask[row, : len(text)] = True
        return ids, mask


def _grouped(
    indices: Iterable[int], bucket_of: Callable[[int], Bucket], size: Callable[[Bucket], int]
) -> Iterator[tuple[Bucket, list[int]]]:
    """`indices` in groups of one bucket, of at most its `size`."""
    members: dict[Bucket, list[int]] = {}
    for index in indices:
        members.setdefault(bucket_of(index), []).append(index)
    for bucket, every in sorted(members.items()):
        most = size(bucket)
        for start in range(0, len(every), most):
            yield bucket, every[start : start + most]


@contextmanager
def _threads(most: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if most is None or before <= most:
        yield
        return
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _filled(indices: list[int], size: int) -> list[int]:
    return indices + indices[:1] * (size - len(indices))


def _name(passage: Passage, kept: npt.NDArray[np.int64], media: bytes = b"") -> bytes:
    """What a passage's states go by: token ids, kept positions and file, apart from each other."""
    parts = (passage.input_ids.tobytes(), kept.tobytes(), *([media] if media else []))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
