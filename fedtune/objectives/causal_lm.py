"""Next-token cross-entropy on the labelled positions alone."""

from __future__ import annotations

import torch

from fedtune.objectives._interface import Batch, Network
from fedtune.objectives._tokens import likelihood

SHAPE = "text"


def losses(network: Network, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of each record's own target tokens, (B,) fp32.

    | a record without targets | 0.0, and no gradient |
    """
    return -likelihood(network, batch).mean
