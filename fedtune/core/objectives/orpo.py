"""Odds-ratio preference optimisation."""

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
from fedtune.core.objectives._tokens import likelihood

if TYPE_CHECKING:
    import torch

CERTAIN = -1e-6  # largest log-likelihood per token that the odds are computed with


@dataclass(frozen=True)
class ORPO(Objective):
    """Odds-ratio preference optimisation: the usual loss on the better completion, plus a term
    that raises its odds relative to those of the worse one. There is no reference policy.

    Reference: Hong et al. 2024, section 4.2."""

    record_format: ClassVar[RecordFormat] = "preference"

    weight: float = 0.1  # the paper's λ

    def __post_init__(self) -> None:
        require(0 <= self.weight <= LARGEST, "weight", f"a number from 0 to {LARGEST:g}")

    def may_run_beside(self, batch: Batch) -> bool:
        return True

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        """Compute the loss of each of the batch's B pairs, (B,) fp32; a loss depends on its own
        pair alone.

        It is -ℓ(better) - weight · log σ(log odds(better) - log odds(worse)), where ℓ is the
        log-likelihood per target (nats) and odds = e^ℓ / (1 - e^ℓ).
        | a likelihood above e^-0.000001 | the odds are those of e^-0.000001, without a gradient |
        """
        import torch
        from torch.nn import functional

        mean = likelihood(network, batch).mean
        sure = mean.clamp_max(CERTAIN)
        odds = sure - torch.log(-torch.expm1(sure))
        better, worse = odds.view(-1, 2).unbind(dim=1)
        return -mean.view(-1, 2)[:, 0] - self.weight * functional.logsigmoid(better - worse)
