"""Who holds the coordinator and t sites gets the ε that is charged and no more; one site more, and
the assumption is seen to be real; with all of them, the fallback still holds."""

from __future__ import annotations

import pytest

from fedtune.dp import plan as plan_module
from fedtune.dp import shared_noise
from tests.secagg.collusion import audit, plan_of


@pytest.mark.parametrize(
    ("sites", "colluding"), [(3, 1), pytest.param(5, 2, marks=pytest.mark.long)]
)
def test_with_t_sites_the_claim_holds_and_is_tight(sites: int, colluding: int) -> None:
    """As for one step alone: 4.65 standard deviations to a false alarm, more to weakness."""
    found = audit(plan_of(sites, colluding), colluding)
    assert found.claimed >= 3
    assert 0.8 * found.claimed <= found.audited
    assert found.ceiling <= found.claimed


def test_one_site_more_and_the_claim_is_broken_but_not_the_fallback() -> None:
    """Two of three: all others. 7 standard deviations above the claim."""
    found = audit(plan_of(3, 1), held=2)
    assert found.ceiling > found.claimed
    assert 0.8 * found.fallback <= found.audited
    assert found.ceiling <= found.fallback


def test_without_colluders_there_is_more_noise_than_charged() -> None:
    found = audit(plan_of(3, 1), held=0, trials=4_000)
    assert found.ceiling < 0.9 * found.claimed


def test_a_masked_message_alone_tells_nothing() -> None:
    found = audit(plan_of(3, 1), held=0, trials=2_000, opens=False)
    assert found.ceiling == 0.0


def test_the_twin_that_shares_among_all_sites_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """σ/√n: each site counts on the noise of those that collude."""
    honest = shared_noise.own_sigma
    shared = property(lambda plan: honest(plan.noise_multiplier, plan.sites))
    claimed = audit(plan_of(3, 1), 0, trials=10).claimed
    monkeypatch.setattr(plan_module.DpPlan, "own_noise", shared)
    found = audit(plan_of(3, 1), held=1)
    assert found.ceiling > claimed
