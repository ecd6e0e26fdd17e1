import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedtune.dp import accountant
from fedtune.dp.accountant import Steps, calibrate, epsilon, rdp_epsilon


def gaussian_epsilon(sigma: float, steps: int, delta: float) -> float:
    """The exact ε of composed Gaussians (Balle & Wang 2018, theorem 8), on its own."""
    mu = math.sqrt(steps) / sigma

    def gap(eps: float) -> float:
        first = norm.cdf(mu / 2 - eps / mu)
        return float(first - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu) - delta)

    return float(brentq(gap, 0, 200))


@pytest.mark.parametrize("sigma", [0.8, 1.536, 5.0])
@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_full_batch_equals_the_closed_form_and_is_never_below(
    sigma: float, steps: int, delta: float
) -> None:
    exact = gaussian_epsilon(sigma, steps, delta)
    ours = epsilon([Steps(sigma, 1.0, steps)], delta)
    assert exact - 1e-6 <= ours <= exact * 1.01


def test_known_trap_values() -> None:
    """σ = 1.536 copied from a table is a hair above 8 (trap 29); RDP is looser, never below."""
    steps = [Steps(1.536, 1.0, 8)]
    assert epsilon(steps, 1e-4) == pytest.approx(8.0003, abs=2e-4)
    assert rdp_epsilon(steps, 1e-4) > epsilon(steps, 1e-4)


def test_subsampling_amplifies_and_rdp_agrees_within_its_slack() -> None:
    steps = [Steps(1.0, 0.1, 100)]
    pld = epsilon(steps, 1e-5)
    assert pld < epsilon([Steps(1.0, 1.0, 100)], 1e-5) / 5
    assert pld < rdp_epsilon(steps, 1e-5) < 1.3 * pld


@pytest.mark.parametrize(("q", "steps"), [(1.0, 8), (0.25, 40)])
def test_calibrated_noise_stays_below_the_target_and_is_tight(q: float, steps: int) -> None:
    sigma = calibrate(8.0, 1e-4, q, steps)
    assert epsilon([Steps(sigma, q, steps)], 1e-4) <= 8.0
    assert epsilon([Steps(sigma - 0.002, q, steps)], 1e-4) > 8.0


def test_affordable_steps_fit_and_one_more_does_not() -> None:
    n = accountant.affordable_steps(3.0, 1e-4, 1.0, 4.0)
    assert epsilon([Steps(4.0, 1.0, n)], 1e-4) <= 3.0 < epsilon([Steps(4.0, 1.0, n + 1)], 1e-4)
    assert accountant.affordable_steps(0.5, 1e-4, 1.0, 1.0) == 0


def test_order_and_folding_do_not_matter() -> None:
    a, b = Steps(1.0, 0.5, 3), Steps(2.0, 1.0, 4)
    assert epsilon([a, b], 1e-5) == epsilon([b, Steps(1.0, 0.5, 2), Steps(1.0, 0.5, 1)], 1e-5)


def test_no_events_cost_nothing() -> None:
    assert epsilon([], 1e-5) == 0.0


@pytest.mark.parametrize(
    "event",
    [
        Steps(0.0, 1.0, 1),
        Steps(math.nan, 1.0, 1),
        Steps(1.0, 0.0, 1),
        Steps(1.0, 1.5, 1),
        Steps(1.0, 1.0, -1),
    ],
)
def test_impossible_events_are_refused(event: Steps) -> None:
    with pytest.raises(ValueError, match="event"):
        epsilon([event], 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([Steps(1.0, 1.0, 1)], delta)
