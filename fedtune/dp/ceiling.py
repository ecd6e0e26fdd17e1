"""What a dataset has spent in total, when studies are chosen after earlier results were seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fedtune.dp import accountant
from fedtune.dp.accountant import Steps


class Total(NamedTuple):
    epsilon: float
    how: str


def total_epsilon(events: Sequence[Steps], order: float, delta: float) -> Total:
    """ε of everything in `events`, which may have been chosen adaptively; stated at 2 · `delta`.

    One kind of step (σ, q, k), however often: composed exactly (PLD) at `delta`, since stopping a
    fixed composition early is post-processing. Several kinds: a Rényi filter at the one `order`
    that was fixed with the dataset's first charge, at `delta`. Which of the two applies may itself
    depend on results; the events of the two cases are disjoint, so their δ add: hence 2 · `delta`.

    | no events                        | 0 |
    | a study without privacy (σ = 0)  | infinity |
    Guarantee: while this stays below a ceiling E at every charge, all that was released is
    (E, 2 · delta)-DP, whatever the choice of studies depended on.
    Reference: Feldman & Zrnic 2021, "Individual privacy accounting via a Rényi filter", section 4;
    Rogers et al. 2016 for filters."""
    if any(event.noise_multiplier == 0 for event in events):
        return Total(math.inf, "a study without privacy")
    if len({event._replace(steps=0) for event in events}) <= 1:
        return Total(accountant.epsilon(events, delta), "PLD")
    from fedtune.dp.filter import filtered_epsilon

    return Total(filtered_epsilon(events, order, delta), f"Rényi filter, order {order:g}")
