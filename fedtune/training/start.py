"""Starting point of a study, made once at the coordinator from public data alone."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.config import Study
from fedtune.data.load import load_dataset
from fedtune.dp.calibration import with_rounds
from fedtune.models import lora
from fedtune.models.build import build
from fedtune.models.cache import CachedDataset
from fedtune.models.lora import Arrays
from fedtune.models.network import Network
from fedtune.models.public_factor import public_factor
from fedtune.training.public import head_of_labels, output_factors, trained_on


@dataclass(frozen=True, repr=False)
class Start:
    """A study's starting point. study: with base.digest, training.rounds and the digests of what is
    built here filled in; its digest is what every site binds to. adapter: the trainable arrays of
    round 0. frozen: A where it comes from public text (decompositions differ between machines, so
    it is sent), and the preconditioner, if the plan has one."""

    study: Study
    adapter: Arrays
    frozen: Arrays


def start(study: Study) -> Start:
    """Resolve the base, fix the number of rounds, build from public text what the plan asks for: A,
    the preconditioner, the initial adapter or head.

    Errors: ModelError, ConfigError, DataError (public text)."""
    network = build(study)
    network.check_length(study.objective.max_length)
    study = with_rounds(study)
    base = study.base.model_copy(update={"digest": network.base.digest})
    study = study.model_copy(update={"base": base})
    study, frozen = _frozen(study, network)
    factor = network.adopt(study, frozen)
    adapter = network.initial(factor)
    if study.start:
        adapter = _started(study, network, adapter)
        pinned = study.start.model_copy(update={"digest": lora.digest(adapter)})
        study = study.model_copy(update={"start": pinned})
    return Start(study, adapter, frozen)


def _frozen(study: Study, network: Network) -> tuple[Study, Arrays]:
    """Return the plan with the digests of A and the preconditioner, and the arrays of them to
    send."""
    if study.lora is None:
        return study, {}
    pinned = study.lora.model_copy(update={"preconditioner": None})
    unpinned = study.model_copy(update={"lora": pinned})
    frozen: Arrays = {}
    if pinned.a_init == "public":
        assert study.public is not None  # Study: required with a_init = "public"
        text = load_dataset(
            study.public, study, network.tokenizer, labelled=False, reader=network.reader
        )
        frozen = public_factor(network, text, pinned.rank)
    factor = network.adopt(unpinned, frozen)
    pinned = pinned.model_copy(update={"a_digest": lora.digest(factor)})
    if table := study.lora.preconditioner:
        with network.loaded(trainable=network.initial(factor)):  # independent of its last use
            outputs = output_factors(study, _public(study, network), table)
        table = table.model_copy(update={"digest": lora.digest(outputs)})
        pinned, frozen = pinned.model_copy(update={"preconditioner": table}), frozen | outputs
    return study.model_copy(update={"lora": pinned}), frozen


def _public(study: Study, network: Network) -> CachedDataset:
    """Read [public] with its answers."""
    assert study.public is not None  # Study: required wherever answers are needed
    text = load_dataset(study.public, study, network.tokenizer, reader=network.reader)
    return CachedDataset(network, text)


def _started(study: Study, network: Network, adapter: Arrays) -> Arrays:
    """Return the adapter and head before the first round."""
    assert study.start is not None
    if study.start.head == "labels":
        adapter = adapter | head_of_labels(study, network)
    if study.start.steps:
        adapter = trained_on(study, _public(study, network), adapter)
    return adapter
