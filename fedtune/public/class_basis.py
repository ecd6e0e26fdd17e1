"""Compute the basis in which sites sum features by class, and the public records' statistics in
this basis. Both follow from public data alone and cost no ε."""

from __future__ import annotations

import numpy as np

from fedtune.core.config import Study
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.class_statistics import LARGEST
from fedtune.core.models.lora import Arrays
from fedtune.core.registry.arrays import CLASS_BASIS, CLASS_MEAN
from fedtune.public.training import vectors_of, vectors_of_labels
from fedtune.strategies._posterior import choose, held_out_hits, summarise_public
from fedtune.strategies.discriminant import DIRECTIONS, HELD_OUT, MEAN, state_of


def class_knowledge(study: Study, data: CachedDataset) -> Arrays:
    """Compute, from public data alone, what a study of class statistics starts with: the state of
    the strategy `Discriminant` before the first round. Return name -> array in fp64.

    The state holds the basis, the sums of the public records by class, the vectors of the classes'
    names (if the base reads text), and how often a cross-validation was right (if there are enough
    records). Records with an unknown label count as unlabelled.

    Errors: ConfigError if names and records span too few directions."""
    objective = study.objective.resolved
    vectors, labels = vectors_of(data)
    reads_text = data.network.reader.column is None
    names = vectors_of_labels(study, data.network) if reads_text else None
    basis = choose(vectors, names, objective.directions, objective.count_weight)
    known = summarise_public(basis, vectors, labels, len(study.objective.labels), names)
    hits = held_out_hits(basis, vectors, labels, known, names)
    return state_of(basis, known) | ({} if hits is None else {HELD_OUT: hits})


def basis_of(knowledge: Arrays, directions: int) -> Arrays:
    """Return the part of the basis that sites receive, as two arrays in fp32, by name: the basis's
    first `directions` rows, (directions, H), and the mean that is subtracted from a vector first,
    (H,). knowledge: the result of `class_knowledge`."""
    basis = np.clip(knowledge[DIRECTIONS][:directions], -LARGEST, LARGEST)
    return {
        CLASS_BASIS: np.ascontiguousarray(basis.astype(np.float32)),
        CLASS_MEAN: knowledge[MEAN].astype(np.float32),
    }
