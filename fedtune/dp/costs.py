"""Compute what a study costs before it runs: `fedtune plan`, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.config import Site, Study, checked
from fedtune.dp.plan import plan_for_site
from fedtune.objectives import describe
from fedtune.report.claim import best_guess


@dataclass(frozen=True)
class SitePlan:
    """One site's rounds, steps and noise, and their ε.

    sampling_rate: q; batch: the expected batch, q · declared size; noise_multiplier: σ; risk: the
    highest accuracy with which an attacker who knows all other records guesses a unit's presence.

    >>> import fedtune
    >>> study_file, site_file = fedtune.init("my-study")
    >>> (north,) = fedtune.plan(fedtune.load_study(study_file), [200]).sites
    >>> north.declared_size, north.epsilon < 8.0
    (200, True)
    """

    site: str
    declared_size: int
    rounds: int
    steps: int
    sampling_rate: float
    batch: float
    noise_multiplier: float
    epsilon: float
    delta: float
    risk: float


@dataclass(frozen=True)
class Plan:
    """A study's cost at each of some sites. unit: whom ε protects; objective: in words.

    >>> import fedtune
    >>> study_file, site_file = fedtune.init("my-study")
    >>> fedtune.plan(fedtune.load_study(study_file), [200, 400]).columns()["declared_size"]
    [200, 400]
    """

    study: str
    unit: str
    objective: str
    sites: tuple[SitePlan, ...]

    def columns(self) -> dict[str, list[Any]]:
        """Return the sites as columns of equal length, as a DataFrame takes them."""
        rows = [asdict(site) for site in self.sites]
        return {name: [row[name] for row in rows] for name in SitePlan.__dataclass_fields__}


def plan(study: Study, sites: Iterable[Site | int]) -> Plan:
    """Compute what a study costs before it runs: σ, ε and rounds for sites of given sizes.

    Args:
        sites: sites, or declared sizes alone. No record is read.

    >>> import fedtune
    >>> study_file, site_file = fedtune.init("my-study")
    >>> costs = fedtune.plan(fedtune.load_study(study_file), [fedtune.load_site(site_file)])
    >>> costs.sites[0].site
    'my-hospital'

    Errors: ConfigError where the study is not private, or nothing fits its budget."""
    study = checked(study)
    named = [
        ("any", site) if isinstance(site, int) else (site.site.name, site.site.declared_size)
        for site in sites
    ]
    costs = tuple(_of_site(study, name, size) for name, size in named)
    return Plan(study.study.name, study.unit, describe(study.objective), costs)


def _of_site(study: Study, name: str, size: int) -> SitePlan:
    site_plan = plan_for_site(study, size)
    facts: dict[str, Any] = {
        "epsilon": site_plan.epsilon,
        "delta": site_plan.delta,
        "sampling_rate": site_plan.sampling_rate,
        "noise_multiplier": site_plan.noise_multiplier,
        "steps": site_plan.steps,
    }
    risk = best_guess(facts)
    return SitePlan(
        name, size, rounds=site_plan.rounds, batch=site_plan.divisor, risk=risk, **facts
    )
