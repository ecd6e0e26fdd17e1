"""Reward model trained on preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedtune.core.objectives._interface import (
    LARGEST,
    Batch,
    Network,
    Objective,
    RecordFormat,
    require,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reward(Objective):
    """A reward model: a head that gives the better completion of a pair the higher score.

    References: Bradley and Terry 1952; Ouyang et al. 2022, equation 1; Eisenstein et al. 2023,
    equation 2 (centring)."""

    record_format: ClassVar[RecordFormat] = "preference"

    margin: float = 0.0
    centring: float = 0.0

    def __post_init__(self) -> None:
        require(0 <= self.margin <= LARGEST, "margin", f"a number from 0 to {LARGEST:g}")
        require(0 <= self.centring <= LARGEST, "centring", f"a number from 0 to {LARGEST:g}")

    @property
    def outputs(self) -> int:
        return 1

    def may_run_beside(self, batch: Batch) -> bool:
        return True

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        """Compute the loss of each of the batch's B pairs, (B,) fp32; a loss depends on its own
        pair alone.

        It is -log σ(r_better - r_worse - margin) + centring · (r_better + r_worse)², where r is the
        head's score of a completion.

        margin and centring are constants of the plan: rewards are drawn towards zero pair by pair,
        never by the mean of a batch."""
        from torch.nn.functional import logsigmoid

        better, worse = rewards(network, batch).view(-1, 2).unbind(dim=1)
        return -logsigmoid(better - worse - self.margin) + self.centring * (better + worse) ** 2


def rewards(network: Network, batch: Batch) -> torch.Tensor:
    """Compute the score of each passage, (R,) fp32, from one vector (`network.pool`): the last
    token's state or, on an encoder, the mean over tokens."""
    hidden = network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
    return network.logits(network.pool(hidden, batch.mask))[:, 0]
