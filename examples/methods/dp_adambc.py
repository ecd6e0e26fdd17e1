"""DP-AdamBC: Adam with the noise's variance subtracted from its second moment.

What: Tang, Shpilevskiy and Lécuyer 2024, "DP-AdamBC: your DP-Adam is actually DP-SGD (unless you
apply bias correction)" (AAAI, arXiv:2312.14334), algorithm 1: with g̃ the noised mean gradient,
m ← β₁m + (1-β₁)g̃ and v ← β₂v + (1-β₂)g̃², both bias-corrected, the step is
-η m̂ / √max(v̂ - Φ, γ'), Φ = (σC/B)² being the variance that the noise adds to each number of g̃.

A strategy implements it. A site takes one step of SGD with rate 1, so its update is -g̃ itself, and
Adam runs at the coordinator on the mean of the updates. Φ is the square of the deviation that
`describe_round` receives, which follows from the plan and the sites' declared sizes. It may change
from round to round with the sites that take part, so it is averaged with the weights of v.

Guarantee: post-processing of the noised mean; neither Φ nor anything else here is private, so
it costs no ε. The clip is that of every plan: a unit's whole gradient to C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from examples.methods import Settings
from examples.write import Table
from fedtune.core.errors import ConfigError
from fedtune.core.strategy import Arrays, State, Strategy, move_adapter, require, unflatten
from fedtune.strategies._mean import RunningMean

if TYPE_CHECKING:
    from fedtune.core.config import Study

FIRST, SECOND, OWN = "m", "v", "own"
ROUNDS, VARIANCE = "own/rounds", "own/variance"  # t, and Φ averaged as v is


@dataclass
class DPAdamBC(Strategy):
    """Take a step of Adam on the round's mean update, with the noise's variance subtracted from the
    second moment."""

    averages: ClassVar[bool] = False

    server_learning_rate: float = 0.01  # η
    beta1: float = 0.9
    beta2: float = 0.999
    floor: float = 1e-8  # γ': the smallest second moment, in squared units of the gradient

    def __post_init__(self) -> None:
        require(self.server_learning_rate > 0, "server_learning_rate", "a number above 0")
        require(0 <= self.beta1 < 1, "beta1", "at least 0 and below 1")
        require(0 <= self.beta2 < 1, "beta2", "at least 0 and below 1")
        require(self.floor > 0, "floor", "a number above 0")
        self._mean = RunningMean()
        self._m: State = {}
        self._v: State = {}
        self._rounds, self._variance, self._deviation = 0, 0.0, 0.0

    def check(self, study: Study) -> None:
        """Check that an update is the noised mean gradient itself. Errors: ConfigError."""
        training = study.training
        expected = {
            "training.local_steps = 1": training.local_steps == 1,
            'training.optimizer = "sgd"': training.optimizer == "sgd",
            "training.learning_rate = 1.0": training.learning_rate == 1,
            'training.learning_rate_schedule = "constant"': training.learning_rate_schedule
            == "constant",
            "training.weight_decay = 0": training.weight_decay == 0,
            "no lora.min_rank": study.lora is None or study.lora.min_rank is None,
        }
        for what, is_so in expected.items():
            if not is_so:
                raise ConfigError("this strategy needs the noised gradient as the update", what)

    def describe_round(self, units: float, deviation: float) -> None:
        self._deviation = deviation

    def add(self, update: Arrays, weight: float) -> None:
        self._mean.add(update, weight)

    def apply(self, adapter: Arrays) -> Arrays:
        mean = self._mean.take()
        if mean is None:
            return adapter
        self._rounds += 1
        self._variance = self._averaged(self._variance, self._deviation**2)
        first, second = (1 - beta**self._rounds for beta in (self.beta1, self.beta2))
        step: State = {}
        for name, update in mean.items():
            m = self._m.get(name, np.zeros_like(update))
            v = self._v.get(name, np.zeros_like(update))
            self._m[name] = m = self.beta1 * m + (1 - self.beta1) * update
            self._v[name] = v = self._averaged(v, update**2)
            moment = np.maximum((v - self._variance) / second, self.floor)
            step[name] = self.server_learning_rate * m / first / np.sqrt(moment)
        return move_adapter(adapter, step)

    def _averaged(self, past: float | np.ndarray, new: float | np.ndarray) -> float | np.ndarray:
        return self.beta2 * past + (1 - self.beta2) * new

    def state(self) -> State:
        if not self._rounds:
            return {}
        own = {ROUNDS: np.array(float(self._rounds)), VARIANCE: np.array(self._variance)}
        first = {f"{FIRST}/{name}": array for name, array in self._m.items()}
        return own | first | {f"{SECOND}/{name}": array for name, array in self._v.items()}

    def load_state(self, state: State) -> None:
        groups = unflatten(state, (FIRST, SECOND, OWN))
        self._m, self._v = groups[FIRST], groups[SECOND]
        self._rounds = int(state.get(ROUNDS, 0))
        self._variance = float(state.get(VARIANCE, 0.0))


def _options(*pairs: tuple[float, float]) -> list[Table]:
    """Make settings of η and γ'."""
    return [
        {"strategy": {"options": {"server_learning_rate": rate, "floor": floor}}}
        for rate, floor in pairs
    ]


_ADAM: Table = {"training": {"learning_rate": 1.0}, "strategy": {"name": "dp_adambc"}}
PLANS: dict[str, Table] = {
    "mts_dialog": _ADAM | {"strategy": {"name": "dp_adambc", "options": None}},
    "medquad": {
        **_ADAM,
        "lora": {"preconditioner": None},
        "training": {"learning_rate": 1.0, "rounds": 3},
    },
}
TRIED: dict[str, Settings] = {
    "mts_dialog": {
        1.0: _options((0.02, 1e-3), (0.04, 1e-3), (0.01, 1e-4)),
        3.0: _options((0.02, 1e-4), (0.04, 1e-4), (0.01, 1e-5)),
        8.0: _options((0.02, 1e-5), (0.04, 1e-5), (0.01, 1e-6)),
    },
    "medquad": {
        1.0: _options((0.01, 1e-6), (0.02, 1e-6), (0.01, 1e-7)),
        3.0: _options((0.02, 1e-6), (0.05, 1e-6), (0.02, 1e-7)),
        8.0: _options((0.05, 1e-6), (0.1, 1e-6), (0.05, 1e-7)),
    },
}
