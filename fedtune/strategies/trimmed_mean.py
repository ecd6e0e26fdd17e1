"""Coordinate-wise trimmed mean: a minority of sites with arbitrary updates cannot move the adapter
arbitrarily far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedtune.core.errors import ConfigError
from fedtune.core.strategy import Arrays, State, Strategy, move_adapter, require

if TYPE_CHECKING:
    from fedtune.core.config import Study


@dataclass
class TrimmedMean(Strategy):
    """Move the adapter by a trimmed mean of a round's n updates: in each coordinate, the ⌈trim · n⌉
    smallest and as many of the largest numbers are dropped, and the rest are averaged.

    | number of updates   | what is dropped                                                |
    | n ≤ 2               | nothing is dropped: the plain mean                             |
    | ⌈trim · n⌉ ≥ n / 2  | fewer are dropped at each end, so that one or two values remain |
    Every update of the round is held in memory (fp32), since the order statistics need them all.
    Reference: Yin et al. 2018, Definition 2."""

    trim: float = 0.1  # β: the share of sites at each end that may be arbitrary

    def __post_init__(self) -> None:
        require(0 <= self.trim < 0.5, "trim", "at least 0 and below 0.5")
        self._updates: list[Arrays] = []

    def check(self, study: Study) -> None:
        if study.strategy.weights != "equal":
            raise ConfigError(
                f'trimmed_mean cannot use strategy.weights = "{study.strategy.weights}"',
                '"equal" (weighted by its declared size, one site could outweigh the others)',
            )
        if study.lora and study.lora.min_rank is not None:
            raise ConfigError(
                "trimmed_mean cannot use lora.min_rank",
                "the same ranks at all sites (a site of lower rank sends zeros for the others, and "
                "trimming would then drop what other sites send)",
                "leave lora.min_rank out, or name another strategy",
            )

    def add(self, update: Arrays, weight: float) -> None:
        self._updates.append(update)

    def apply(self, adapter: Arrays) -> Arrays:
        updates, self._updates = self._updates, []
        n = len(updates)
        if not n:
            return adapter
        k = min(math.ceil(self.trim * n - 1e-9), (n - 1) // 2)
        step: State = {}
        for name in adapter:
            ordered = np.sort(np.stack([update[name] for update in updates]), axis=0)
            step[name] = ordered[k : n - k].mean(axis=0, dtype=np.float64)
        return move_adapter(adapter, step)
