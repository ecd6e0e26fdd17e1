"""Compute how likely a causal model finds each of a study's declared choices (evaluation.choices)
as the completion of a record. The likeliest choice is the model's prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from fedtune.core.data.dataset import NO_TARGET, Example
from fedtune.core.errors import ConfigError
from fedtune.core.models.network import Network
from fedtune.core.objectives._interface import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 512  # the number of positions whose logits over the vocabulary are in memory at a time


def choice_ids(tokenizer: PreTrainedTokenizerBase, choices: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each choice, in the order of `choices`. tokenizer: the base's
    tokenizer. Errors: ConfigError if two choices have the same tokens, or one is empty."""
    ids = [tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
    if len({tuple(i) for i in ids}) < len(ids) or not all(ids):
        raise ConfigError(
            "evaluation.choices: two choices have the same tokens, or one is empty",
            "choices that the base's tokenizer can tell apart",
        )
    return ids


def single_tokens(ids: list[list[int]], network: Network) -> torch.Tensor | None:
    """Return the choices' token ids as one tensor, (K,), if each choice is a single token; then one
    pass scores all choices of a record. Return None if a choice has more tokens.

    ids: the token ids of each choice; network: for the device on which the result lies."""
    if any(len(i) > 1 for i in ids):
        return None
    return torch.tensor([i[0] for i in ids], device=network.device)


def first_logits(
    network: Network, hidden: torch.Tensor, batch: Batch, tokens: torch.Tensor
) -> torch.Tensor:
    """Compute, for each record, the logits of the choices' tokens at the first token of the
    completion, (B, K) fp32.

    - network: the causal model
    - hidden: (B, L, H), the model's last hidden states at all positions of `batch`
    - batch: the records, each a prompt with a completion
    - tokens: (K,), the token of each choice, as from `single_tokens`"""
    first = (batch.target_ids != NO_TARGET).int().argmax(dim=1)
    rows = torch.arange(len(first), device=first.device)
    return network.logits(hidden[rows, first], tokens)


def with_choice(example: Example, choice: list[int]) -> Example:
    """Return a copy of the example in which the tokens of `choice` stand in place of the
    completion."""
    prompt = example.input_ids[: int((example.target_ids != NO_TARGET).argmax()) + 1]
    ids = np.concatenate([prompt, np.array(choice[:-1], np.int32)])
    targets = np.full(len(ids), NO_TARGET, np.int32)
    targets[len(prompt) - 1 :] = choice
    return replace(example, input_ids=ids, target_ids=targets)


def by_record(
    network: Network, hidden: torch.Tensor, batch: Batch
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score each record's true completion. Return three arrays (B,): the loss summed over the
    completion's tokens, in nats; the number of these tokens; and at how many of them the true token
    is the model's most likely one.

    - network: the causal model
    - hidden: (B, L, H), the model's last hidden states at all positions of `batch`
    - batch: the records, each a prompt with a completion

    Greedy decoding gives the true completion if and only if each of its tokens is the most likely
    one after the true tokens before it. So one pass over the true text replaces decoding."""
    rows, at = torch.nonzero(batch.target_ids != NO_TARGET, as_tuple=True)
    loss, hit = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
    for i in range(0, len(rows), ROWS):
        part = slice(i, i + ROWS)
        target = batch.target_ids[rows[part], at[part]]
        logits = network.logits(hidden[rows[part], at[part]])
        loss[part] = functional.cross_entropy(logits, target, reduction="none")
        hit[part] = logits.argmax(dim=1) == target
    size, record_of = len(batch.index), rows.cpu().numpy()
    total = np.bincount(record_of, loss.double().numpy(), size)
    right = np.bincount(record_of, hit.double().numpy(), size)
    return total, np.bincount(record_of, minlength=size), right
