"""Generate random soft targets for generated records, in place of a teacher's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedtune.core.config import Study
from fedtune.core.data.dataset import NO_TARGET, Dataset, Example, SoftTargets


def with_random_targets(data: Dataset, study: Study, vocabulary: int, seed: int = 0) -> Dataset:
    """Give generated records random soft targets, for checks. If the study has no teacher, return
    `data` itself. A record's targets depend only on its tokens and `seed`.

    - data: the generated records
    - study: the plan, which says whether there is a teacher, and which labels it predicts
    - vocabulary: the number of the base's tokens. In a study without labels, each target gets
      probabilities of 8 random tokens, or of all if there are fewer
    - seed: another seed gives the same records other targets"""
    if study.objective.resolved.teacher_spec is None:
        return data
    labels = len(study.objective.labels)
    outcomes = labels or min(8, vocabulary)

    def with_soft_targets(example: Example) -> Example:
        generator = np.random.default_rng([seed, *example.input_ids.tolist()])
        rows = 1 if labels else int((example.target_ids != NO_TARGET).sum())
        tokens = np.tile(np.arange(labels), (1, 1)) if labels else None
        if tokens is None:
            tokens = np.array([generator.permutation(vocabulary)[:outcomes] for _ in range(rows)])
            tokens = tokens.reshape(rows, outcomes)
        weights = generator.normal(size=(rows, outcomes)) + (0.0 if labels else -2.0)
        logp = weights - np.log(np.exp(weights).sum(axis=1, keepdims=True) + (0 if labels else 1))
        return replace(example, soft=SoftTargets(tokens.astype(np.int32), logp.astype(np.float32)))

    return replace(data, examples=[with_soft_targets(example) for example in data.examples])
