"""FedAdam: Adam at the coordinator, over the mean update of each round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.core.strategy import Arrays, State, Strategy, move_adapter, require, unflatten
from fedtune.strategies._mean import RunningMean


@dataclass
class FedAdam(Strategy):
    """Move the adapter by Adam's rule, from the mean update Δ of each round: m ← β₁m + (1-β₁)Δ; v ←
    β₂v + (1-β₂)Δ²; adapter ← adapter + ηm / (√v + τ).

    η is server_learning_rate. With its default 0, η is chosen so that each step is as long as the
    round's mean update: η = ‖Δ‖ / ‖m / (√v + τ)‖. As in the paper, m and v are not corrected for
    bias; m starts at 0 and v at τ².
    References: Reddi et al. 2021, Algorithm 2 (FedAdam); Agarwal et al. 2020, "Disentangling
    adaptive gradient methods from learning rates" (a step's length from one method, its direction
    from another)."""

    averages: ClassVar[bool] = False

    server_learning_rate: float = 0.0  # η; 0: each step is as long as the mean update
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3  # τ, adaptivity: the larger, the closer to plain averaging

    def __post_init__(self) -> None:
        require(self.server_learning_rate >= 0, "server_learning_rate", "a number of at least 0")
        require(0 <= self.beta1 < 1, "beta1", "at least 0 and below 1")
        require(0 <= self.beta2 < 1, "beta2", "at least 0 and below 1")
        require(self.tau > 0, "tau", "a number above 0")
        self._mean = RunningMean()
        self._m: State = {}
        self._v: State = {}

    def add(self, update: Arrays, weight: float) -> None:
        self._mean.add(update, weight)

    def apply(self, adapter: Arrays) -> Arrays:
        mean = self._mean.take()
        if mean is None:
            return adapter
        step: State = {}
        for name, delta in mean.items():
            m = self._m.get(name, np.zeros_like(delta))
            v = self._v.get(name, np.full_like(delta, self.tau**2))
            self._m[name] = m = self.beta1 * m + (1 - self.beta1) * delta
            self._v[name] = v = self.beta2 * v + (1 - self.beta2) * delta**2
            step[name] = m / (np.sqrt(v) + self.tau)
        rate = self.server_learning_rate or _rate(mean, step)
        return move_adapter(adapter, {name: rate * array for name, array in step.items()})

    def state(self) -> State:
        first = {f"m/{name}": array for name, array in self._m.items()}
        return first | {f"v/{name}": array for name, array in self._v.items()}

    def load_state(self, state: State) -> None:
        groups = unflatten(state, ("m", "v"))
        self._m, self._v = groups["m"], groups["v"]


def _rate(mean: State, direction: State) -> float:
    """Return the factor η by which `direction` becomes as long as the round's mean update `mean`;
    0.0 if `direction` is zero."""
    along = _length(direction)
    return _length(mean) / along if along else 0.0


def _length(arrays: State) -> float:
    """Compute the Euclidean norm of all arrays together."""
    return float(np.sqrt(sum(float((array**2).sum()) for array in arrays.values())))
