"""Compute the starting point of a study, once at the coordinator, from public data alone.

The computation takes as long as several passes of the base over the public text. A process keeps
the result in memory: the trials of `fedtune tune`, and the arms of a benchmark, differ only in
tables that do not affect it. The result is also stored on disk (start_cache.py), since a run may be
interrupted before its first round."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import torch

import fedtune
from fedtune.accounting.rounds import with_rounds
from fedtune.core.config import Study, TrainingTable
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.load import load_dataset
from fedtune.core.errors import ConfigError
from fedtune.core.modalities import MODALITIES
from fedtune.core.models import lora
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.kept_state import check_reads
from fedtune.core.models.lora import Arrays
from fedtune.core.models.network import Network
from fedtune.core.models.preconditioner import narrow_factors
from fedtune.core.objectives import OBJECTIVES
from fedtune.core.registry import process_cache
from fedtune.core.run_folder import is_exported
from fedtune.core.strategy import State
from fedtune.public import start_cache
from fedtune.public.class_basis import basis_of, class_knowledge
from fedtune.public.factor import public_factor
from fedtune.public.training import head_fitted, head_of_labels, output_factors, trained_on
from fedtune.strategies.discriminant import public_head

P = ParamSpec("P")
_kept: dict[str, Arrays] = process_cache.register("made from public text", {})
_MOST = 24  # results kept in memory; two studies, each with A, W, a head and a few steps, fit
# Tables and keys that no computation on public text depends on: they concern private records, or
# take effect from round 1 on.
_LATER = ("strategy", "wire", "evaluation", "selection", "secure_aggregation", "schedule")
_APART: dict[str, Any] = {
    "study": {"name", "data_sheet"},
    "privacy": {"epsilon", "delta", "noise_multiplier"},
    "private_evaluation": True,
    **dict.fromkeys(_LATER, True),
}
# For each computation (A, W, W under a head, the head) the further tables that do not affect it.
# The tuple is part of the stored result's key, and so distinguishes the computations of one plan.
_FACTOR = ("clipping", "start", "preconditioner")
_OUTPUTS = ("clipping", "start")
_OUTPUTS_UNDER_HEAD = ("clipping",)
_HEAD = ("clipping", "preconditioner")


@dataclass(frozen=True, repr=False)
class Start:
    """A study's starting point.

    - study: the plan with base.digest, training.rounds and the digests of the arrays below filled
      in; its digest names the study in every ledger and seal
    - adapter: the trainable arrays of round 0
    - frozen: the arrays that sites receive and do not train: A if it comes from public text, and
      the preconditioner if the plan has one; or the basis of class statistics. A is sent, since two
      machines that compute it would get different numbers
    - strategy: the strategy's state from public records, which no site receives"""

    study: Study
    adapter: Arrays
    frozen: Arrays
    strategy: State = field(default_factory=dict)


def start(study: Study) -> Start:
    """Compute the starting point of a study: find the base, fix the number of rounds, and compute
    what the plan asks for from public text (A, the preconditioner, the initial adapter or head).

    Errors: ModelError, ConfigError (also if the base was exported from a run), DataError (public
    text)."""
    network = build(study)
    if is_exported(network.base.path):
        raise ConfigError(
            f"base.model: {network.base.name} is an exported model, which a run trained",
            "a base that no record of the sites trained: the study's ε holds its own rounds alone",
            "name the base of that run",
        )
    check_reads(study, network)
    study = with_rounds(study)
    base = study.base.model_copy(update={"digest": network.base.digest})
    study = study.model_copy(update={"base": base})
    # The preconditioner and the start share one data set, so that its states are computed once.
    answered = functools.cache(functools.partial(_read_public, study, network))
    study, frozen, outputs = _freeze(study, network, answered)
    factor = network.adopt(study, frozen)
    adapter = network.initial(factor)
    known = _compute_known(study, answered) if network.statistics is not None else {}
    if study.start:
        if known:
            adapter = public_head(known)
        else:  # without noise these steps use the whole preconditioner, sites perhaps a part of it
            with network.loaded(frozen=network.frozen_factor() | outputs):
                adapter = _compute_start(study, network, adapter, answered)
        pinned = study.start.model_copy(update={"digest": lora.digest(adapter)})
        study = study.model_copy(update={"start": pinned})
    return Start(study, adapter, frozen, known)


def _freeze(
    study: Study, network: Network, answered: Callable[[], CachedDataset]
) -> tuple[Study, Arrays, Arrays]:
    """Compute the arrays that sites receive and do not train: LoRA's A (if it comes from public
    text) and the preconditioner, or the basis of class statistics.

    answered: reads the public records with their answers. Returns three things:
    - the plan, with the digests of these arrays filled in
    - the arrays, by name
    - the preconditioner's factor W of each B, by name; {} without a preconditioner. If the plan's
      preconditioner is narrow, its smaller factor U is sent, but W is returned here."""
    if study.lora is None:
        if network.statistics is None:
            return study, {}, {}
        return *_with_basis(study, answered), {}
    pinned = study.lora.model_copy(update={"preconditioner": None})
    unpinned = study.model_copy(update={"lora": pinned})
    frozen, outputs = Arrays(), Arrays()
    if pinned.a_init == "public":
        assert study.public is not None  # Study requires it with a_init = "public"
        text = load_dataset(
            study.public, study, network.tokenizer, labelled=False, reader=network.reader
        )
        frozen = _compute_once(study, text, _FACTOR, public_factor, network, text, pinned.rank)
    factor = network.adopt(unpinned, frozen)
    pinned = pinned.model_copy(update={"a_digest": lora.digest(factor)})
    if table := study.lora.preconditioner:
        data = answered()
        # Under a head of zeros an adapter has no gradient.
        begun = _with_head(study, network, network.initial(factor), answered)
        headed = study.start is not None and study.start.head != "zero"
        without = _OUTPUTS_UNDER_HEAD if headed else _OUTPUTS
        with network.loaded(trainable=begun):
            outputs = _compute_once(
                study, data.dataset, without, output_factors, study, data, table
            )
        sent = narrow_factors(outputs) if table.narrow else outputs
        table = table.model_copy(update={"digest": lora.digest(sent)})
        pinned, frozen = pinned.model_copy(update={"preconditioner": table}), frozen | sent
    return study.model_copy(update={"lora": pinned}), frozen, outputs


def _with_basis(study: Study, answered: Callable[[], CachedDataset]) -> tuple[Study, Arrays]:
    """Compute the public basis of class statistics. Return two things: the plan with the digest of
    this basis filled in, and the two arrays of the basis by name. answered: a function that returns
    the public records, with their answers."""
    basis = basis_of(_compute_known(study, answered), study.objective.resolved.directions)
    pinned = study.objective.model_copy(update={"basis_digest": lora.digest(basis)})
    return study.model_copy(update={"objective": pinned}), basis


def _compute_known(study: Study, answered: Callable[[], CachedDataset]) -> State:
    """Compute what is known of the classes from public data: the arrays of `class_knowledge` by
    name (basis, public sums by class, vectors of class names). If they were computed before for the
    same plan and records, the stored arrays are returned. answered: reads the public records."""
    unpinned = study.objective.model_copy(update={"basis_digest": None})
    study, data = study.model_copy(update={"objective": unpinned}), answered()
    return _compute_once(study, data.dataset, _HEAD, class_knowledge, study, data)


def _read_public(study: Study, network: Network) -> CachedDataset:
    """Read the public records that the plan's table [public] names, with their answers. If only the
    basis of class statistics is built from them, a record without an answer is read too. network:
    the base that reads them."""
    assert study.public is not None  # Study and strategy require it wherever it is read
    labelled = network.statistics is None or (
        study.start is not None and study.start.head == "public"
    )
    text = load_dataset(
        study.public, study, network.tokenizer, labelled=labelled, reader=network.reader
    )
    return CachedDataset(network, text)


def _compute_start(
    study: Study, network: Network, adapter: Arrays, answered: Callable[[], CachedDataset]
) -> Arrays:
    """Compute the trainable arrays before the first round: give `adapter` the head that [start]
    asks for, then train it for start.steps steps on public text. Return the arrays by name.

    - study: the plan, with the digests of its frozen arrays filled in
    - network: the base, with the plan's frozen arrays loaded (A and preconditioner)
    - adapter: the trainable arrays to begin with, whose head is zero
    - answered: reads the public records with their answers; called only if they are needed"""
    assert study.start is not None
    adapter = _with_head(study, network, adapter, answered)
    if study.start.steps:
        data = answered()
        adapter = _train(study, data, adapter)
    return adapter


def _with_head(
    study: Study, network: Network, adapter: Arrays, answered: Callable[[], CachedDataset]
) -> Arrays:
    """Return `adapter` with the head that [start] asks for; unchanged if it asks for none.

    - study: the plan; a plan without [start] asks for no head
    - network: the base, whose vectors of the classes' names or of records give the head
    - adapter: the trainable arrays
    - answered: reads the public records with their answers; called only for a head fitted to
      them"""
    if study.start is None or study.start.head == "zero":
        return adapter
    with network.loaded(trainable=adapter):  # independent of the network's last use
        adapter = adapter | head_of_labels(study, network)
    if study.start.head == "public":
        data = answered()
        adapter = _compute_once(study, data.dataset, _HEAD, head_fitted, data, adapter)
    return adapter


def _train(study: Study, data: CachedDataset, adapter: Arrays) -> Arrays:
    """Train `adapter` for start.steps steps on the public records `data`, and return the trained
    arrays. Each step's result is stored, so that an interrupted run continues after the last
    complete step."""
    assert study.start is not None
    for step in range(study.start.steps):
        so_far = study.start.model_copy(update={"steps": step + 1})
        upto = study.model_copy(update={"start": so_far})
        adapter = _compute_once(upto, data.dataset, (), trained_on, study, data, adapter, step)
    return adapter


def _compute_once(
    study: Study,
    text: Dataset,
    without: Sequence[str],
    make: Callable[P, Arrays],
    *args: P.args,
    **kwargs: P.kwargs,
) -> Arrays:
    """Return the result of make(*args, **kwargs). It is computed only if no result is stored for
    the same plan and text. The caller may change the returned arrays, which are a copy.

    - study: the plan, by which a stored result is found again. Only the tables `without`, and those
      in _APART, which affect no computation on public text, may differ
    - text: the public records; a stored result is found only if their content is the same
    - without: further tables of the plan on which this result does not depend. A stored result is
      found only with the same tuple, which distinguishes the computations for one plan.
    - make: the computation; its arguments are not compared, so they must follow from the plan and
      the text"""
    key = _key(study, text, without)
    if key not in _kept:
        stays = _is_ours(study)
        found = start_cache.load_arrays(key) if stays else None
        if found is None:
            found = make(*args, **kwargs)
            if stays:
                start_cache.keep(key, found)
        _kept[key] = found
        for old in [*_kept][:-_MOST]:
            del _kept[old]
    return {name: array.copy() for name, array in _kept[key].items()}


def _is_ours(study: Study) -> bool:
    """Return whether only code of this release computes on the public text, so that a result may be
    stored on disk. The stored result's key holds a digest of this package's code; the code of a
    plug-in may change unnoticed."""
    modality = study.base.modality
    known = modality is None or modality in MODALITIES.release()
    return known and study.objective.name in OBJECTIVES.release()


@functools.cache
def _code() -> str:
    """Compute a digest, in hexadecimal, of all Python files of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(fedtune.__file__).parent.rglob("*.py")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _key(study: Study, text: Dataset, without: Sequence[str]) -> str:
    """Compute the key under which a result is stored: a digest, in hexadecimal, of everything on
    which the computation may depend. That is this package, torch's version, the plan without the
    tables in _APART and `without`, and the text's token ids, labels and media."""
    apart: dict[str, Any] = _APART | {
        "training": {name for name in TrainingTable.model_fields if name != "engine"}
    }
    plan = study.model_dump(mode="json", exclude=apart)
    if plan.get("lora"):
        # a_digest is filled in during the computation, and follows from the rest of the key.
        plan["lora"] = {k: v for k, v in plan["lora"].items() if k != "a_digest"}
    for name in without:
        plan.pop(name, None)
        (plan.get("lora") or {}).pop(name, None)
    made_by = [_code(), torch.__version__]
    digest = hashlib.sha256(json.dumps([made_by, without, plan], sort_keys=True).encode())
    for example in text.examples:
        digest.update(repr((example.label, len(example.passages))).encode())
        digest.update(example.media.file if example.media else b"")
        for passage in example.passages:
            for ids in (passage.input_ids, passage.target_ids):
                digest.update(f"{len(ids)};".encode())
                digest.update(np.asarray(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()
