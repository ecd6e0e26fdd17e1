"""Classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedtune.core.objectives._interface import Batch, Network, Objective, RecordFormat

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Classify(Objective):
    """Cross-entropy of a linear head on one vector per record."""

    record_format: ClassVar[RecordFormat] = "label"

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def may_run_beside(self, batch: Batch) -> bool:
        return True

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        """Compute the negative log-likelihood (nats) of each record's label, (B,) fp32."""
        from torch.nn import functional

        hidden = network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
        logits = network.logits(network.pool(hidden, batch.mask))
        return functional.cross_entropy(logits, batch.label, reduction="none")
