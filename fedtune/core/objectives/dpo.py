"""Direct preference optimisation."""

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

VARIANTS = ("sigmoid", "ipo")


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation: the better completion gains on the worse one. The gain is
    measured from the frozen base, with the adapter off.

    References: Rafailov et al. 2023, equation 7; Mitchell 2023 (conservative); Azar et al. 2023,
    equation 17 (IPO)."""

    record_format: ClassVar[RecordFormat] = "preference"

    beta: float = 0.1
    label_smoothing: float = 0.0
    variant: str = "sigmoid"

    def __post_init__(self) -> None:
        require(0 < self.beta <= LARGEST, "beta", f"a number above 0, at most {LARGEST:g}")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", "at least 0 and below 0.5")
        require(self.variant in VARIANTS, "variant", " or ".join(VARIANTS))
        is_supported = self.variant == "sigmoid" or self.label_smoothing == 0
        require(is_supported, "label_smoothing", '0, or variant = "sigmoid"')

    def may_run_beside(self, batch: Batch) -> bool:
        return knows_reference(batch)

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        """Compute the loss of each of the batch's B pairs, (B,) fp32; a loss depends on its own
        pair alone.

        h is the log-ratio to the reference of the better completion minus that of the worse one; s
        is label_smoothing (above 0: conservative DPO).
        | sigmoid | -(1-s) log σ(βh) - s log σ(-βh); h of log-likelihoods summed over tokens |
        | ipo     | (h - 1/(2β))²; h of log-likelihoods averaged over tokens                 |
        """
        from torch.nn.functional import logsigmoid

        policy, initial = likelihood(network, batch), reference(network, batch)
        ratio = (
            policy.mean - initial.mean if self.variant == "ipo" else policy.total - initial.total
        )
        better, worse = ratio.view(-1, 2).unbind(dim=1)
        margin = better - worse
        if self.variant == "ipo":
            return (margin - 1 / (2 * self.beta)) ** 2
        s = self.label_smoothing
        return -(1 - s) * logsigmoid(self.beta * margin) - s * logsigmoid(-self.beta * margin)
