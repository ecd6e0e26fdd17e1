"""Direct preference optimisation: the better completion gains on the worse one, both measured from
the policy at the study's start."""

from __future__ import annotations

import torch
from torch.nn import functional

from fedtune.objectives._interface import Batch, Network, require
from fedtune.objectives._tokens import likelihood, reference

SHAPE = "pair"
VARIANTS = ("sigmoid", "ipo")


def check(*, beta: float = 0.1, label_smoothing: float = 0.0, variant: str = "sigmoid") -> None:
    require(beta > 0, "beta", "a number above 0")
    require(0 <= label_smoothing < 0.5, "label_smoothing", "at least 0 and below 0.5")
    require(variant in VARIANTS, "variant", " or ".join(VARIANTS))
    apart = variant == "sigmoid" or label_smoothing == 0
    require(apart, "label_smoothing", 'variant = "sigmoid", the only one that has it')


def losses(
    network: Network,
    batch: Batch,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    variant: str = "sigmoid",
) -> torch.Tensor:
    """The loss of each pair, (B,) fp32, from its own two passages.

    With h the log-ratio of the better completion minus that of the worse (to the reference):
    | sigmoid | -(1-s) log σ(βh) - s log σ(-βh); s = label_smoothing > 0 is conservative DPO |
    | ipo     | (h - 1/2β)², h of the means over tokens                                     |
    References: Rafailov et al. 2023, equation 7; Mitchell 2023 (conservative); Azar et al. 2023,
    equation 17 (IPO)."""
    now, before = likelihood(network, batch), reference(network, batch)
    ratio = now.mean - before.mean if variant == "ipo" else now.total - before.total
    better, worse = ratio.view(-1, 2).unbind(dim=1)
    gained = better - worse
    if variant == "ipo":
        return (gained - 1 / (2 * beta)) ** 2
    sure = functional.logsigmoid(beta * gained)
    return -(1 - label_smoothing) * sure - label_smoothing * functional.logsigmoid(-beta * gained)
