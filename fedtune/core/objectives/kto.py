"""Kahneman–Tversky optimisation: learning from single judgements."""

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
from fedtune.core.objectives._tokens import knows_reference, likelihood, reference

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class KTO(Objective):
    """Learning from single judgements (Kahneman–Tversky optimisation): a desirable completion
    gains, an undesirable one loses, both compared with the frozen base, with the adapter off.

    Reference: Ethayarajh et al. 2024, section 4.1."""

    record_format: ClassVar[RecordFormat] = "unpaired_preference"

    beta: float = 0.1
    lambda_desirable: float = 1.0
    lambda_undesirable: float = 1.0
    reference_point: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.beta <= LARGEST, "beta", f"a number above 0, at most {LARGEST:g}")
        for name in ("lambda_desirable", "lambda_undesirable"):
            is_weight = 0 < getattr(self, name) <= LARGEST
            require(is_weight, name, f"a number above 0, at most {LARGEST:g}")
        at_least = "a divergence in nats: at least 0"
        require(self.reference_point >= 0, "reference_point", at_least)

    def may_run_beside(self, batch: Batch) -> bool:
        return knows_reference(batch)

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        """Compute the loss of each of the batch's B judged completions, (B,) fp32; a loss depends
        on its own completion alone.

        r is the completion's log-ratio to the reference, z the reference point, both in nats.
        | desirable   | λ_D (1 - σ(β(r - z))) |
        | undesirable | λ_U (1 - σ(β(z - r))) |
        z is a constant of the plan. The paper estimates it from other records of the batch, which
        would let each record's loss depend on its neighbours."""
        import torch
        from torch.nn.functional import logsigmoid

        ratio = likelihood(network, batch).total - reference(network, batch).total
        gain = self.beta * (ratio - self.reference_point)
        is_desirable = batch.label == 1
        # 1 - σ(x). The function `sigmoid` would give a tensor's last rows other last digits.
        loss = torch.exp(logsigmoid(-torch.where(is_desirable, gain, -gain)))
        weight = torch.where(is_desirable, self.lambda_desirable, self.lambda_undesirable)
        return weight * loss
