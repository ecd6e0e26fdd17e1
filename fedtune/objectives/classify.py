"""Cross-entropy of a linear head on one vector per record."""

from __future__ import annotations

import torch
from torch.nn import functional

from fedtune.objectives._interface import Batch, Network

SHAPE = "label"


def outputs(labels: tuple[str, ...]) -> int:
    return len(labels)


def losses(network: Network, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood (nats) of each record's label, (B,) fp32."""
    hidden = network.hidden(batch.prefix, batch.mask, seen=batch.seen)
    logits = network.logits(network.pool(hidden, batch.mask))
    return functional.cross_entropy(logits, batch.label, reduction="none")
