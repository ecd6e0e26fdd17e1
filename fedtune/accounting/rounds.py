"""Fill in the number of rounds that a plan's ε and σ allow."""

from __future__ import annotations

from fedtune.core.config import Study
from fedtune.core.dp.calibration import resolve
from fedtune.core.errors import ConfigError


def with_rounds(study: Study) -> Study:
    """If the study gives ε and σ but no number of rounds, return it with training.rounds filled in
    and without ε, which follows from σ and rounds. Return any other study unchanged.

    Errors: ConfigError if the number of rounds would differ between sites."""
    if study.training.rounds is not None or isinstance(study.privacy, str) or study.continuous:
        return study
    if study.training.sampling_rate is None:
        raise ConfigError(
            "training.rounds is missing, and cannot be computed: with training.expected_batch the "
            "sampling rate differs between sites",
            "training.sampling_rate, or training.rounds",
        )
    rounds = resolve(study, declared_size=1).rounds
    return study.model_copy(
        update={
            "training": study.training.model_copy(update={"rounds": rounds}),
            "privacy": study.privacy.model_copy(update={"epsilon": None}),
        }
    )
