"""Bound the norm ‖Δ‖ of an honest site's update by the plan's noise, clipping and rates.

    η learning rate        T local_steps          λ weight decay        μ proximal term
    q sampling rate        σ noise multiplier     C clipping norm
    n declared size        k records of a unit in a step                D = q·k·n the divisor
    w₀ adapter that the site was sent             d number of its coordinates

A step's noised mean is g = (S + Z) / D. S is the sum of the B sampled rows, each clipped to the
norm C, so ‖S‖ ≤ B·C. The noise Z ~ N(0, (σC)² I) is independent of everything before it.

SGD (no momentum): Δ ← cΔ - ηg - ηλw₀ with c = 1 - η(λ + μ). Two bounds hold; the smaller counts.

(a) The weighted sum of the T noises is one Gaussian. The norm of a standard Gaussian is at most
    χ = √(d + 2√(dx) + 2x), except with probability e⁻ˣ (Laurent & Massart 2000, lemma 1), so

        ‖Δ‖ ≤ η/D · √(Σ c²ʲ) · σC · χ  +  η/D · Σ|c|ʲ · B*C  +  ηλ |Σ cʲ| ‖w₀‖,    j = 0 … T-1

(b) Given the earlier steps, a step adds a Gaussian of deviation s = ησC/D to a vector of norm at
    most b = |c|R + ηB*C/D + ηλ‖w₀‖, where R is the bound so far. By Birgé 2001, lemma 8.1, for the
    noncentral χ², R² ← s²d + b² + 2s√((s²d + 2b²)x) + 2s²x. In (b) signal and noise add as squares,
    since they are nearly orthogonal; with many steps (a) is smaller.

B* bounds every step's B ~ Binomial(M, q) by Bernstein's inequality (Boucheron, Lugosi & Massart
2013, theorem 2.10). M = ROWS · k · n allows for more units than declared, since their true number
is private and may exceed the declared one.

AdamW: by Cauchy–Schwarz a coordinate's step m̂/√v̂ is at most r_t = √(Σ wᵢ²/uᵢ), whatever the
gradients are. Here w and u are the bias-corrected weights of the two running means. r_t tends to
7.3 for 0.9 and 0.999; Kingma & Ba 2015, section 2.1, give the rougher (1-β₁)/√(1-β₂). So
‖Δ‖ ≤ η√d Σ (1-ηλ)^(T-t) r_t + (1 - (1-ηλ)^T) ‖w₀‖, which depends on no noise and always holds.

Guarantee: an honest site whose units number at most ROWS times its declared size passes, except
with probability FAILURE per update. The bound costs no ε, since it reads only noised updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fedtune.core.config import Study, noise_shares
from fedtune.core.dp.shared_noise import own_sigma
from fedtune.evidence.step_summary import Agreed

FAILURE = 1e-12
# A site's true number of units may be this many times its declared size. `fedtune doctor` asks a
# site with more units to declare another size.
ROWS = 2
BETA1, BETA2 = 0.9, 0.999  # torch.optim.AdamW's defaults, which sites use
GRID = 2.0**-20  # the largest spacing of the grid on which sums are rounded, in units of σC


class Mechanism(Protocol):
    """The noise mechanism that the plan gives a site: sampling rate, noise multiplier and number of
    rounds. In a run it is an object of fedtune.core.dp.calibration.Calibration."""

    @property
    def sampling_rate(self) -> float: ...
    @property
    def noise_multiplier(self) -> float: ...
    @property
    def rounds(self) -> int: ...


@dataclass(frozen=True)
class Terms(Agreed):
    """The plan's requirements for one site's noised steps, with which its step log is compared.
    divisor: the number by which a step's noised sum is divided, q · k · declared size, where q is
    the sampling rate and k the number of a unit's records in a step."""

    divisor: float


def terms(study: Study, budget: Mechanism, declared: int) -> Terms:
    """Return the requirements for the noised steps of a site with `declared` units, in a private
    study. budget: the mechanism (rate, noise multiplier, rounds) that the plan gives a site of this
    size."""
    assert study.clipping is not None  # Study: a private study clips
    k = study.records_per_draw
    return Terms(
        sampling_rate=budget.sampling_rate,
        noise_multiplier=own_sigma(budget.noise_multiplier, noise_shares(study)),
        max_grad_norm=study.clipping.max_grad_norm,
        records=k,
        divisor=budget.sampling_rate * k * declared,
        steps=budget.rounds * study.training.local_steps,
    )


def norm_bound(study: Study, site: Terms, dimension: int, start: float) -> float:
    """Compute the bound on the norm ‖Δ‖ of an honest site's update, as this module derives it. The
    bound holds in every round, since it uses the plan's learning_rate, which a schedule only
    lowers.

    - study: the plan, whose table [training] gives the rates
    - site: the requirements for the site's noised steps
    - dimension: d, the number of entries of the update's arrays
    - start: the norm ‖w₀‖ of the adapter that was sent, or an upper bound on it"""
    kind = _sgd if study.training.optimizer == "sgd" else _adamw
    bound, growth = kind(study, site, dimension, start)
    return bound * (1 + 1e-5) + growth * 2.0**-22 * (start + bound)  # rounding to fp32


def _sgd(study: Study, site: Terms, dimension: int, start: float) -> tuple[float, float]:
    """Compute the bound for SGD before rounding to fp32, as this module derives it. Return the
    bound, and Σ|c|ʲ, by which the rounding grows over the steps.

    - study: the plan, with learning rate and steps
    - site: the noise, clipping and divisor of the site's steps
    - dimension: d
    - start: ‖w₀‖, or an upper bound on it"""
    t = study.training
    eta, c = t.learning_rate, 1 - t.learning_rate * (t.weight_decay + t.proximal_mu)
    x = math.log(2 * t.local_steps / FAILURE)  # half of FAILURE for the noise, half for B*
    # Rounding to the grid moves a row, and the noise, by at most √d/2 grid steps each.
    rounding = math.sqrt(dimension) * GRID * site.noise_multiplier * site.max_grad_norm
    reach = site.max_grad_norm + rounding
    noise = eta / site.divisor * site.noise_multiplier * reach
    drift = eta / site.divisor * (_rows(site, x) * reach + rounding)
    decay = eta * t.weight_decay * start
    powers = c ** np.arange(t.local_steps, dtype=np.float64)
    total = float(np.abs(powers).sum())
    chi = math.sqrt(_bound_squared_norm(1.0, dimension, 0.0, math.log(2 / FAILURE)))
    at_once = noise * math.sqrt(float((powers**2).sum())) * chi + total * drift
    at_once += decay * abs(float(powers.sum()))
    stepwise = 0.0
    for _ in range(t.local_steps):
        mean = abs(c) * stepwise + drift + decay
        stepwise = math.sqrt(_bound_squared_norm(noise, dimension, mean, x))
    return min(at_once, stepwise), total


def _bound_squared_norm(deviation: float, dimension: int, mean: float, x: float) -> float:
    """Return a bound on the squared norm of a constant vector b plus Gaussian noise: ‖b + N(0, s²
    I)‖² exceeds it with probability at most e⁻ˣ.

    - deviation: s, the standard deviation of each coordinate
    - dimension: the number of coordinates
    - mean: the norm ‖b‖ of the constant part
    - x: minus the logarithm of the probability that the bound fails"""
    center, spread = deviation**2 * dimension, deviation * math.sqrt(x)
    return center + mean**2 + 2 * spread * math.sqrt(center + 2 * mean**2) + 2 * spread**2


def _adamw(study: Study, _: Terms, dimension: int, start: float) -> tuple[float, float]:
    """Compute the bound for AdamW before rounding to fp32, as this module derives it. Return the
    bound, and the number of steps, by which the rounding grows.

    - study: the plan, with learning rate and steps
    - _: the requirements for the site's noised steps, which have no influence here
    - dimension: d
    - start: ‖w₀‖, or an upper bound on it"""
    t = study.training
    keep = 1 - t.learning_rate * t.weight_decay
    step = np.arange(1, t.local_steps + 1, dtype=np.float64)
    ratio = BETA1**2 / BETA2
    spread = (1 - BETA1) ** 2 / (1 - BETA2) * (1 - ratio**step) / (1 - ratio)
    reach = np.sqrt(spread * (1 - BETA2**step)) / (1 - BETA1**step)
    total = float((abs(keep) ** (t.local_steps - step) * reach).sum())
    bound = t.learning_rate * math.sqrt(dimension) * total
    return bound + abs(1 - keep**t.local_steps) * start, float(t.local_steps)


def _rows(site: Terms, x: float) -> float:
    """Return B*, a bound on the number of rows that a site draws in a step. The number exceeds the
    bound with probability at most e⁻ˣ, even if the site has ROWS times as many units as it
    declared. x: minus the logarithm of that probability."""
    q = site.sampling_rate
    most = ROWS * site.divisor / q
    return min(most, most * q + math.sqrt(2 * most * q * (1 - q) * x) + x / 3)


class Limits:
    """Computes, from the plan, the limits that an honest site's updates do not exceed.

    - study: the plan
    - budget: (study, declared size) -> the mechanism of a site of this size; it is called once for
      each size"""

    def __init__(self, study: Study, budget: Callable[[Study, int], Mechanism]) -> None:
        self._study, self._budget = study, budget
        self._terms: dict[int, Terms] = {}  # by declared size
        self._mechanisms: dict[int, Mechanism] = {}

    def mechanism(self, declared: int) -> Mechanism:
        """Return the sampling rate, noise multiplier and rounds of a site of this declared size.

        Errors: ConfigError if no mechanism fits the declared size."""
        if declared not in self._mechanisms:
            self._mechanisms[declared] = self._budget(self._study, declared)
        return self._mechanisms[declared]

    def deviation(self, declared: int) -> float:
        """Return the standard deviation of the noise in each number of a step's mean gradient, for
        a site of this declared size; 0 if the plan adds none.

        Errors: ConfigError if no mechanism fits the declared size."""
        if not self._study.private:
            return 0.0
        site = terms(self._study, self.mechanism(declared), declared)
        return site.noise_multiplier * site.max_grad_norm / site.divisor

    def of(self, declared: int, dimension: int, start: float, done: int | None) -> dict[str, Any]:
        """Return the limits on a site's update, as named arguments of `admission.outcome`: "terms",
        the requirements for its noised steps, and "longest", the largest norm; {} if the plan adds
        no noise.

        - declared: the site's declared size
        - dimension: the number of entries of the update's arrays
        - start: the norm of the adapter that was sent, or an upper bound on it
        - done: the number of saved rounds in a study without a last round; None in another study.
          In a study without a last round, the mechanism's number of rounds is only that of one
          unit's life; so the site may have made the steps of done + 1 rounds instead.

        Errors: ConfigError if no mechanism fits the declared size."""
        if not self._study.private:
            return {}
        if declared not in self._terms:
            self._terms[declared] = terms(self._study, self.mechanism(declared), declared)
        site = self._terms[declared]
        if done is not None:
            site = replace(site, steps=(done + 1) * self._study.training.local_steps)
        return {"terms": site, "longest": norm_bound(self._study, site, dimension, start)}
