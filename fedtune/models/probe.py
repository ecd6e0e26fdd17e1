"""Generated records: random tokens that never saw any data, for checks before training."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fedtune.config import Study
from fedtune.data.tokens import NO_TARGET, Dataset, Example, Passage
from fedtune.models.network import Network
from fedtune.models.teacher import made_up
from fedtune.objectives import find


def random_records(network: Network, study: Study, count: int = 8, length: int = 16) -> Dataset:
    """`count` units of one record each, drawn from the study's public seed."""
    draw = np.random.default_rng(study.study.seed)
    vocabulary = int(network.model.config.vocab_size)
    shape = find(study.objective).shape
    labels = 2 if shape == "judged" else max(1, len(study.objective.labels))

    def passage() -> Passage:
        ids = draw.integers(0, vocabulary, size=length + 1, dtype=np.int32)
        targets = ids[1:].copy()
        targets[: length // 2] = NO_TARGET
        return Passage(ids[:-1].copy(), targets)

    examples = [
        Example(*passage(), unit % labels, unit, passage() if shape == "pair" else None)
        for unit in range(count)
    ]
    return made_up(Dataset(examples, count, Counter()), study, vocabulary)
