"""Check, before anything is computed for a study, whether a site's budget allows its cost.

The check needs only σ, the number of steps, δ and the ledger. It reads no record and loads no base,
and the plan need not have its digests of public text yet. The site repeats the check when the plan
arrives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtune.core.config import Site, Study
from fedtune.core.dp.filter import Total
from fedtune.core.dp.plan import DpPlan
from fedtune.core.ledger.files import DATABASE
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.vault.budget import QUERIES_NAME, Budget
from fedtune.core.vault.budget_refusal import places
from fedtune.core.vault.policy import (
    compute_within_limits,
    plan_of_queries_beside,
    privacy_refusals,
)
from fedtune.homes.opening import open_ledger
from fedtune.officer.known_plans import known_plan
from fedtune.officer.review import cost_refusals, find_paying


@dataclass(frozen=True)
class Paid:
    """What a site's records have paid so far, and would have paid after one more run of a study.

    - before, after: ε of the dataset so far, and after one more run
    - ceiling: policy.max_epsilon, or the hospital's
    - again: the ε that earlier studies with this study's name have spent; 0 if there were none
    - run: the folder of the newest of these studies, "" if it is not known"""

    site: str
    before: Total
    after: Total
    ceiling: float
    again: float = 0.0
    run: str = ""

    def __str__(self) -> str:
        most = f"at most ε = {rounded_up(self.after.epsilon)} of {self.ceiling:g} with this run"
        if not self.again:
            return f"{self.site}: has paid ε = {rounded_up(self.before.epsilon)} so far; {most}"
        where = f", in {self.run}" if self.run else ""
        return (
            f"{self.site}: has paid ε = {rounded_up(self.again)} for a study of this name "
            f"already{where}; rounds of the same plan whose updates it still has are sent again "
            f"and cost nothing, and other rounds are paid again: {most}"
        )


def check_budget(study: Study, site: Site, out: Path) -> Paid | None:
    """Check the plan's figures and the dataset's budget against the site's rules, as far as they
    are known before the study starts.

    study: the study, which need not have its digests yet. site: the site with its rules and ledger.
    out: the run's folder; a resumed run has already paid for a part of the plan.
    Returns: the ε that the dataset has spent so far, and would have spent after this run. It is
    None in four cases: the site's ledger has no charge yet; the site's data is declared public or
    generated, so that a ledger of the run pays; the study is not private; or the study has no last
    round.
    Errors: Refused."""
    for refusal in privacy_refusals(study, site, None):
        raise refusal
    ledger = None
    if (site.home / DATABASE).exists() and not site.data.declared:
        ledger = open_ledger(site.home)
    study = known_plan(study, site, out)
    plan = compute_within_limits(study, site) if study.private else None
    refusals = [*privacy_refusals(study, site, plan), *cost_refusals(study, site, plan, ledger)]
    for refused in refusals:
        raise refused
    pays = find_paying(study, site, ledger) if ledger else None
    return _summarise_paid(study, site, plan, pays) if plan and pays else None


def _summarise_paid(study: Study, site: Site, plan: DpPlan, ledger: Ledger) -> Paid | None:
    """Add up what the site's dataset has paid, and would have paid after one more run of the study;
    None if it has paid nothing yet, or the study has no last round.

    - study: the study; earlier charges for a study of the same name count as its earlier runs
    - site: the site with its ceilings
    - plan: the site's part of the study
    - ledger: the ledger that pays, with the charges so far"""
    charges = ledger.charges(site.data.name)
    if not charges or study.continuous:
        return None
    name = study.study.name
    earlier = [each for each in charges if each.name.removesuffix(QUERIES_NAME) == name]
    runs, budget = places(site), Budget(site.policy, plan, charges)
    queries = plan_of_queries_beside(study, site)
    return Paid(
        site=site.site.name,
        before=budget.total(ahead=0),
        after=budget.total(plan.steps, queries.events(queries.steps) if queries else ()),
        ceiling=site.policy.ceiling,
        again=Budget(site.policy, plan, earlier).total(ahead=0).epsilon,
        run=next((runs.get(charge.study, "") for charge in reversed(earlier)), ""),
    )
