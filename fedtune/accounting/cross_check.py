"""Compare ε by PLD, the figure that reports state, with the looser bound by Rényi DP."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version

import dp_accounting
from dp_accounting.rdp import RdpAccountant

from fedtune.core.dp.accountant import Steps, check_delta, epsilon, merge_events
from fedtune.core.errors import FedtuneError

ACCOUNTANT = f"PLD (dp-accounting {version('dp-accounting')})"


class AccountantsDisagree(FedtuneError):
    """ε by PLD exceeds the bound by RDP. One of the two is wrong, so neither may be reported."""


def rdp_epsilon(events: Iterable[Steps], delta: float) -> float:
    """Compose ε by Rényi DP (Mironov 2017): a looser bound, computed only as a cross-check.

    events: the noised steps. delta: the δ at which ε is computed.
    Errors: ValueError if δ is not between 0 and 1, or if a step samples several of a unit's rows at
    a rate below 1: for such steps no RDP bound is implemented."""
    return _rdp_epsilon(merge_events(events), delta)


@lru_cache(maxsize=4096)  # the sites of a study often have the same steps
def _rdp_epsilon(events: tuple[Steps, ...], delta: float) -> float:
    check_delta(delta)
    accountant = RdpAccountant()
    for sigma, rate, count, records in events:
        if records > 1 and rate < 1:
            raise ValueError("no RDP bound is implemented for sampling several rows of a unit")
        step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(sigma / records)
        if rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(rate, step)
        accountant.compose(step, count)
    return float(accountant.get_epsilon(delta))


def cross_check(events: Iterable[Steps], delta: float) -> float:
    """Compute PLD's ε and check that it does not exceed the looser RDP bound.

    If a step samples several rows of one unit (k > 1 with q < 1), no RDP bound is implemented, and
    PLD's ε is returned without this check; such an ε is checked by the tests, with an independent
    integral.
    Errors: AccountantsDisagree if PLD's ε exceeds the RDP bound by more than 1 % + 0.001, which
    discretisation explains."""
    folded = merge_events(events)
    pld_epsilon = epsilon(folded, delta)
    if any(event.records > 1 and event.sampling_rate < 1 for event in folded):
        return pld_epsilon
    bound = rdp_epsilon(folded, delta)
    if not pld_epsilon <= 1.01 * bound + 1e-3:
        raise AccountantsDisagree(
            f"PLD gives ε = {pld_epsilon:.6g} and RDP only {bound:.6g}",
            "PLD to give at most the ε of RDP",
            "reinstall dp-accounting at the pinned version and run the tests; release nothing",
        )
    return pld_epsilon
