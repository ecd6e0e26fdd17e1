"""Federated averaging, with server learning rate and momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedtune.core.strategy import Arrays, State, Strategy, move_adapter, require
from fedtune.strategies._mean import RunningMean


@dataclass
class FedAvg(Strategy):
    """Move the adapter by the mean update of each round, with momentum: v ← βv + mean update;
    adapter ← adapter + ηv.

    β is momentum, η server_learning_rate; v starts at 0.
    References: McMahan et al. 2017, Algorithm 1; Hsu et al. 2019 (FedAvgM), section 4.3."""

    is_mean: ClassVar[bool] = True

    server_learning_rate: float = 1.0  # η
    momentum: float = 0.0  # β

    def __post_init__(self) -> None:
        require(self.server_learning_rate > 0, "server_learning_rate", "a number above 0")
        require(0 <= self.momentum < 1, "momentum", "at least 0 and below 1")
        self._mean = RunningMean()
        self._velocity: State = {}

    def add(self, update: Arrays, weight: float) -> None:
        self._mean.add(update, weight)

    def apply(self, adapter: Arrays) -> Arrays:
        mean = self._mean.take()
        if mean is None:
            return adapter
        if self.momentum:
            old = self._velocity
            mean = {n: self.momentum * old[n] + m if n in old else m for n, m in mean.items()}
            self._velocity = mean
        return move_adapter(adapter, {n: self.server_learning_rate * v for n, v in mean.items()})

    def state(self) -> State:
        return dict(self._velocity)

    def load_state(self, state: State) -> None:
        self._velocity = dict(state)
