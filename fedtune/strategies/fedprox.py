"""FedProx: a penalty keeps sites near the adapter that they were sent, and the coordinator averages
their updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.core.errors import ConfigError
from fedtune.strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from fedtune.core.config import Study


@dataclass
class FedProx(FedAvg):
    """FedAvg at the coordinator; each site adds μ(w - w₀) to its step (training.proximal_mu).

    w₀ is the adapter that the site was sent, w the adapter as the site has trained it. The term
    depends only on w and w₀, and reads no record, so it costs no ε.
    Reference: Li et al. 2020 (FedProx), Algorithm 2.
    """

    def check(self, study: Study) -> None:
        if study.training.proximal_mu <= 0:
            raise ConfigError(
                'strategy.name = "fedprox" with training.proximal_mu = 0 is plain fedavg',
                "training.proximal_mu above 0",
                "set training.proximal_mu, or name the strategy fedavg",
            )
