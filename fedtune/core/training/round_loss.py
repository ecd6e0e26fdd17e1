"""Compute the mean loss of a round's drawn records, which only people at the site see."""

from __future__ import annotations

import torch


class RoundLoss:
    """Adds up the losses of a round's records, which the engine computes anyway for its gradients.

    Private: the sum is not clipped and has no noise. So it must not leave the site, and on the site
    no file may hold it but that of core/vault/own_loss.py. Guarantee: adding never raises an error
    because of a value, and changes no tensor, so that gradients do not depend on whether the loss
    is recorded."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, losses: torch.Tensor) -> None:
        """Add the losses of one block's records, (n,); values that are not finite are left out."""
        values = losses.detach().double()
        finite = values[torch.isfinite(values)]
        self._total += float(finite.sum())
        self._count += len(finite)

    @property
    def mean(self) -> float | None:
        """Return the mean of the added losses; None if there are none."""
        return self._total / self._count if self._count else None
