"""The one place where sampler, clip, noise and accountant meet, so that they cannot disagree.

The shape follows google-deepmind/jax_privacy's execution plan: a frozen description that both
computes ε and runs the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from fedtune.config import Study
from fedtune.dp import accountant, clip, noise, sampling
from fedtune.dp.accountant import Steps
from fedtune.dp.budget import resolve
from fedtune.dp.steplog import Step, StepLog

RELATION = "add or remove one unit"

# The gradients of the sampled units, (units in chunk, d) at a time: each row is ONE unit's.
UnitGradients = Callable[[list[int]], Iterator[torch.Tensor]]


class StepPlan(Protocol):
    """What training asks of a plan, private or not."""

    def step(
        self, n_units: int, dimension: int, gradients: UnitGradients, log: StepLog, round_: int
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class DpPlan:
    """One site's share of a private study.

    noise_multiplier: σ in multiples of the sensitivity; delta: for the whole study; steps: over all
    rounds; divisor: the constant expected batch q · declared size, never the true count.
    Guarantee: each call of `step` is one Poisson-subsampled Gaussian mechanism with (σ, q) on the
    add-or-remove-one-unit relation, and its line is in the log before its result is returned.
    """

    study: str
    unit: Literal["record", "patient"]
    sampling_rate: float
    noise_multiplier: float
    max_grad_norm: float
    clipping: Literal["flat", "normalised"]
    gamma: float
    rounds: int
    local_steps: int
    delta: float
    divisor: float
    relation: str = RELATION

    @property
    def steps(self) -> int:
        return self.rounds * self.local_steps

    @property
    def epsilon(self) -> float:
        """ε of the whole plan, as if every step runs."""
        return accountant.epsilon(self.events(self.steps), self.delta)

    def events(self, steps: int) -> list[Steps]:
        return [Steps(self.noise_multiplier, self.sampling_rate, steps)]

    def step(
        self, n_units: int, dimension: int, gradients: UnitGradients, log: StepLog, round_: int
    ) -> torch.Tensor:
        """One noised mean gradient, fp32 (dimension,), for a site with `n_units` units.

        `gradients` is called once with the sampled indices and yields each unit's row exactly once;
        its tensors are zeroed after use. An empty sample is a noise-only step.
        Errors: RuntimeError when a row is missing or doubled: nothing is released then.
        """
        grid = clip.grid_for(self.noise_multiplier * self.max_grad_norm)
        sampled = sampling.poisson(n_units, self.sampling_rate)
        total = torch.zeros(dimension, dtype=torch.int64)
        seen = 0
        for chunk in gradients(sampled) if sampled else ():
            clipped = clip.clip(chunk, self.max_grad_norm, self.clipping, self.gamma)
            total += clip.to_grid(clipped, grid)
            seen += len(chunk)
            chunk.zero_()
            clipped.zero_()
        if seen != len(sampled):
            raise RuntimeError("the gradient engine did not return each sampled unit once")
        return self._add_noise(total, grid, log, round_)

    def _add_noise(
        self, total: torch.Tensor, grid: float, log: StepLog, round_: int
    ) -> torch.Tensor:
        bound = clip.sensitivity(self.max_grad_norm, len(total), grid)
        log.append(
            Step(
                study=self.study,
                round=round_,
                noise_multiplier=self.noise_multiplier,
                sampling_rate=self.sampling_rate,
                max_grad_norm=self.max_grad_norm,
                unit=self.unit,
            )
        )
        total += noise.gaussian_on_grid(len(total), self.noise_multiplier * bound, grid)
        return (total.double() * (grid / self.divisor)).float()


def plan_for_site(study: Study, declared_size: int) -> DpPlan:
    """The plan of a site with `declared_size` units (public).

    Errors: ConfigError where the study is not private or nothing fits the budget."""
    budget = resolve(study, declared_size)
    privacy, clipping = study.privacy, study.clipping
    assert not isinstance(privacy, str) and clipping is not None  # resolve and Study saw to it
    return DpPlan(
        study=study.digest,
        unit=privacy.unit,
        sampling_rate=budget.sampling_rate,
        noise_multiplier=budget.noise_multiplier,
        max_grad_norm=clipping.max_grad_norm,
        clipping=clipping.mode,
        gamma=clipping.gamma,
        rounds=budget.rounds,
        local_steps=study.training.local_steps,
        delta=privacy.delta,
        divisor=budget.sampling_rate * declared_size,
    )
