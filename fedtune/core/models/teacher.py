"""Compute soft targets of a frozen teacher for a record, from that record alone.

Soft targets are stored with the record, not with the network, so that no cache and no batch
couples records through the teacher.
Reference: Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedtune.core.bases import known_here
from fedtune.core.bases.find import base_of_plan, cache_dir
from fedtune.core.config import ObjectiveTable, Study
from fedtune.core.data.dataset import NO_TARGET, Example, SoftTargets
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import Record
from fedtune.core.data.tokenize import passage_of
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.models.kept_state import check_order, order_of
from fedtune.core.models.loaded import LoadedModel, load
from fedtune.core.objectives import OBJECTIVES
from fedtune.core.objectives._interface import Teacher
from fedtune.core.objectives.distill import ROWS
from fedtune.core.registry import process_cache

TeacherFunction = Callable[[Record, Example], SoftTargets]

# The lengths of generated texts of which a teacher kept nothing, by teacher.
_checked: WeakKeyDictionary[LoadedModel, set[int]] = process_cache.register(
    "teachers' lengths", WeakKeyDictionary()
)


def teacher_for(study: Study) -> TeacherFunction | None:
    """Return a function of a record and its tokenised example that computes the record's soft
    targets; None if the study has no teacher.

    First the teacher reads generated texts, up to the longest that it may be given, to check that
    it keeps nothing of a text that it read. Errors: ModelError (the teacher has another digest,
    cannot be loaded, or was trained for an objective that is not one of this release);
    PolicyRefused (it is not on this machine); ConfigError (it writes no text, or knows other labels
    than the plan's); KeepsState (it keeps something)."""
    spec = study.objective.resolved.teacher_spec
    if spec is None:
        return None
    model = find_teacher(spec)
    teach = soft_targets_of([model], study.objective, spec)
    _check_keeps_nothing(model, study.objective)
    return teach


def soft_targets_of(
    models: Sequence[LoadedModel], objective: ObjectiveTable, spec: Teacher
) -> TeacherFunction:
    """Return a function of a record and its tokenised example that computes the record's soft
    targets: at temperature `spec.temperature`, the mean of the probabilities that several teachers
    give each outcome. The outcomes are the labels in a study of labels; else the next tokens, of
    which the `spec.top` likeliest are kept.

    - models: the teachers, at least one
    - objective: the plan's objective, whose labels are used
    - spec: temperature and number of tokens

    Errors: ConfigError if the teachers do not fit this objective; ModelError if the objective for
    which one of them was trained is not one of this release."""
    labels = objective.labels
    for model in models:
        _check(model, labels)

    def teach(record: Record, example: Example) -> SoftTargets:
        blocks = zip(*(_log_probabilities(m, record, example, labels) for m in models), strict=True)
        parts = [_mean_of_likeliest(block, spec, kept=len(labels)) for block in blocks]
        tokens, mean = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        return SoftTargets(tokens.astype(np.int32), mean.astype(np.float32))

    return teach


def _mean_of_likeliest(
    logps: Sequence[torch.Tensor], spec: Teacher, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean of the probabilities that several teachers give each outcome, and return the
    likeliest outcomes and the logarithms of these means, both (n, k).

    - logps: the log-probabilities that each teacher gives the outcomes of n targets, (n, outcomes),
      up to a constant for each target
    - spec: the temperature and, if `kept` is 0, k
    - kept: the number of all outcomes if all are returned, in their own order; else 0"""
    scaled = torch.stack([torch.log_softmax(x / spec.temperature, dim=1) for x in logps])
    mean = torch.logsumexp(scaled, dim=0) - math.log(len(logps))
    if kept:
        return torch.arange(kept).expand_as(mean), mean
    mean, tokens = mean.topk(min(spec.top, mean.shape[1]), dim=1)
    return tokens, mean


@process_cache.cached("teachers")
def find_teacher(spec: Teacher) -> LoadedModel:
    """Load the teacher, which is found by its digest alone: among models that were named on this
    machine before, or in the cache under teachers/DIGEST. The name that the plan gives it is
    ignored. Errors: PolicyRefused if the teacher is not on this machine; ModelError, whose text
    names folders of this machine, if it cannot be loaded."""
    path = folder_of(spec) or base_of_plan(spec.digest, None).path
    try:
        return load(path, spec.digest, sent=True)
    except ConfigError as error:
        raise ModelError(error.happened, error.expected, error.todo) from error


def folder_of(spec: Teacher) -> Path | None:
    """Return the folder of the model on this machine that has the teacher's digest; None if there
    is none."""
    cached = cache_dir() / "teachers" / spec.digest.removeprefix("sha256:")
    noted = known_here.look_up(cache_dir(), spec.digest)
    places = [cached, *([noted[1]] if noted else [])]
    return next((folder for folder in places if folder.is_dir()), None)


def _check(model: LoadedModel, labels: Sequence[str]) -> None:
    if not labels and (model.base.kind != "causal" or model.head is not None):
        raise ConfigError(f"the teacher {model.digest} writes no text", "a language model")
    if labels:
        # Its own plan says how it reads a text. For this an objective of another distribution would
        # be imported at the first record, though no policy here has named that distribution.
        if model.study and model.study.objective.name not in OBJECTIVES.release():
            raise ModelError(
                f"the teacher {model.digest} was trained for an objective of another distribution",
                "an objective of this release",
            )
        teacher_labels = model.study.objective.labels if model.study else ()
        if model.head is None or teacher_labels != tuple(labels):
            raise ConfigError(
                f"the teacher {model.digest} does not know objective.labels",
                "a run of objective classify with the same labels in the same order",
            )


def _check_keeps_nothing(model: LoadedModel, objective: ObjectiveTable) -> None:
    """Check that a teacher keeps nothing of a text that it read. This is done once for each loaded
    model and each length of the longest text. Errors: KeepsState if it keeps something."""
    own = model.study.objective if objective.labels and model.study else objective
    longest = min(own.max_length, model.room)
    if longest in _checked.setdefault(model, set()):
        return
    draw = np.random.default_rng(0)
    size = model.model.config.get_text_config().vocab_size
    lengths = order_of(longest)
    texts = {n: draw.integers(0, size, size=n, dtype=np.int32) for n in lengths}
    read = lambda length, _: model.hidden(texts[length])  # noqa: E731
    check_order(f"the teacher {model.digest}", model.model, read, lengths)
    _checked[model].add(longest)


def _log_probabilities(
    model: LoadedModel, record: Record, example: Example, labels: Sequence[str]
) -> Iterator[torch.Tensor]:
    """Yield what a teacher says of one record: the log-probabilities of the next token at each
    target, in blocks (n, V) of at most ROWS targets; or, with `labels`, one block of its head's
    logits, (1, labels).

    - model: the teacher
    - record: the record as read; with `labels`, its text, which the teacher tokenises itself
    - example: the record tokenised for the study; without `labels`, the teacher reads its tokens
    - labels: objective.labels, in the order of the teacher's head; () if tokens are predicted

    Errors: Rejected, for a record that is longer than the teacher's positions."""
    ids = example.input_ids
    if labels:
        assert model.study is not None
        text = record.prompt or record.completion
        ids = passage_of(text, "", model.study.objective, model.tokenizer).input_ids
    if len(ids) > model.room:
        raise Rejected("too long")
    if labels:
        yield model.scores(ids)[None]
        return
    at = np.flatnonzero(example.target_ids != NO_TARGET)
    yield from model.next_tokens_by_block(ids, at, ROWS)
