"""Compose a preset's settings for noise that all sites share, for `fedtune init --colluding`
(docs/secure-aggregation.md).

Each site adds noise of σ/√(n - t) in place of σ, so the study's ε holds if at most t of the n sites
collude with the coordinator. A larger ε, the fallback ε, holds however many collude, and the sites'
budgets must have room for it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedtune.core.dp import shared_noise
from fedtune.core.dp.accountant import Steps, calibrate, epsilon
from fedtune.core.errors import ConfigError
from fedtune.presets._sites import MAX_EPSILON

if TYPE_CHECKING:
    from fedtune.presets import Records

TENTHS = 10  # ε is chosen among 0.1, 0.2, 0.3 …


def check(records: Records) -> None:
    """If the noise is to be shared, check that the study has enough sites for this, and that the
    files are not those of a single site: only the coordinator decides how the noise is made.
    Errors: ConfigError."""
    t = records.colluding
    if t is None:
        return
    if records.role == "site":
        raise ConfigError(
            "--colluding is for the coordinator, who decides how the noise is made",
            "no --colluding",
        )
    if records.sites - t < 2:
        raise ConfigError(
            f"--colluding {t}: at least two sites must be left that do not collude, and the study "
            f"has {records.sites}",
            f"at least {t + 2} sites",
            "--data for each site, or --sites N",
        )


def largest_epsilon(records: Records, most: float) -> float:
    """Return the largest ε of a study, at most `most` and a multiple of 0.1, whose round fits the
    sites' budget twice, since a round that fails is repeated. What counts for the budget is the
    fallback ε of both attempts together."""
    assert records.colluding is not None
    shares = records.sites - records.colluding
    least, above = 1, math.floor(most * TENTHS) + 1
    while above - least > 1:
        tried = (least + above) // 2
        sigma = calibrate(tried / TENTHS, records.delta, 1.0, 1)
        own = shared_noise.own_sigma(sigma, shares)
        fits = epsilon([Steps(own, 1.0, 2, 1)], records.delta) <= MAX_EPSILON
        least, above = (tried, above) if fits else (least, tried)
    return least / TENTHS


def table(records: Records) -> str:
    """Compose the table [secure_aggregation] of study.toml; "" if `records.colluding` is None, that
    is, if each site adds noise of its own. records: what the user gave to `fedtune init`."""
    if records.colluding is None:
        return ""
    head = "[secure_aggregation]".ljust(36)
    line = f"colluding = {records.colluding}".ljust(36)
    return (
        f"{head} # all sites share the noise, and only their sum is opened\n"
        f"{line} # if more collude with the coordinator, a larger ε holds\n\n"
    )
