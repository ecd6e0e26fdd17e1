"""The mean loss of a round's drawn records, for the site's own eyes."""

from __future__ import annotations

import torch


class RoundLoss:
    """Adds up losses as the engine computes them for its gradients, without a pass of its own.

    Private: it is not clipped and has no noise, so it must leave neither the site nor the file that
    core/vault/own_loss.py keeps. Guarantee: adding never raises for a value, and changes no tensor,
    so that no gradient follows from whether somebody looks."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, losses: torch.Tensor) -> None:
        """Add the losses of one block's records, (n,); what is not finite is left out."""
        values = losses.detach().double()
        finite = values[torch.isfinite(values)]
        self._total += float(finite.sum())
        self._count += len(finite)

    @property
    def mean(self) -> float | None:
        """Return the mean over what was added; None where nothing was."""
        return self._total / self._count if self._count else None
