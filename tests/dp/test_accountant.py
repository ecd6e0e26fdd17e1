import math
import time
from collections.abc import Callable

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.optimize import brentq
from scipy.stats import binom, norm

from fedtune.accounting import cross_check as cross_check_module
from fedtune.accounting.cross_check import AccountantsDisagree, cross_check, rdp_epsilon
from fedtune.core.dp import accountant
from fedtune.core.dp.accountant import Steps, affordable_steps, calibrate, epsilon


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
    assert exact <= ours <= exact * (1 + 1e-6)


def test_gaussians_of_several_lengths_are_one() -> None:
    parts = [Steps(2.0, 1.0, 3), Steps(5.0, 1.0, 7), Steps(8.0, 1.0, 2, 4)]
    mu = math.sqrt(3 / 4 + 7 / 25 + 2 * 16 / 64)
    exact = gaussian_epsilon(1 / mu, 1, 1e-5)
    assert exact <= epsilon(parts, 1e-5) <= exact * (1 + 1e-6)


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(1e-3, 1000, 1e-9), (4.0, 10, 1e-200)])
def test_the_closed_form_has_no_end(sigma: float, steps: int, delta: float) -> None:
    """Where a grid would need more points than there is memory."""
    found = epsilon([Steps(sigma, 1.0, steps)], delta)
    assert 0 < found <= rdp_epsilon([Steps(sigma, 1.0, steps)], delta) * 1.01
    assert epsilon([Steps(1e3, 1.0, 1)], 1e-2) == 0.0


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


@pytest.mark.parametrize(
    ("target", "q", "steps", "k"),
    # Where rows are sampled, a target that few points of a grid are needed for.
    [(8.0, 1.0, 8, 1), (1.0, 0.25, 40, 1), (8.0, 1.0, 8, 4), (4.0, 0.1, 9, 4)],
)
def test_calibrated_noise_stays_below_the_target_and_is_tight(
    target: float, q: float, steps: int, k: int
) -> None:
    sigma = calibrate(target, 1e-4, q, steps, k)
    assert epsilon([Steps(sigma, q, steps, k)], 1e-4) <= target
    assert epsilon([Steps(sigma - 0.002, q, steps, k)], 1e-4) > target


def test_affordable_steps_fit_and_one_more_does_not() -> None:
    n = accountant.affordable_steps(3.0, 1e-4, 1.0, 4.0)
    assert epsilon([Steps(4.0, 1.0, n)], 1e-4) <= 3.0 < epsilon([Steps(4.0, 1.0, n + 1)], 1e-4)
    assert accountant.affordable_steps(0.5, 1e-4, 1.0, 1.0) == 0


def test_affordable_steps_of_several_rows() -> None:
    n = affordable_steps(8.0, 1e-4, 0.1, 4.0, records=4)
    fits, not_ = Steps(4.0, 0.1, n, 4), Steps(4.0, 0.1, n + 1, 4)
    assert epsilon([fits], 1e-4) <= 8.0 < epsilon([not_], 1e-4)
    assert n < affordable_steps(8.0, 1e-4, 0.1, 4.0) / 4


Shape = Callable[[int, float], float]
SHAPES: dict[str, Shape] = {  # costs that fall with n and meet 1 at about x
    "a power": lambda n, x: (x / n) ** 2,
    "a cliff": lambda n, x: 2.0 if n < x else 0.0,
    "nothing, from some n on": lambda n, x: max(0.0, 2 * (x / n - 0.5)),
    "infinite, before some n": lambda n, x: math.inf if n < x / 2 else x / n,
    "nearly flat": lambda n, x: 1 + 1e-9 * (x - n),
    "exponential": lambda n, x: math.exp(min(x / n - 1, 700)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [-1.0, 0.5])
@pytest.mark.parametrize("most", [1, 3, 1000, 10**8])
def test_a_search_finds_the_first_whatever_the_shape(shape: str, power: float, most: int) -> None:
    for x in (0.3, 1.0, 2.5, 999.5, 12345.6, 0.9e8):
        for start in (x / 20, x, x * 20):

            def cost(n: int, x: float = x) -> float:
                falling = SHAPES[shape](n, x)
                return falling if power < 0 else (1 / falling if falling else math.inf)

            def found(n: int, cost: Callable[[int], float] = cost) -> bool:
                return (cost(n) <= 1.0) == (power < 0)

            first = accountant._first(cost, 1.0, start, most, power)
            if first is None:
                assert not found(most)
            else:
                assert 1 <= first <= most
                assert found(first)
                assert first == 1 or not found(first - 1)


@pytest.mark.parametrize(("q", "steps"), [(1.0, 1), (1.0, 20), (0.2, 100), (0.01, 600)])
def test_calibration_computes_few_epsilons(
    monkeypatch: pytest.MonkeyPatch, q: float, steps: int
) -> None:
    """Each takes up to a second; bisection took 11 to 19."""
    computed = list[float]()

    def epsilon(events: list[Steps], delta: float) -> float:
        computed.append(events[0].noise_multiplier)
        return rdp_epsilon(events, delta)  # of the same shape, and quicker

    monkeypatch.setattr(accountant, "epsilon", epsilon)
    for target in (0.5, 3.0, 8.0):
        computed.clear()
        calibrate(target, 1e-4, q, steps)
        assert len(computed) <= 8


def test_order_and_folding_do_not_matter() -> None:
    a, b = Steps(1.0, 0.5, 3), Steps(2.0, 1.0, 4)
    assert epsilon([a, b], 1e-5) == epsilon([b, Steps(1.0, 0.5, 2), Steps(1.0, 0.5, 1)], 1e-5)


def test_folding_keeps_different_records_apart() -> None:
    """Twin of the fold: forgetting k would give the price of one row per unit."""
    one, four = Steps(4.0, 0.1, 10), Steps(4.0, 0.1, 10, 4)
    both = epsilon([one, four], 1e-5)
    assert both >= epsilon([four], 1e-5) > 1.5 * epsilon([one._replace(steps=20)], 1e-5)
    assert both == epsilon([four._replace(steps=5), one, four._replace(steps=5)], 1e-5)


@pytest.mark.parametrize("k", [2, 7])
def test_full_batch_of_k_rows_is_a_gaussian_with_k_times_the_sensitivity(k: int) -> None:
    exact = gaussian_epsilon(9.0 / k, 5, 1e-5)
    assert exact - 1e-6 <= epsilon([Steps(9.0, 1.0, 5, k)], 1e-5) <= exact * 1.01


def library(event: dp_accounting.DpEvent, delta: float, interval: float = 1e-4) -> float:
    accountant = PLDAccountant(value_discretization_interval=interval)
    return float(accountant.compose(event).get_epsilon(delta))


def test_it_is_the_library_s_number_for_the_library_s_events() -> None:
    sampled = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    mixture = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
        3.0, range(5), binom.pmf(range(5), 4, 0.2)
    )
    events = [Steps(1.0, 0.1, 20), Steps(3.0, 0.2, 10, 4)]
    composed = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(sampled, 20),
            dp_accounting.SelfComposedDpEvent(mixture, 10),
        ]
    )
    assert epsilon(events[:1], 1e-5) == pytest.approx(
        library(dp_accounting.SelfComposedDpEvent(sampled, 20), 1e-5), rel=1e-9
    )
    fine = library(composed, 1e-5, interval=1e-3)
    assert fine <= epsilon(events, 1e-5) <= fine * 1.002  # our grid is coarser here: never below


@pytest.mark.parametrize(("sigma", "q", "k"), [(1.5, 0.02, 64), (20.0, 0.1, 64), (40.0, 0.5, 64)])
def test_many_rows_take_seconds(sigma: float, q: float, k: int) -> None:
    start = time.process_time()
    fewer, more = (epsilon([Steps(sigma, q, 20, rows)], 1e-5) for rows in (k - 8, k))
    assert time.process_time() - start < 20
    assert fewer < more < math.inf


def test_rdp_confirms_what_it_can() -> None:
    events = [Steps(1.0, 0.1, 100), Steps(9.0, 1.0, 5, 3)]
    assert cross_check(events, 1e-5) == epsilon(events, 1e-5)
    assert cross_check([], 1e-5) == 0.0


@pytest.mark.parametrize("events", [[Steps(1.0, 0.1, 100)], [Steps(6.0, 1.0, 20, 4)]])
def test_an_accountant_that_is_wrong_is_stopped(
    monkeypatch: pytest.MonkeyPatch, events: list[Steps]
) -> None:
    real = rdp_epsilon(events, 1e-5)
    monkeypatch.setattr(cross_check_module, "rdp_epsilon", lambda *_: real * 0.8)
    with pytest.raises(AccountantsDisagree, match="RDP only"):
        cross_check(events, 1e-5)
    monkeypatch.setattr(cross_check_module, "rdp_epsilon", lambda *_: real)
    monkeypatch.setattr(cross_check_module, "epsilon", lambda *_: math.nan)
    with pytest.raises(AccountantsDisagree):
        cross_check(events, 1e-5)


def test_rdp_of_sampled_rows_is_not_defined_and_the_cross_check_says_so_by_passing_it_on() -> None:
    event = Steps(4.0, 0.1, 10, 4)
    with pytest.raises(ValueError, match="no RDP bound"):
        rdp_epsilon([event], 1e-5)
    assert cross_check([event], 1e-5) == epsilon([event], 1e-5)


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
        Steps(-1.0, 1.0, 1),
        Steps(math.inf, 1.0, 1),
        Steps(1.0, math.nan, 1),
        Steps(1.0, -0.1, 1),
        Steps(True, 1.0, 1),
        Steps(1.0, True, 1),
        Steps("1.0", 1.0, 1),  # type: ignore[arg-type]
        Steps(1.0, 1.0, 1.0),  # type: ignore[arg-type]
        Steps(1.0, 1.0, True),
        Steps(1.0, 1.0, math.nan),  # type: ignore[arg-type]
        Steps(1.0, 1.0, 1, 0),
        Steps(1.0, 1.0, 1, -2),
        Steps(1.0, 1.0, 1, 2.0),  # type: ignore[arg-type]
        Steps(1.0, 1.0, 1, True),
        (1.0, 1.0, 1, 1),
        None,
        "Gaussian",
        dp_accounting.GaussianDpEvent(1.0),
        dp_accounting.LaplaceDpEvent(1.0),
        dp_accounting.NonPrivateDpEvent(),
    ],
)
def test_unknown_mechanisms_and_impossible_events_are_refused(event: Steps) -> None:
    for ask in (epsilon, rdp_epsilon, cross_check):
        with pytest.raises(ValueError, match="event"):
            ask([event], 1e-5)
        with pytest.raises(ValueError, match="event"):  # hidden among good ones, and of no steps
            ask([Steps(1.0, 1.0, 1), event], 1e-5)


@pytest.mark.parametrize(
    "event", [Steps(1, 1, 1), Steps(1.0, 1.0, 1, 1), Steps(np.float64(1), 1, 1)]
)
def test_what_is_possible_is_not_refused(event: Steps) -> None:
    """Twin of the refusals: the same event, well formed, has its ε."""
    assert epsilon([event], 1e-5) == epsilon([Steps(1.0, 1.0, 1)], 1e-5) > 0
    assert epsilon([event._replace(steps=0)], 1e-5) == 0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([Steps(1.0, 1.0, 1)], delta)
