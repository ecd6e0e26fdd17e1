"""Odds-ratio preference optimisation: the better completion is learnt as it stands, and its odds
are raised over the worse one's. No reference policy."""

from __future__ import annotations

import torch
from torch.nn import functional

from fedtune.objectives._interface import Batch, Network, require
from fedtune.objectives._tokens import likelihood

SHAPE = "pair"
CERTAIN = -1e-6  # log-likelihood per token above which the odds are taken to be this large


def check(*, weight: float = 0.1) -> None:
    require(weight >= 0, "weight", "a number of at least 0")


def losses(network: Network, batch: Batch, *, weight: float = 0.1) -> torch.Tensor:
    """The loss of each pair, (B,) fp32, from its own two passages.

    -ℓ(better) - weight · log σ(log odds(better) - log odds(worse)), where ℓ is the log-likelihood
    per target (nats) and odds = e^ℓ / (1 - e^ℓ); weight is the paper's λ.
    | a completion that is certain | odds of a likelihood of e^-0.000001, and no gradient by them |
    Reference: Hong et al. 2024, section 4.2."""
    mean = likelihood(network, batch).mean
    sure = mean.clamp_max(CERTAIN)
    odds = sure - torch.log(-torch.expm1(sure))
    better, worse = odds.view(-1, 2).unbind(dim=1)
    return -mean.view(-1, 2)[:, 0] - weight * functional.logsigmoid(better - worse)
