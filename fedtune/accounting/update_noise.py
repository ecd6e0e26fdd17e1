"""Compute how much noise a site's update carries, from the plan alone."""

from __future__ import annotations

import math

from fedtune.core.config import Study


def gain_of_noise(study: Study, round_: int) -> float:
    """Return the factor by which the noise of a step's mean gradient appears in a site's update:
    the learning rate of round `round_`. Return NaN if this factor is not the same for all numbers
    of the update, as with several steps, AdamW, or ranks that sites choose."""
    training, lora = study.training, study.lora
    is_one_step = training.local_steps == 1 and training.optimizer == "sgd"
    is_whole = lora is None or lora.min_rank is None
    return training.rate(round_) if is_one_step and is_whole else math.nan
