"""The table [training] of study.toml. It also computes the learning rate of each round."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from fedtune.core.config.types import Count, Fraction, NotNegative, Number, Positive, Table

Schedule = Literal["constant", "linear", "cosine"]


class TrainingTable(Table):
    """How a study trains: the number of its rounds and of a site's steps in each, and how a site
    samples records and updates the adapter."""

    rounds: Number | None = None
    local_steps: Number = 1
    sampling_rate: Fraction | None = None  # q: each unit joins each step with this probability
    expected_batch: Count | None = None  # or: q = expected_batch / the site's declared size
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive
    # How the rate falls over the rounds, to near zero. Omitted if constant, so that such plans keep
    # their digest and older releases can read them.
    learning_rate_schedule: Schedule = Field(
        default="constant", exclude_if=lambda name: name == "constant"
    )
    weight_decay: NotNegative = 0.0
    proximal_mu: NotNegative = 0.0  # FedProx (Li et al. 2020); post-processing
    # How per-record gradients are computed: the fastest engine for the adapter, or always Opacus.
    engine: Literal["auto", "opacus"] = "auto"

    def rate(self, round_: int) -> float:
        """Return the learning rate of a round, where the first round is 1.

        | learning_rate_schedule | the rate                                                |
        |------------------------|---------------------------------------------------------|
        | constant               | learning_rate                                           |
        | linear                 | learning_rate · (1 - t), where t = (round - 1) / rounds |
        | cosine                 | learning_rate · (1 + cos πt) / 2                        |
        The rate depends on the plan and the round alone, never on a record, so it costs no ε.

        >>> table = TrainingTable(rounds=4, learning_rate=2.0, learning_rate_schedule="linear")
        >>> [table.rate(n) for n in (1, 2, 3, 4)]
        [2.0, 1.5, 1.0, 0.5]"""
        if self.learning_rate_schedule == "constant":
            return self.learning_rate
        assert self.rounds is not None  # filled in when the study starts; never with a [schedule]
        t = min(max(round_ - 1, 0), self.rounds - 1) / self.rounds
        factor = (
            1 - t if self.learning_rate_schedule == "linear" else (1 + math.cos(math.pi * t)) / 2
        )
        return self.learning_rate * factor
