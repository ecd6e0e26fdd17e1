"""Trap 10: the central-limit (GDP) formula under-reports; ε must not be below the exact one."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedtune.core.dp.accountant import Steps, epsilon


def exact(sigma: float, q: float, delta: float) -> float:
    """ε of one Poisson-sampled Gaussian step, by its hockey-stick divergence in closed form."""

    def threshold(eps: float) -> float:  # where the likelihood ratio of the two outputs is e^ε
        return sigma**2 * math.log((math.exp(eps) - 1 + q) / q) + 0.5

    def gap(eps: float) -> float:
        at = threshold(eps)
        none, one = norm.sf(at / sigma), norm.sf((at - 1) / sigma)
        return float((1 - q) * none + q * one - math.exp(eps) * none - delta)

    return float(brentq(gap, 1e-9, 50))


def clt(sigma: float, q: float, steps: int, delta: float) -> float:
    """The forbidden formula (Bu et al. 2020, corollary 4): μ = q·√(T(e^{1/σ²} − 1))."""
    mu = q * math.sqrt(steps * math.expm1(1 / sigma**2))

    def gap(eps: float) -> float:
        first = norm.cdf(mu / 2 - eps / mu)
        return float(first - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta)

    return float(brentq(gap, 1e-9, 200)) if gap(1e-9) > 0 else 0.0


@pytest.mark.parametrize(("sigma", "q"), [(0.7, 0.01), (1.0, 0.1), (1.5, 0.02), (2.0, 0.5)])
def test_one_sampled_step_is_never_below_its_exact_epsilon(sigma: float, q: float) -> None:
    true = exact(sigma, q, 1e-5)
    assert true - 1e-6 <= epsilon([Steps(sigma, q, 1)], 1e-5) <= 1.02 * true + 1e-3
    assert clt(sigma, q, 1, 1e-5) < 0.95 * true or q == 0.5  # the twin: the formula falls short


def test_many_sampled_steps_are_above_the_forbidden_formula() -> None:
    ours = epsilon([Steps(0.8, 0.01, 1000)], 1e-5)
    assert ours > 1.05 * clt(0.8, 0.01, 1000, 1e-5)
