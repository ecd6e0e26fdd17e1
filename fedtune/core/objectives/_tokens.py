"""Compute log-likelihoods of target tokens, on which every objective on text is based."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fedtune.core.objectives._shapes import head_positions

if TYPE_CHECKING:
    import torch

    from fedtune.core.objectives._interface import Batch, Network


class Likelihood(NamedTuple):
    """How likely each passage's targets are.

    - total: the log-likelihood of all targets of a passage, nats, (R,) fp32
    - targets: the number of targets of a passage, (R,)"""

    total: torch.Tensor
    targets: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """Return the mean log-likelihood per target; 0 without targets."""
        return self.total / self.targets.clamp_min(1)


def likelihood(network: Network, batch: Batch) -> Likelihood:
    """Compute the log-likelihood of each passage's targets. The head runs at more positions than
    those with a target: their number is padded, so that it follows from the record's padded shapes
    (its bucket). If it were not padded, a tensor's shape would depend on all records of the batch.

    | a passage without targets | 0.0, and no gradient |
    """
    import torch

    keep, targets = select_labelled(batch.target_ids)
    hidden = network.hidden(batch.prefix, batch.mask, keep, batch.tower_states)
    is_target = targets != -100
    target_ids = targets.masked_fill(~is_target, 0).flatten()
    losses = network.token_losses(hidden.flatten(0, 1), target_ids).view(targets.shape)
    total = torch.where(is_target, -losses, 0.0).sum(dim=1)
    return Likelihood(total, is_target.sum(dim=1))


def reference(network: Network, batch: Batch) -> Likelihood:
    """Return the log-likelihoods of each passage under the reference policy. This is the frozen
    base with the adapter off, never a second model, and never one that saw a record. The
    likelihoods are the same in every step, so each is computed when its record is first used, and
    then kept in the batch."""

    import torch

    targets = (batch.target_ids != -100).sum(dim=1)
    if not knows_reference(batch):
        with torch.no_grad(), network.base_only():
            logps = likelihood(network, batch).total
        if batch.reference_logps is not None:
            batch.reference_logps[batch.index] = logps.cpu().view(len(batch.index), -1)
        return Likelihood(logps, targets)
    assert batch.reference_logps is not None
    return Likelihood(batch.reference_logps[batch.index].flatten().to(targets.device), targets)


def knows_reference(batch: Batch) -> bool:
    """Return whether the reference likelihoods of all records of the batch are kept already, so
    that `reference` need not disable the adapter."""
    known = batch.reference_logps
    return known is not None and not bool(known[batch.index].isnan().any())


def select_labelled(target_ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Choose the K positions of each row at which the head runs, those with a target first. K is
    the same for every record of a bucket (padded shapes).

    Return a pair: the positions' indices, (R, K), and their targets, (R, K), which are -100 at a
    position without a target. If the head runs at all positions, the pair is None and
    `target_ids`."""
    import torch

    is_target = target_ids != -100
    width = head_positions(target_ids.shape[1], int(is_target.sum(dim=1).max()))
    if width == target_ids.shape[1]:
        return None, target_ids
    keep = torch.argsort(is_target.int(), dim=1, descending=True, stable=True)[:, :width]
    return keep, target_ids.gather(1, keep)
