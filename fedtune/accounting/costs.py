"""Compute what a study costs before it runs, as data (`fedtune plan`)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.accounting.query_noise import forecast
from fedtune.accounting.rounds import with_rounds
from fedtune.core.config import Site, Study, validate_study
from fedtune.core.dp import accountant
from fedtune.core.dp.accountant import Steps
from fedtune.core.dp.plan import DpPlan, plan_for_site
from fedtune.core.dp.query import query_plan
from fedtune.core.dp.shared_noise import FINEST, LARGEST, WORDS, bits_of
from fedtune.core.errors import ConfigError
from fedtune.core.objectives import describe
from fedtune.core.registry.rounding import rounded_up
from fedtune.report.claim import assumption, best_guess


@dataclass(frozen=True)
class SitePlan:
    """The rounds, steps and noise of one site, and their ε.

    - rounds, steps: the numbers of rounds and of noised steps of the whole study
    - sampling_rate: q, the probability with which a unit (or each record, if records are drawn) is
      in a step
    - batch: the expected number of rows in a step, by which the sum of their gradients is divided:
      q · declared size and, if records are drawn, times the most records of a unit
    - noise_multiplier: σ, the noise's standard deviation as a multiple of the clipping norm
    - risk: the highest accuracy with which an attacker who knows all other records guesses a unit's
      presence
    - own_noise_multiplier: with [secure_aggregation], the σ that this site adds itself
    - fallback_epsilon: with [secure_aggregation], the ε that this site's own noise alone gives. A
      study without [secure_aggregation] whose updates have as noisy a mean costs this ε too.

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
    own_noise_multiplier: float | None = None
    fallback_epsilon: float | None = None


@dataclass(frozen=True)
class Plan:
    """The cost of a study at some sites.

    - unit: the unit that ε protects
    - objective: the objective, described in words
    - sites: a SitePlan for each site

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
        """Return the sites' figures as columns: for each field of SitePlan, its values at all
        sites. A DataFrame can be built from this dict."""
        rows = [asdict(site) for site in self.sites]
        return {name: [row[name] for row in rows] for name in SitePlan.__dataclass_fields__}


def query_lines(study: Study, sites: int) -> list[str]:
    """Describe what a plan's private evaluation costs and how exact it is: one line with its ε and
    the noise in its answer, both computed from public numbers; [] if the plan has no private
    evaluation. sites: how many sites answer.

    Errors: ConfigError if the study is not private."""
    table = study.private_evaluation
    if table is None:
        return []
    study = with_rounds(study)
    rounds = ", ".join(map(str, study.queries))
    at = f"at each of {sites} sites" if sites > 1 else "at one site"
    apart, axes = ", ".join(study.query_axes), 1 + len(study.query_axes)
    told = f" for all together, and one for each class or group of {apart}" if apart else ""
    by_size = [
        f"{units}: {'no answer, lost in the noise' if spread is None else f'± {spread:.2g}'}"
        for units, spread in forecast(table.noise_multiplier, sites, axes).items()
    ]
    return [
        f"private evaluation after round {rounds}: ε = {rounded_up(query_plan(study).epsilon)} on "
        f"the held-out {study.unit}s. The answer is a probability{told}. The noise in it (two "
        f"standard deviations, at most) depends on the number of held-out {study.unit}s {at}: "
        f"{'; '.join(by_size)}."
    ]


def plan(study: Study, sites: Iterable[Site | int]) -> Plan:
    """Compute what a study costs before it runs: σ, ε and rounds for sites of given sizes.

    Args:
        sites: the sites' settings, or their declared sizes alone. No record is read.

    >>> import fedtune
    >>> study_file, site_file = fedtune.init("my-study")
    >>> costs = fedtune.plan(fedtune.load_study(study_file), [fedtune.load_site(site_file)])
    >>> costs.sites[0].site
    'my-hospital'

    Errors: ConfigError if the study is not private, or no number of rounds and no σ fit its
    budget."""
    study = validate_study(study)
    named = [
        ("any", site) if isinstance(site, int) else (site.site.name, site.site.declared_size)
        for site in sites
    ]
    costs = tuple(_of_site(plan_for_site(study, size), name, size) for name, size in named)
    return Plan(study.study.name, study.unit, describe(study.objective), costs)


def _of_site(site_plan: DpPlan, name: str, size: int) -> SitePlan:
    shared = site_plan.sites > 1
    return SitePlan(
        name,
        size,
        rounds=site_plan.rounds,
        steps=site_plan.steps,
        sampling_rate=site_plan.sampling_rate,
        batch=site_plan.divisor,
        noise_multiplier=site_plan.noise_multiplier,
        epsilon=site_plan.epsilon,
        delta=site_plan.delta,
        risk=best_guess(privacy_of(site_plan)),
        own_noise_multiplier=site_plan.own_noise if shared else None,
        fallback_epsilon=site_plan.fallback_epsilon if shared else None,
    )


def privacy_of(site_plan: DpPlan) -> dict[str, float]:
    """Return what a study costs one site, under the names that a report's "privacy" has and
    `claim.best_guess` reads."""
    return {
        "epsilon": site_plan.epsilon,
        "delta": site_plan.delta,
        "sampling_rate": site_plan.sampling_rate,
        "noise_multiplier": site_plan.noise_multiplier,
        "steps": site_plan.steps,
        "records_per_unit": site_plan.records,
    }


def shared_lines(study: Study, sizes: Sequence[int]) -> list[str]:
    """Describe in lines of text what [secure_aggregation] does for a study at sites of these
    declared sizes. The lines give the assumption under which the study's ε holds; the fallback ε,
    which always holds, and which is also the ε at which the study would learn as much without
    [secure_aggregation]; both ε after one and two failed attempts; advice to try ε = 1, where it
    applies; the ε of a patient of two sites; and the number of bits of each number that a site
    sends. Return [] for a study without [secure_aggregation] or without privacy.

    Errors: ConfigError if no number of rounds and no σ fit the study's budget."""
    if study.secure_aggregation is None or not study.private:
        return []
    of_site = plan_for_site(study, max(sizes))
    n, t = of_site.sites, of_site.colluding
    claimed, whatever = rounded_up(of_site.epsilon), rounded_up(of_site.fallback_epsilon)
    return [
        f"secure aggregation: ε = {claimed} holds if {assumption(n, t)}: a sum that anybody opens "
        f"then has the noise of {n - t} honest sites.",
        f"Whatever happens, ε = {whatever} holds: by the noise that each site adds itself, "
        f"σ = {of_site.own_noise:.4g}.",
        _attempts(of_site),
        f"The study learns as if ε = {whatever} without secure aggregation, where each of {n} "
        "equal sites adds all the noise of its ε.",
        *_at_one(study, of_site, max(sizes)),
        f"A patient of two of the sites has ε = {rounded_up(_of_two(of_site, shared=True))} (if "
        "each site adds noise of this σ itself: "
        f"{rounded_up(_of_two(of_site, shared=False))}): the records at both sites change one sum, "
        "to which noise is added once.",
        _words(study, of_site, sizes),
    ]


def _at_one(study: Study, of_site: DpPlan, size: int) -> list[str]:
    """Return a list of one line that suggests trying ε = 1. Return [] if the plan's ε is at most 1
    already, if the study does not give its number of rounds, or if no σ gives ε = 1.

    - of_site: the study's plan at one site
    - size: the site's declared size"""
    if of_site.epsilon <= 1 or study.training.rounds is None:
        return []
    try:
        first = plan_for_site(
            study.changed(privacy={"epsilon": 1.0, "noise_multiplier": None}), size
        )
    except (ConfigError, ValueError):
        return []
    whatever = rounded_up(first.fallback_epsilon)
    return [
        f"Try ε = 1 first (--set privacy.epsilon=1): with noise shared by {first.sites} sites, the "
        f"study learns as if ε = {whatever}, and whatever happens, ε is at most {whatever}."
    ]


def _attempts(of_site: DpPlan) -> str:
    """Describe in one text how ε grows if attempts at a round fail, since each attempt is paid for.
    The text has two figures for one failed attempt and two for two: the ε that holds if few enough
    sites collude, and the fallback ε, which always holds.

    of_site: the study's plan at one site."""
    costs = []
    for more in (1, 2):
        steps = of_site.steps + more * of_site.local_steps
        claimed = accountant.epsilon(of_site.events(steps), of_site.delta)
        whatever = accountant.epsilon(of_site.fallback_events(steps), of_site.delta)
        costs.append(f"ε = {rounded_up(claimed)} and {rounded_up(whatever)} whatever happens")
    return (
        "An attempt at a round fails if a site restarts between its two messages, leaves, or is "
        "not heard; the next attempt is drawn and paid for anew. "
        f"With one such attempt {costs[0]}; with two {costs[1]}."
    )


def _of_two(of_site: DpPlan, *, shared: bool) -> float:
    """Compute the ε of a unit that has records at two sites.

    - of_site: the study's plan at one site
    - shared: True if the sites share the noise of one sum: the unit then has twice the rows in this
      sum, and each row is drawn independently. False if each site adds noise of the full σ: the
      mechanism then runs twice on the unit."""
    (steps,) = of_site.events(of_site.steps)
    twice: Steps = (
        steps._replace(records=2 * steps.records)
        if shared
        else steps._replace(steps=2 * steps.steps)
    )
    return accountant.epsilon([twice], of_site.delta)


def _words(study: Study, of_site: DpPlan, sizes: Sequence[int]) -> str:
    listed = [*sizes, *[max(sizes)] * (of_site.sites - len(sizes))]
    most = most_numbers(study, of_site.noise_multiplier, listed)
    narrow, wide = WORDS
    words = f"words of {wide} bits"
    if most:
        words = f"words of {narrow} bits for an adapter of up to {most:,} numbers, else of {wide}"
    return (
        f"A site sends each number of its update in {words} (for declared sizes of "
        f"{', '.join(f'{size:,}' for size in listed[:6])}"
        f"{', …' if len(listed) > 6 else ''}), on a grid of at most 2^-{FINEST} of its own noise."
    )


def most_numbers(study: Study, sigma: float | None, sizes: Sequence[int]) -> int:
    """Return the largest number of adapter parameters at which a site can send each masked number
    in a word of the smaller of the two sizes (WORDS), so that the sum over all sites fits into such
    a word. Return 0 if it fits for no number. With more parameters the grid must be finer, and so
    the word larger.

    - sigma: σ of the sum that is opened; None if privacy is off
    - sizes: the sites' declared sizes"""
    numbers = range(1, LARGEST)
    return bisect_right(numbers, WORDS[0], key=lambda d: bits_of(study, sigma, sizes, d))
