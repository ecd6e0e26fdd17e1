"""What test_states.py and test_states_shared.py share."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fedtune.core.data.dataset import Dataset
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.causal_lm import CausalLM

NOTHING, EVERYTHING = 0, 2**40  # bytes in memory


def gradients(network: Network, data: CachedDataset) -> list[torch.Tensor]:
    """Each record's own gradient, from its micro-batch of one."""
    found = []
    for index in range(len(data.dataset.examples)):
        (batch,) = data.batches([index])
        loss = CausalLM().losses(network, batch).sum()
        each = torch.autograd.grad(loss, list(network.parameters().values()))
        found.append(torch.cat([g.flatten() for g in each]))
    return found


def without_a_cache(network: Network, dataset: Dataset) -> list[torch.Tensor]:
    """The same through the whole base, which knows nothing of a cut."""
    found = []
    for example in dataset.examples:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        targets = torch.from_numpy(example.target_ids.astype(np.int64))
        loss = functional.cross_entropy(network.model(input_ids=ids).logits[0], targets)
        each = torch.autograd.grad(loss, list(network.parameters().values()))
        found.append(torch.cat([g.flatten() for g in each]))
    return found
