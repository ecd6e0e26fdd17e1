"""Who holds the coordinator and t sites gets the ε that is charged and no more; one site more, and
the assumption is seen to be real; with all of them, the fallback still holds."""

from __future__ import annotations

import pytest

from fedtune.dp import plan as plan_module
from fedtune.dp import shared_noise
from tests.secagg.collusion import Audit, audits, plan_of


@pytest.fixture(scope="module")
def three() -> list[Audit]:
    """Of three sites, of which one may collude: with none, one and two of them held."""
    return audits(plan_of(3, 1), range(3))


def holds_and_is_tight(found: Audit) -> None:
    """As for one step alone: 4.65 standard deviations to a false alarm, more to weakness."""
    assert found.claimed >= 3
    assert 0.8 * found.claimed <= found.audited
    assert found.ceiling <= found.claimed


def test_with_t_sites_the_claim_holds_and_is_tight(three: list[Audit]) -> None:
    holds_and_is_tight(three[1])


@pytest.mark.long
def test_with_two_of_five_the_claim_holds_and_is_tight() -> None:
    (found,) = audits(plan_of(5, 2), [2])
    holds_and_is_tight(found)


def test_one_site_more_and_the_claim_is_broken_but_not_the_fallback(three: list[Audit]) -> None:
    """Two of three: all others. 7 standard deviations above the claim."""
    found = three[2]
    assert found.ceiling > found.claimed
    assert 0.8 * found.fallback <= found.audited
    assert found.ceiling <= found.fallback


def test_without_colluders_there_is_more_noise_than_charged(three: list[Audit]) -> None:
    assert three[0].ceiling < 0.9 * three[0].claimed


def test_a_masked_message_alone_tells_nothing() -> None:
    (found,) = audits(plan_of(3, 1), [0], trials=2_000, opens=False)
    assert found.ceiling == 0.0


def test_the_twin_that_shares_among_all_sites_is_caught(
    three: list[Audit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ/√n: each site counts on the noise of those that collude."""
    honest = shared_noise.own_sigma
    shared = property(lambda plan: honest(plan.noise_multiplier, plan.sites))
    monkeypatch.setattr(plan_module.DpPlan, "own_noise", shared)
    (found,) = audits(plan_of(3, 1), [1])
    assert found.ceiling > three[1].claimed
