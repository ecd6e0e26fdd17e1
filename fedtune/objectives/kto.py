"""Learning from single judgements (Kahneman–Tversky optimisation): a desirable completion gains, an
undesirable one loses, both measured from the policy at the study's start."""

from __future__ import annotations

import torch

from fedtune.objectives._interface import Batch, Network, require
from fedtune.objectives._tokens import likelihood, reference

SHAPE = "judged"


def check(
    *,
    beta: float = 0.1,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
    reference_point: float = 0.0,
) -> None:
    require(beta > 0, "beta", "a number above 0")
    require(lambda_desirable > 0, "lambda_desirable", "a number above 0")
    require(lambda_undesirable > 0, "lambda_undesirable", "a number above 0")
    require(reference_point >= 0, "reference_point", "a divergence in nats: at least 0")


def losses(
    network: Network,
    batch: Batch,
    *,
    beta: float = 0.1,
    lambda_desirable: float = 1.0,
    lambda_undesirable: float = 1.0,
    reference_point: float = 0.0,
) -> torch.Tensor:
    """The loss of each judged completion, (B,) fp32, from its own passage.

    With r the completion's log-ratio to the reference and z the reference point (nats):
    | desirable   | λ_D (1 - σ(β(r - z))) |
    | undesirable | λ_U (1 - σ(β(z - r))) |
    z is a constant of the plan. The paper estimates it from other records of the batch, which would
    let each record's loss depend on its neighbours.
    Reference: Ethayarajh et al. 2024, section 4.1."""
    ratio = likelihood(network, batch).total - reference(network, batch).total
    gain = beta * (ratio - reference_point)
    wanted = batch.label == 1
    loss = 1 - torch.sigmoid(torch.where(wanted, gain, -gain))
    weight = torch.where(wanted, lambda_desirable, lambda_undesirable)
    return weight * loss
