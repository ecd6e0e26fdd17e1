"""What a frozen teacher expects at a record's targets, computed from that record alone.

The targets travel with the record, not with the network, so that no cache and no batch couples
records through the teacher.
Reference: Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from fedtune.bases import known_here
from fedtune.bases.find import base_of_plan, cache_dir
from fedtune.config import ObjectiveTable, Study
from fedtune.data.dataset import NO_TARGET, Dataset, Example, Soft
from fedtune.data.records import Record
from fedtune.data.tokenize import passage_of
from fedtune.errors import ConfigError
from fedtune.models.loaded import LoadedModel, load
from fedtune.objectives import resolve
from fedtune.objectives._interface import Teacher
from fedtune.registry import process_cache

Teach = Callable[[Record, Example], Soft]


def teaching(study: Study) -> Teach | None:
    """What marks a site's records for `study`; None where its objective has no teacher.

    Errors: ModelError (no teacher here, or of another digest), ConfigError (of another kind)."""
    spec = resolve(study.objective).taught_by
    return None if spec is None else taught_by([find_teacher(spec)], study.objective, spec)


def taught_by(models: Sequence[LoadedModel], objective: ObjectiveTable, spec: Teacher) -> Teach:
    """The mean of several teachers' probabilities, at temperature `spec.temperature`; of next
    tokens the `spec.top` likeliest. Errors: ConfigError where they cannot teach this objective."""
    labels = objective.labels
    for model in models:
        _check(model, labels)

    def teach(record: Record, example: Example) -> Soft:
        found = [_said(model, record, example, labels) / spec.temperature for model in models]
        each = torch.stack([torch.log_softmax(logits, dim=1) for logits in found])
        mean = torch.logsumexp(each, dim=0) - math.log(len(models))
        if labels:
            tokens = torch.arange(len(labels)).expand_as(mean)
        else:
            mean, tokens = mean.topk(min(spec.top, mean.shape[1]), dim=1)
        return Soft(tokens.numpy().astype(np.int32), mean.numpy().astype(np.float32))

    return teach


@process_cache.cached("teachers")
def find_teacher(spec: Teacher) -> LoadedModel:
    """The teacher by its digest alone, from what this machine's people have named before, or its
    cache holds under teachers/DIGEST; what the plan calls it is not looked at.

    Errors: PolicyRefused where it is not here; ModelError."""
    kept = cache_dir() / "teachers" / spec.digest.removeprefix("sha256:")
    noted = known_here.noted(cache_dir(), spec.digest)
    places = [kept, *([noted[1]] if noted else [])]
    place = next((each for each in places if each.is_dir()), None)
    if place is None:
        place = base_of_plan(spec.digest, None).path
    return load(place, spec.digest, sent=True)


def own_teacher(study: Study) -> None:
    """Look up the teacher of one's own study under the name that the study gives it, so that it is
    found by its digest from now on.

    Errors: ModelError."""
    spec = resolve(study.objective).taught_by
    if spec is not None:
        load(spec.name, spec.digest)


def made_up(data: Dataset, study: Study, vocabulary: int, seed: int = 0) -> Dataset:
    """`data` with random targets where the study has a teacher: for checks on generated records.

    Each record's are drawn from its own tokens."""
    if resolve(study.objective).taught_by is None:
        return data
    labels = len(study.objective.labels)
    outcomes = labels or min(8, vocabulary)

    def marked(example: Example) -> Example:
        draw = np.random.default_rng([seed, *example.input_ids.tolist()])
        rows = 1 if labels else int((example.target_ids != NO_TARGET).sum())
        tokens = np.tile(np.arange(labels), (1, 1)) if labels else None
        if tokens is None:
            tokens = np.array([draw.permutation(vocabulary)[:outcomes] for _ in range(rows)])
            tokens = tokens.reshape(rows, outcomes)
        weights = draw.normal(size=(rows, outcomes)) + (0.0 if labels else -2.0)
        logp = weights - np.log(np.exp(weights).sum(axis=1, keepdims=True) + (0 if labels else 1))
        return replace(example, soft=Soft(tokens.astype(np.int32), logp.astype(np.float32)))

    return replace(data, examples=[marked(example) for example in data.examples])


def _check(model: LoadedModel, labels: Sequence[str]) -> None:
    if not labels and (model.base.kind != "causal" or model.head is not None):
        raise ConfigError(f"the teacher {model.base.name} writes no text", "a language model")
    if labels:
        known = model.study.objective.labels if model.study else ()
        if model.head is None or known != tuple(labels):
            raise ConfigError(
                f"the teacher {model.base.name} does not know objective.labels",
                "a run of objective classify with the same labels in the same order",
            )


def _said(
    model: LoadedModel, record: Record, example: Example, labels: Sequence[str]
) -> torch.Tensor:
    """Log-probabilities of one record: (targets, V), or (1, labels)."""
    if labels:
        assert model.study is not None
        text = record.prompt or record.completion
        ids = passage_of(text, "", model.study.objective, model.tokenizer).input_ids
        return model.scores(ids)[None]
    at = np.flatnonzero(example.target_ids != NO_TARGET)
    return model.next_tokens(example.input_ids, at)
