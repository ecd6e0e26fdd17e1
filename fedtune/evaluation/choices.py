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
    """Return the token ids of each choice. Errors: ConfigError (two choices have the same tokens,
    or one is empty)."""
    ids = [tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
    if len({tuple(i) for i in ids}) < len(ids) or not all(ids):
        raise ConfigError("evaluation.choices: two choices have the same tokens, or one is empty")
    return ids


def single_tokens(ids: list[list[int]], network: Network) -> torch.Tensor | None:
    """Return the token ids of the choices, (K,), if each choice is one token, so that one pass can
    score all choices of a record. Else return None.

    ids: the token ids of each choice; network: for the device on which the result lies."""
    if any(len(i) > 1 for i in ids):
        return None
    return torch.tensor([i[0] for i in ids], device=network.device)


def first_logits(
    network: Network, hidden: torch.Tensor, batch: Batch, tokens: torch.Tensor
) -> torch.Tensor:
    """Compute the logits of `tokens` at each record's first target, (B, K) fp32.

    - network: the causal model
    - hidden: (B, L, H), its last hidden states of `batch` at all positions
    - batch: the records, each a prompt with a completion
    - tokens: (K,), the token of each choice, as from `single_tokens`"""
    first = (batch.target_ids != NO_TARGET).int().argmax(dim=1)
    rows = torch.arange(len(first), device=first.device)
    return network.logits(hidden[rows, first], tokens)


def with_choice(example: Example, choice: list[int]) -> Example:
    """Return a copy of the example in which the tokens `choice` replace the completion of the
    prompt."""
    prompt = example.input_ids[: int((example.target_ids != NO_TARGET).argmax()) + 1]
    ids = np.concatenate([prompt, np.array(choice[:-1], np.int32)])
    targets = np.full(len(ids), NO_TARGET, np.int32)
    targets[len(prompt) - 1 :] = choice
    return replace(example, input_ids=ids, target_ids=targets)


def by_record(
    network: Network, hidden: torch.Tensor, batch: Batch
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute three arrays (B,) with a value for each record: the loss summed over its target
    tokens, in nats; the number of its target tokens; and at how many of their positions the target
    is the model's most likely token. network, hidden, batch: as for `first_logits`.

    Greedy decoding gives the completion if and only if each target is the most likely token after
    the targets before it, so one pass over the true text replaces decoding."""
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
