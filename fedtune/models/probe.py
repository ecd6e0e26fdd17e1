"""Generated records: random tokens that never saw any data, for checks before training."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fedtune.config import Study
from fedtune.data.tokens import Dataset, Example
from fedtune.models.network import Network


def random_records(network: Network, study: Study, count: int = 8, length: int = 16) -> Dataset:
    """`count` units of one record each, drawn from the study's public seed."""
    draw = np.random.default_rng(study.study.seed)
    vocabulary = int(network.model.config.vocab_size)
    examples = []
    for unit in range(count):
        ids = draw.integers(0, vocabulary, size=length + 1, dtype=np.int32)
        targets = ids[1:].copy()
        targets[: length // 2] = -100
        label = unit % max(1, len(study.objective.labels))
        examples.append(Example(ids[:-1].copy(), targets, label, unit))
    return Dataset(examples, count, Counter())
