"""Micro-batches of a dataset, with the states below the cut computed once per record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedtune.data.tokens import Dataset
from fedtune.models.network import Network
from fedtune.progress import report


@dataclass(frozen=True, repr=False)
class Batch:
    """B records padded on the right to one length L. prefix (B, L, H); mask (B, L) bool, False on
    padding; target_ids (B, L), -100 where no loss; label (B,), -100 where none; index (B,)."""

    prefix: torch.Tensor
    mask: torch.Tensor
    target_ids: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor


def padded_length(length: int) -> int:
    """The bucket of a record: a function of its own length alone, so that no record's numerics
    depend on who else is in the batch; at most a quarter is padding above 32 tokens."""
    step = max(8, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


class Cached:
    """A dataset seen through a network.

    Where something below the adapters is frozen, each record's states are computed once, kept in
    memory unpadded (2 · L · H bytes in bf16), and every later step starts at the cut. Exact: there
    is no dropout and no adapter below it."""

    def __init__(self, network: Network, dataset: Dataset) -> None:
        self.network, self.dataset = network, dataset
        self._lengths = [padded_length(len(e.input_ids)) for e in dataset.examples]
        self._states: list[torch.Tensor | None] = [None] * len(dataset.examples)

    def warm(self) -> None:
        """Fill the cache now, reporting progress by records."""
        if not self.network.cached:
            return
        known, examples = self.network.states, self.dataset.examples
        keys = [e.input_ids.tobytes() for e in examples]
        self._states = [known.get(key) for key in keys]
        new = [index for index, state in enumerate(self._states) if state is None]
        done = 0
        for rows, ids, mask in self._tokens(new, 4096):
            states = self.network.prefix(ids, mask)
            for row, index in enumerate(rows):
                real = 1 if self.network.pooled else len(examples[index].input_ids)
                known[keys[index]] = self._states[index] = states[row, :real].clone()
            done += len(rows)
            report("reading records once through the frozen layers", done, len(new))

    def batches(self, indices: Sequence[int], token_budget: int = 4096) -> Iterator[Batch]:
        """The records `indices`, each once, in micro-batches of one padded length and at most
        `token_budget` positions (always at least one record)."""
        if self.network.cached and any(self._states[i] is None for i in indices):
            self.warm()
        for rows, ids, mask in self._tokens(indices, token_budget):
            examples = [self.dataset.examples[i] for i in rows]
            targets = torch.full(ids.shape, -100, dtype=torch.long)
            for row, example in enumerate(examples):
                real = torch.from_numpy(np.asarray(example.target_ids, dtype=np.int64))
                targets[row, : len(real)] = real
            yield Batch(
                prefix=self._prefix(rows, ids, mask),
                mask=mask,
                target_ids=targets,
                label=torch.tensor([e.label for e in examples]),
                index=torch.tensor(rows),
            )

    def _prefix(self, rows: list[int], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if not self.network.cached:
            return self.network.prefix(ids, mask)
        states = [self._states[i] for i in rows]
        length = 1 if self.network.pooled else ids.shape[1]
        first = states[0]
        assert first is not None
        padded = torch.zeros(len(rows), length, first.shape[-1], dtype=first.dtype)
        for row, state in enumerate(states):
            assert state is not None
            padded[row, : len(state)] = state
        return padded

    def _tokens(
        self, indices: Sequence[int], token_budget: int
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        by_length: dict[int, list[int]] = {}
        for index in indices:
            by_length.setdefault(self._lengths[index], []).append(index)
        for length, members in sorted(by_length.items()):
            size = max(1, token_budget // length)
            for start in range(0, len(members), size):
                rows = members[start : start + size]
                ids = torch.zeros(len(rows), length, dtype=torch.long)
                mask = torch.zeros(len(rows), length, dtype=torch.bool)
                for row, index in enumerate(rows):
                    real = self.dataset.examples[index].input_ids
                    ids[row, : len(real)] = torch.from_numpy(np.asarray(real, dtype=np.int64))
                    mask[row, : len(real)] = True
                yield rows, ids, mask
