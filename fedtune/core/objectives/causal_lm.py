"""Next-token prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedtune.core.objectives._interface import Batch, Network, Objective, RecordFormat
from fedtune.core.objectives._tokens import likelihood

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CausalLM(Objective):
    """Next-token cross-entropy on the labelled positions only."""

    record_format: ClassVar[RecordFormat] = "text"

    def may_run_beside(self, batch: Batch) -> bool:
        return True

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        """Compute the mean negative log-likelihood (nats) of each record's own target tokens, (B,)
        fp32.

        | a record without targets | 0.0, and no gradient |
        """
        return -likelihood(network, batch).mean
