"""Measure what else a preference run changed, apart from the share of pairs that it orders
correctly: loss, margin, KL divergence, and preference for longer or shorter answers.

All figures are measured on public pairs, so they cost no ε."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedtune.core.objectives._shapes import split_evenly
from fedtune.core.objectives._tokens import likelihood, select_labelled
from fedtune.evaluation.metrics import mean_interval, wilson
from fedtune.report.scores import Scores

if TYPE_CHECKING:
    from fedtune.core.objectives._interface import Batch, Network

ROWS = 256  # the number of positions whose logits, of two models, are in memory at a time


@dataclass
class PairScores:
    """Likelihoods and lengths of the answers of n preference pairs. Each field is an array (n, 2):
    column 0 is for the chosen answer, column 1 for the rejected one.

    - lengths: number of tokens of prompt and answer together
    - targets: number of tokens of the answer
    - logps: log-likelihood of the answer in nats, summed over its tokens
    - kl: KL divergence from the base in nats, summed over the answer's tokens

    If the study trained a head, targets, logps and kl are zero."""

    lengths: np.ndarray
    targets: np.ndarray
    logps: np.ndarray
    kl: np.ndarray

    @classmethod
    def empty(cls, n: int) -> PairScores:
        """Build the object for n pairs with all values zero."""
        return cls(*(np.zeros((n, 2)) for _ in range(4)))

    @property
    def per_token(self) -> np.ndarray:
        """Return the mean log-likelihood of each answer's tokens, (n, 2), in nats."""
        return np.asarray(self.logps / np.maximum(self.targets, 1))

    def add(self, network: Network, batch: Batch, *, with_kl: bool) -> None:
        """Compute the values of a batch of pairs, and enter them into this object's rows for these
        pairs. network: the model with the adapter that is measured; with_kl: whether to compute the
        KL divergence from the base too, which takes a second pass; if not, it stays 0."""
        rows = batch.index.numpy()
        self.lengths[rows] = _pairs(batch.mask.sum(dim=1))
        if network.has_head:
            return
        policy = likelihood(network, batch)
        self.targets[rows], self.logps[rows] = _pairs(policy.targets), _pairs(policy.total)
        if with_kl:
            self.kl[rows] = _pairs(divergence_from_base(network, batch))


def _pairs(values: torch.Tensor) -> np.ndarray:
    return np.asarray(values.double().cpu().numpy().reshape(-1, 2))


def divergence_from_base(network: Network, batch: Batch) -> torch.Tensor:
    """Compute how far the policy, i.e. the base with the adapter in `network`, departs from the
    base alone. Return for each of the R passages in `batch` the divergence KL(policy ‖ base) of the
    next token, summed over the passage's target tokens: (R,), in nats.

    The sum over the vocabulary is exact at each position. It is computed along the answers in the
    data, not along answers that the policy would write."""
    keep, targets = select_labelled(batch.target_ids)
    hidden = network.hidden(batch.prefix, batch.mask, keep, batch.tower_states).flatten(0, 1)
    with network.base_only():
        states = network.hidden(batch.prefix, batch.mask, keep, batch.tower_states).flatten(0, 1)
    parts = []
    for rows, new in split_evenly(len(hidden), ROWS):
        policy = torch.log_softmax(network.logits(hidden[rows]), dim=1)
        with network.base_only():
            base = torch.log_softmax(network.logits(states[rows]), dim=1)
        parts.append((policy.exp() * (policy - base)).sum(dim=1)[-new:])
    by_position = torch.cat(parts).view(targets.shape)
    return torch.where(targets != -100, by_position, 0.0).sum(dim=1)


def round_figures(before: Scores, after: Scores, beta: float) -> dict[str, float]:
    """Return three figures that show how a round's adapter differs from the base on the preference
    pairs, by name:

    - margin: the mean of the pairs' margins
    - chosen_logp: the log-likelihood of a token of the chosen answers in nats, mean over a pair's
      tokens and then over pairs
    - kl: the mean divergence from the base at a token, in nats

    If the study trained a head, only "margin" is returned.

    before, after: the scores of the base and of the round's adapter; beta: the objective's β."""
    figures = {"margin": float(_margins(before, after, beta).mean())}
    if _writes_text(after):
        assert after.pairs is not None
        figures["chosen_logp"] = float(after.pairs.per_token[:, 0].mean())
        figures["kl"] = float(after.pairs.kl.sum() / after.pairs.targets.sum())
    return figures


def pair_facts(
    before: Scores, after: Scores, beta: float, *, own_loss: bool = True
) -> dict[str, Any]:
    """Describe how training changed the figures of n preference pairs. Return a dict with the
    entries below. If the study trained a head, beta, chosen_logp, rejected_logp and kl are absent.

    before, after: the scores of the base and of the adapter; beta: the objective's β; own_loss:
    whether the loss in these scores is the objective's own.

    | entry         | value                                                                       |
    | records       | n                                                                           |
    | preference    | "before", "after": the share of pairs in which the model prefers the chosen |
    |               | answer (a tie counts half); "interval": Wilson's interval of "after"        |
    | loss          | "before", "after", "change"; "own": `own_loss`. With kto the loss is minus  |
    |               | the chosen answer's log-likelihood per token, in nats                       |
    | margin        | "after": the mean of the pairs' margins; "interval": its 95 % interval. A   |
    |               | margin is β · (log-ratio of chosen - log-ratio of rejected); log-ratios are |
    |               | to the base, summed over tokens. With a head it is the chosen answer's      |
    |               | score minus the rejected one's                                              |
    | in_order      | share of pairs whose margin is above 0; a margin of 0 counts half           |
    | longer,       | of the pairs whose chosen answer is the longer (the shorter) one:           |
    | shorter       | "records", their number; "before", "after": the share of them in which the  |
    |               | model prefers the chosen answer (None without such pairs)                   |
    | beta          | β                                                                           |
    | chosen_logp,  | "before", "after", "change" of the answers' log-likelihood per token, in    |
    | rejected_logp | nats, mean over pairs                                                       |
    | kl            | KL(policy ‖ base) of the next token, mean over the tokens of both answers   |

    Each "change" is a 95 % interval, from a paired bootstrap over pairs."""
    assert before.pairs is not None and after.pairs is not None
    n, margins = len(after.loss), _margins(before, after, beta)
    share = after.value("preference")
    facts: dict[str, Any] = {
        "records": n,
        "preference": _change(before.value("preference"), share)
        | {"interval": list(wilson(share, n))},
        "loss": _change(before.value("loss"), after.value("loss"))
        | {"change": mean_interval(after.loss - before.loss), "own": own_loss},
        "margin": {"after": float(margins.mean()), "interval": mean_interval(margins)},
        "in_order": float((margins > 0).mean() + (margins == 0).mean() / 2),
    }
    gap = after.pairs.lengths[:, 0] - after.pairs.lengths[:, 1]
    for name, rows in (("longer", np.flatnonzero(gap > 0)), ("shorter", np.flatnonzero(gap < 0))):
        shares = [s.value("preference", rows) if len(rows) else None for s in (before, after)]
        facts[name] = {"records": len(rows), "before": shares[0], "after": shares[1]}
    if not _writes_text(after):
        return facts
    facts["beta"] = beta
    for name, column in (("chosen_logp", 0), ("rejected_logp", 1)):
        first, last = (scores.per_token[:, column] for scores in (before.pairs, after.pairs))
        change = {"change": mean_interval(last - first)}
        facts[name] = _change(float(first.mean()), float(last.mean())) | change
    return facts | {"kl": round_figures(before, after, beta)["kl"]}


def _change(before: float, after: float) -> dict[str, Any]:
    return {"before": before, "after": after}


def _writes_text(scores: Scores) -> bool:
    return scores.pairs is not None and bool(scores.pairs.targets.any())


def _margins(before: Scores, after: Scores, beta: float) -> np.ndarray:
    if not _writes_text(after):
        return after.margin
    assert before.pairs is not None and after.pairs is not None
    ratios = after.pairs.logps - before.pairs.logps
    return np.asarray(beta * (ratios[:, 0] - ratios[:, 1]))
