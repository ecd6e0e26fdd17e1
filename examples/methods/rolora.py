"""RoLoRA: train LoRA's B and A by turns, one factor a round.

What: Chen, Guo, Ju, Dalal, Zhu and Khisti 2025, "Robust federated finetuning of LLMs via
alternating optimization of LoRA" (NeurIPS, arXiv:2502.01755): in odd rounds A is frozen
and the sites' B are averaged, in even rounds B is frozen and their A are. Each round is exact,
since a mean of B_i · A with one common A is the product of the means.

Carried by a strategy, at a price. Which tensors a site trains is the same in every round of a plan,
so with `lora.train = "AB"` a site computes, clips and noises the gradients of both factors, and
this strategy moves the factor whose turn it is. With one local step nothing else differs from
training that factor alone: the other one did not move before its gradient was taken. The price is
in the clip: the bound C holds for both factors' gradient together, so the half that is used is
shorter than C, while its noise is what C asks for. In round 1 it costs nothing, since A's
gradient is zero while B is.

Guarantee: a unit's gradient of A, B and head is clipped once to C and noised, every round. What
this strategy does with the noised mean is post-processing, so it costs no ε; that half of it is
thrown away saves none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from examples.methods import Settings, rates
from examples.methods.ffa_lora import PLANS as FFA_LORA
from examples.write import Table, merged
from fedtune.core.errors import ConfigError
from fedtune.core.strategy import Arrays, State, Strategy, move_adapter, require
from fedtune.strategies._mean import RunningMean

if TYPE_CHECKING:
    from fedtune.core.config import Study

TURNS = (".lora_B.", ".lora_A.")  # the factor of odd rounds, and of even ones
ROUNDS = "rounds"  # the state: how many rounds there were


@dataclass
class RoLoRA(Strategy):
    """Move B in odd rounds and A in even ones, by the weighted mean of the updates. Whatever is
    part of neither factor, such as a head, moves in every round."""

    averages: ClassVar[bool] = False  # half of an adapter's update is left out

    server_learning_rate: float = 1.0

    def __post_init__(self) -> None:
        require(self.server_learning_rate > 0, "server_learning_rate", "a number above 0")
        self._mean = RunningMean()
        self._rounds = 0

    def check(self, study: Study) -> None:
        """Check that each site takes one step on both factors. Errors: ConfigError."""
        training = study.training
        expected = {
            'a [lora] table with train = "AB"': bool(study.lora and study.lora.train == "AB"),
            "training.local_steps = 1": training.local_steps == 1,
            'training.optimizer = "sgd"': training.optimizer == "sgd",
        }
        for what, is_so in expected.items():
            if not is_so:
                raise ConfigError("this strategy moves one of an adapter's factors a round", what)

    def add(self, update: Arrays, weight: float) -> None:
        self._mean.add(update, weight)

    def apply(self, adapter: Arrays) -> Arrays:
        mean = self._mean.take()
        if mean is None:
            return adapter
        resting = TURNS[1 - self._rounds % 2]
        self._rounds += 1
        step = {
            name: np.zeros_like(array) if resting in name else self.server_learning_rate * array
            for name, array in mean.items()
        }
        return move_adapter(adapter, step)

    def state(self) -> State:
        return {ROUNDS: np.array(float(self._rounds))} if self._rounds else {}

    def load_state(self, state: State) -> None:
        if state.keys() - {ROUNDS}:
            raise ConfigError("the checkpoint holds another strategy's state")
        self._rounds = int(state.get(ROUNDS, 0))


_BOTH: Table = {"lora": {"train": "AB"}, "strategy": {"name": "rolora", "options": None}}
PLANS: dict[str, Table] = {
    "mts_dialog": merged(merged(FFA_LORA["mts_dialog"], _BOTH), {"training": {"rounds": 6}}),
    "medquad": merged(merged(FFA_LORA["medquad"], _BOTH), {"training": {"rounds": 4}}),
}
TRIED: dict[str, Settings] = {
    "mts_dialog": rates({1.0: (1.0, 4.0, 16.0), 3.0: (2.0, 8.0, 32.0), 8.0: (4.0, 16.0, 64.0)}),
    "medquad": rates({1.0: (2.5, 10.0, 40.0), 3.0: (5.0, 20.0, 80.0), 8.0: (10.0, 40.0, 160.0)}),
}
