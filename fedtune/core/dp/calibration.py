"""Derive one of ε, σ (the noise) and the number of rounds from the two that a plan gives."""

from __future__ import annotations

from typing import NamedTuple

from fedtune.core.config import Study
from fedtune.core.dp import accountant
from fedtune.core.errors import ConfigError


class Calibration(NamedTuple):
    sampling_rate: float  # q
    noise_multiplier: float  # σ, in multiples of the sensitivity
    rounds: int  # in a study without a last round: the most in which one unit takes part


def sampling_rate(study: Study, declared_size: int) -> float:
    """Return q, the probability with which a row is drawn for a step. It is the plan's
    sampling_rate or, if the plan gives an expected batch instead, this batch divided by the site's
    declared size, at most 1."""
    training = study.training
    if training.sampling_rate is not None:
        return training.sampling_rate
    assert training.expected_batch is not None  # Study: exactly one given
    return min(1.0, training.expected_batch / declared_size)


def resolve(study: Study, declared_size: int, most: int | None = None) -> Calibration:
    """Compute q, σ and the number of rounds for a site with `declared_size` units. What is derived
    is rounded so that ε is not exceeded. most: the largest number of steps that is tried; None:
    accountant.MOST.

    Errors: ConfigError if the study is not private, not even one round fits the budget, or more
    than `most` steps fit it."""
    privacy = study.privacy
    if isinstance(privacy, str):
        raise ConfigError('privacy = "off" has no ε', "a [privacy] table")
    rate = sampling_rate(study, declared_size)
    rounds, sigma = study.training.rounds, privacy.noise_multiplier
    local, k = study.training.local_steps, study.records_per_draw
    if sigma is None:
        assert privacy.epsilon is not None and rounds is not None  # Study: exactly two given
        sigma = accountant.calibrate(privacy.epsilon, privacy.delta, rate, rounds * local, k)
    if rounds is None:
        assert privacy.epsilon is not None
        steps = accountant.affordable_steps(
            privacy.epsilon, privacy.delta, rate, sigma, k, most or accountant.MOST
        )
        rounds = steps // local
        if rounds < 1:
            raise ConfigError(
                f"privacy.epsilon = {privacy.epsilon} does not pay for one round at "
                f"noise_multiplier = {sigma}",
                todo="raise noise_multiplier or epsilon, or lower local_steps",
            )
    return Calibration(rate, sigma, rounds)
