"""A reward model: a head that gives the better completion of a pair the higher score."""

from __future__ import annotations

import torch
from torch.nn import functional

from fedtune.objectives._interface import Batch, Network, require

SHAPE = "pair"


def outputs(labels: tuple[str, ...]) -> int:
    return 1


def check(*, margin: float = 0.0, centring: float = 0.0) -> None:
    require(margin >= 0, "margin", "a number of at least 0")
    require(centring >= 0, "centring", "a number of at least 0")


def rewards(network: Network, batch: Batch) -> torch.Tensor:
    """The score of each passage, (R,) fp32, read off its last token."""
    hidden = network.hidden(batch.prefix, batch.mask, seen=batch.seen)
    return network.logits(network.pool(hidden, batch.mask))[:, 0]


def losses(
    network: Network, batch: Batch, *, margin: float = 0.0, centring: float = 0.0
) -> torch.Tensor:
    """The loss of each pair, (B,) fp32, from its own two passages.

    -log σ(r_better - r_worse - margin) + centring · (r_better + r_worse)²
    Both are constants of the plan: rewards are drawn towards zero pair by pair, never by the mean
    of a batch.
    References: Bradley and Terry 1952; Ouyang et al. 2022, equation 1; Eisenstein et al. 2023,
    equation 2 (centring)."""
    better, worse = rewards(network, batch).view(-1, 2).unbind(dim=1)
    return -functional.logsigmoid(better - worse - margin) + centring * (better + worse) ** 2
