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
    keep, targets = _labelled(batch.target_ids)
    hidden = network.hidden(batch.prefix, batch.mask, keep)
    rows, positions = torch.nonzero(targets != -100, as_tuple=True)
    each = network.token_losses(hidden[rows, positions], targets[rows, positions])
    counts = torch.bincount(rows, minlength=len(batch.label)).clamp_min(1)
    return each.new_zeros(len(batch.label)).index_add(0, rows, each) / counts


def _labelled(target_ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Positions with a target, first in each row, (B, K), and what is there, -100 on padding; all
    positions, as None, where most of them have one: choosing would cost more than it saves."""
    wanted = target_ids != -100
    most = max(1, int(wanted.sum(dim=1).max()))
    if most > 0.75 * target_ids.shape[1]:
        return None, target_ids
    keep = torch.argsort(wanted.int(), dim=1, descending=True, stable=True)[:, :most]
    return keep, target_ids.gather(1, keep)
