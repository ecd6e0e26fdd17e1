"""Compute a weighted mean as a running sum. Up to 64 MiB of updates wait and are then added at
once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.core.strategy import Arrays, State

_BUFFER = 64 * 2**20  # bytes of updates that are buffered, then added in one pass over the sum
# Numbers that a thread adds at a time: enough to pay for the thread, and in fp64 (1 MiB) few enough
# for the cache of the processor.
_BLOCK = 2**17
_THREADS = min(4, os.cpu_count() or 1)


class _Block(NamedTuple):
    """One block of the running sum: a range of the numbers of one array.

    - total: the sum in this range, fp64, to which the terms are added
    - terms: (the numbers in this range, fp32; the weight) for each update that waits to be added"""

    total: npt.NDArray[np.float64]
    terms: list[tuple[npt.NDArray[np.float32], float]]


class RunningMean:
    """The mean Σ wᵢxᵢ / Σ wᵢ of the updates xᵢ with weights wᵢ that were added so far.

    The caller must not change an update's arrays after `add`, which buffers them. Sums are fp64:
    the order of arrival changes the result by about 1e-16 of the largest term, far below the
    precision of the adapter's fp32. Memory: the sum, and a buffer of less than 64 MiB or one
    update, however many updates are added."""

    def __init__(self) -> None:
        self._sum: State = {}
        self._weight = 0.0
        self._buffer: list[tuple[Arrays, float]] = []
        self._bytes = 0

    def add(self, update: Arrays, weight: float) -> None:
        self._buffer.append((update, weight))
        self._weight += weight
        self._bytes += sum(array.nbytes for array in update.values())
        if self._bytes >= _BUFFER:
            self._add_up()

    def take(self) -> State | None:
        """Return the mean, name -> array in fp64, and begin anew with an empty sum; None if nothing
        was added."""
        self._add_up()
        total, weight = self._sum, self._weight
        self._sum, self._weight = {}, 0.0
        return {name: array / weight for name, array in total.items()} if weight else None

    def _add_up(self) -> None:
        updates = self._buffer
        self._buffer, self._bytes = [], 0
        blocks: list[_Block] = []
        for name in dict.fromkeys(name for update, _ in updates for name in update):
            terms = [(u[name].reshape(-1), weight) for u, weight in updates if name in u]
            shape = next(u[name].shape for u, _ in updates if name in u)
            total = self._sum.setdefault(name, np.zeros(shape)).reshape(-1)
            for start in range(0, len(total), _BLOCK):
                part = slice(start, start + _BLOCK)
                blocks.append(_Block(total[part], [(array[part], w) for array, w in terms]))
        with ThreadPoolExecutor(_THREADS) as pool:  # numpy releases the GIL in each block
            list(pool.map(_accumulate, [blocks[n::_THREADS] for n in range(_THREADS)]))


def _accumulate(blocks: list[_Block]) -> None:
    scratch = np.empty(_BLOCK)
    for total, terms in blocks:
        term = scratch[: len(total)]
        for array, weight in terms:
            term[...] = array
            if weight != 1.0:
                term *= weight
            total += term
