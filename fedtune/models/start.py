"""What a study starts from, made once at the coordinator from public things alone."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.config import Study
from fedtune.data.load import load_dataset
from fedtune.dp.calibration import with_rounds
from fedtune.models import lora
from fedtune.models.build import build
from fedtune.models.lora import Arrays
from fedtune.models.public_factor import public_factor


@dataclass(frozen=True, repr=False)
class Start:
    """study: with base.digest, lora.a_digest and training.rounds filled in; its digest is what
    every site binds to. adapter: the trainable arrays of round 0. frozen: A where it comes from
    public text (decompositions differ between machines, so it is sent), else empty."""

    study: Study
    adapter: Arrays
    frozen: Arrays


def start(study: Study) -> Start:
    """Resolve the base, build A, fix the number of rounds.

    Errors: ModelError, ConfigError, DataError (public text)."""
    network = build(study)
    network.check_length(study.objective.max_length)
    study = with_rounds(study)
    base = study.base.model_copy(update={"digest": network.base.digest})
    study = study.model_copy(update={"base": base})
    frozen: Arrays = {}
    if study.lora and study.lora.a_init == "public":
        assert study.public is not None  # Study: required with a_init = "public"
        text = load_dataset(
            study.public, study, network.tokenizer, labelled=False, reader=network.reader
        )
        frozen = public_factor(network, text, study.lora.rank)
    factor = network.adopt(study, frozen)
    if study.lora:
        pinned = study.lora.model_copy(update={"a_digest": lora.digest(factor)})
        study = study.model_copy(update={"lora": pinned})
    return Start(study, network.initial(factor), frozen)
