"""Next-token cross-entropy on the labelled positions alone."""

from __future__ import annotations

import torch

from fedtune.models.cache import Batch
from fedtune.models.network import Network


def losses(network: Network, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of each record's own target tokens, (B,) fp32.

    The head runs on labelled positions only: prompt and padding never reach the vocabulary.
    | a record without targets | 0.0, and no gradient |
    """
    hidden = network.hidden(batch.prefix, batch.mask)
    rows, positions = torch.nonzero(batch.target_ids != -100, as_tuple=True)
    each = network.token_losses(hidden[rows, positions], batch.target_ids[rows, positions])
    counts = torch.bincount(rows, minlength=len(batch.label)).clamp_min(1)
    return each.new_zeros(len(batch.label)).index_add(0, rows, each) / counts
