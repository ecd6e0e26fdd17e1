"""Who holds the coordinator and t sites gets the ε that is charged and no more; one site more, and
the assumption is seen to be real; with all of them, the fallback still holds."""

from __future__ import annotations

import pytest

from fedtune.audit.bounds import gaussian_epsilon
from fedtune.audit.gaussian import CEILING
from fedtune.core.dp import plan as plan_module
from fedtune.core.dp import shared_noise
from tests import chance
from tests.secagg.collusion import Audit, audits, plan_of

# μ of the sum of a plan's three sites, of which one may collude: with that one held, with two, with
# none, and where each adds σ/√3. What is asked of each is told at this many trials.
MU = 1 / plan_of(3, 1).noise_multiplier
TWO, NONE, AMONG_ALL = MU * 2**0.5, MU * (2 / 3) ** 0.5, MU * 1.5**0.5


def mu_at(share: float, mu: float) -> float:
    """The μ of a share of the ε of μ."""
    delta = plan_of(3, 1).delta
    return chance.mu_at(share * gaussian_epsilon(mu, delta), delta)


TRIALS = max(
    chance.audit_for(MU, chance.errors_of(TWO), chance.errors_of(AMONG_ALL), reach=mu_at(0.8, MU)),
    chance.audit_for(TWO, reach=mu_at(0.8, TWO)),
)


@pytest.fixture(scope="module")
def three() -> list[Audit]:
    """Of three sites, of which one may collude: with none, one and two of them held."""
    return audits(plan_of(3, 1), range(3), TRIALS)


def holds_and_is_tight(found: Audit) -> None:
    assert found.claimed >= 3
    assert 0.8 * found.claimed <= found.audited
    assert found.ceiling <= found.claimed


def test_with_t_sites_the_claim_holds_and_is_tight(three: list[Audit]) -> None:
    holds_and_is_tight(three[1])


def test_with_two_of_five_the_claim_holds_and_is_tight() -> None:
    (found,) = audits(plan_of(5, 2), [2], TRIALS)
    holds_and_is_tight(found)


def test_one_site_more_and_the_claim_is_broken_but_not_the_fallback(three: list[Audit]) -> None:
    """Two of three: all others."""
    found = three[2]
    assert found.ceiling > found.claimed
    assert 0.8 * found.fallback <= found.audited
    assert found.ceiling <= found.fallback


def test_without_colluders_there_is_more_noise_than_charged(three: list[Audit]) -> None:
    level, errors = mu_at(0.9, MU), chance.errors_of(NONE)
    assert chance.shows(level, errors, TRIALS, CEILING) <= chance.FALSE_ALARM
    assert three[0].ceiling < 0.9 * three[0].claimed


def test_a_masked_message_alone_tells_nothing() -> None:
    """Enough trials to see a site's own noised sum, were it not masked."""
    trials = chance.audit_for(0.0, chance.errors_of(TWO))
    (found,) = audits(plan_of(3, 1), [0], trials, opens=False)
    assert found.ceiling == 0.0


def test_the_twin_that_shares_among_all_sites_is_caught(
    three: list[Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ/√n: each site counts on the noise of those that collude."""
    honest = shared_noise.own_sigma
    shared = property(lambda plan: honest(plan.noise_multiplier, plan.sites))
    monkeypatch.setattr(plan_module.DpPlan, "own_noise", shared)
    (found,) = audits(plan_of(3, 1), [1], TRIALS)
    assert found.ceiling > three[1].claimed
