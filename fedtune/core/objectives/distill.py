"""Knowledge distillation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.core.objectives._interface import (
    Batch,
    Network,
    Objective,
    RecordFormat,
    Teacher,
    require,
)
from fedtune.core.objectives._shapes import split_evenly
from fedtune.core.objectives._tokens import select_labelled

if TYPE_CHECKING:
    import torch

ROWS = 256  # positions whose logits over the vocabulary are held at once
MOST_KEPT = 256  # most next tokens of the teacher that are kept for a target: 2 kB for each target
LEAST = 1e-6  # least probability of all other outcomes together


@dataclass(frozen=True)
class Distill(Objective):
    """Distillation: a small student learns a frozen teacher's probabilities of all outcomes, not
    only of its likeliest one. At the sites the teacher must be public, or trained under (ε, δ)
    itself: if it had been fitted to the records, each record's target would depend on all other
    records, and no clipping of the student's gradients would bound this dependence.

    - hard: the weight of the usual loss on the record's own answer
    - top: how many of the teacher's likeliest next tokens are used at each target, at most 256

    References: Hinton et al. 2015, section 2 (T²); Kim and Rush 2016, section 3."""

    teacher: str = ""
    digest: str = ""
    temperature: float = 1.0
    hard: float = 0.0
    top: int = 64

    def __post_init__(self) -> None:
        require(bool(self.teacher), "teacher", "a base, or a finished run's folder")
        is_digest = bool(re.fullmatch(r"sha256:[0-9a-f]{64}", self.digest))
        require(is_digest, "digest", "the teacher's, as `fedtune models verify` prints it")
        require(0.01 <= self.temperature <= 100, "temperature", "a number from 0.01 to 100")
        require(0 <= self.hard < 1, "hard", "at least 0 and below 1")
        require(2 <= self.top <= MOST_KEPT, "top", f"a whole number from 2 to {MOST_KEPT}")

    @property
    def record_format(self) -> RecordFormat:
        return "label" if self.labels else "text"

    @property
    def outputs(self) -> int:
        return len(self.labels)

    @property
    def teacher_spec(self) -> Teacher:
        return Teacher(self.teacher, self.digest, self.temperature, self.top)

    def may_run_beside(self, batch: Batch) -> bool:
        return True

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        return divergence(network, batch, self.temperature, self.hard)


def divergence(
    network: Network, batch: Batch, temperature: float = 1.0, hard: float = 0.0
) -> torch.Tensor:
    """Compute (1 - hard) · T² · KL(teacher ‖ student) + hard · cross-entropy for each record, (B,)
    fp32: the mean over the record's own targets. The next tokens that are not among the teacher's
    likeliest count as one outcome.

    - network: the student
    - batch: the records, with the teacher's outcomes and log-probabilities in `soft`
    - temperature: T, by which the student's logits are divided; the teacher's log-probabilities
      must have been computed at the same T
    - hard: the weight of the cross-entropy with the record's own targets (its label, if the student
      has a head). It is computed without the temperature, and not at all if `hard` is 0

    | a record without targets, if the student has no head | 0.0, and no gradient |
    """
    import torch
    from torch.nn import functional

    assert batch.soft is not None  # core/models/teacher.py marked every record
    tokens, teacher_logp = batch.soft
    if network.has_head:
        hidden = network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
        logits = network.logits(network.pool(hidden, batch.mask))
        student_logp = torch.log_softmax(logits / temperature, dim=1)
        soft_loss = _divergence(teacher_logp[:, 0], student_logp) * temperature**2
        hard_loss = (
            functional.cross_entropy(logits, batch.label, reduction="none") if hard else soft_loss
        )
        return (1 - hard) * soft_loss + hard * hard_loss
    keep, targets = select_labelled(batch.target_ids)
    hidden = network.hidden(batch.prefix, batch.mask, keep, batch.tower_states)
    is_target = targets != -100
    nth = (is_target.cumsum(dim=1) - 1).clamp_min(0)[:, :, None].expand(-1, -1, tokens.shape[2])
    states, target_ids = hidden.flatten(0, 1), targets.masked_fill(~is_target, 0).flatten()
    tokens, teacher_logp = (soft.gather(1, nth).flatten(0, 1) for soft in (tokens, teacher_logp))
    parts = []
    for rows, new in split_evenly(len(states), ROWS):
        block = (states[rows], target_ids[rows], tokens[rows], teacher_logp[rows])
        parts.append(_next_tokens(network, *block, (temperature, hard))[-new:])
    soft_loss = torch.cat(parts).view(targets.shape)
    return torch.where(is_target, soft_loss, 0.0).sum(dim=1) / is_target.sum(dim=1).clamp_min(1)


def _next_tokens(
    network: Network,
    states: torch.Tensor,
    target_ids: torch.Tensor,
    tokens: torch.Tensor,
    teacher_logp: torch.Tensor,
    weights: tuple[float, float],
) -> torch.Tensor:
    """Compute the loss of each position, (n,): (1 - hard) · T² · KL(teacher ‖ student) + hard ·
    cross-entropy. The backward pass computes the logits over the vocabulary again, which saves
    memory.

    - network: the student
    - states: (n, H), the student's last hidden states at the positions
    - target_ids: (n,), the record's own next tokens; 0 where the position has no target
    - tokens, teacher_logp: (n, k), the teacher's likeliest next tokens and their log-probabilities
    - weights: T and `hard`"""
    import torch
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    temperature, hard = weights

    def compute_chosen(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = network.logits(states)
        scaled = logits / temperature
        student_logp = scaled.gather(1, tokens) - torch.logsumexp(scaled, dim=1, keepdim=True)
        hard_loss = (
            functional.cross_entropy(logits, target_ids, reduction="none")
            if hard
            else student_logp[:, 0]
        )
        return student_logp, hard_loss

    student_logp, hard_loss = checkpoint(
        compute_chosen, states, use_reentrant=False, preserve_rng_state=False
    )
    soft_loss = _divergence(_with_rest(teacher_logp), _with_rest(student_logp)) * temperature**2
    loss: torch.Tensor = (1 - hard) * soft_loss + hard * hard_loss
    return loss


def _with_rest(logp: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities (n, k) with one more column, (n, k + 1): the log-probability of the
    outcome "any other token"."""
    import torch

    others = (1 - logp.exp().sum(dim=1, keepdim=True)).clamp_min(LEAST).log()
    return torch.cat([logp, others], dim=1)


def _divergence(teacher_logp: torch.Tensor, student_logp: torch.Tensor) -> torch.Tensor:
    """Compute KL(teacher ‖ student) in nats for n targets, (n,). teacher_logp, student_logp: the
    log-probabilities of k outcomes, (n, k)."""
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(dim=1)
