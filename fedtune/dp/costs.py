"""Compute what a study costs before it runs: `fedtune plan`, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.config import Site, Study, checked
from fedtune.dp.calibration import with_rounds
from fedtune.dp.plan import plan_for_site
from fedtune.dp.query import query_plan
from fedtune.dp.query_noise import forecast
from fedtune.objectives import describe
from fedtune.report.claim import best_guess, rounded_up


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


def query_lines(study: Study, sites: int) -> list[str]:
    """Say, a line each, what a plan's private evaluation costs and how much of its answer is noise
    with so many sites, from public numbers; [] without one.

    Errors: ConfigError where the study is not private."""
    table = study.private_evaluation
    if table is None:
        return []
    study = with_rounds(study)
    rounds = ", ".join(map(str, study.queries))
    at = f"at each of {sites} sites" if sites > 1 else "at one site"
    by_size = [
        f"{units}: {'no answer, lost in the noise' if spread is None else f'± {spread:.2g}'}"
        for units, spread in forecast(table.noise_multiplier, sites).items()
    ]
    return [
        f"private evaluation after round {rounds}: ε = {rounded_up(query_plan(study).epsilon)} on "
        f"the held-out {study.unit}s. The answer is a probability; its noise is at most (2 sd), "
        f"by held-out {study.unit}s {at}: {'; '.join(by_size)}."
    ]


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
