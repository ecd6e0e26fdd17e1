"""The site's rules about a plan. Deny by default; checked before any record is read.

A refusal names the rule and public values only, so the coordinator may see it."""

from __future__ import annotations

from fedtune.config import Site, Study
from fedtune.dp import accountant
from fedtune.dp.plan import DpPlan
from fedtune.dp.steplog import StepLog, events
from fedtune.errors import BudgetExceeded, PolicyRefused


def admit(study: Study, site: Site, plan: DpPlan | None, log: StepLog) -> None:
    """Return if the site admits the plan, else raise. `plan` is None where privacy = "off".

    Errors: PolicyRefused naming the rule; BudgetExceeded."""
    policy, objective = site.policy, study.objective.name
    if objective not in policy.objectives:
        raise PolicyRefused(f"policy.objectives does not list {objective!r}")
    if policy.bases and study.base.digest not in policy.bases:
        raise PolicyRefused("policy.bases does not list this base's digest")
    if study.lora and study.lora.a_digest is None:
        raise PolicyRefused("the plan does not pin lora.a_digest")
    if site.data.columns.patient and study.unit == "record":
        raise PolicyRefused(
            "this site names a patient column and the study protects single records",
            'privacy.unit = "patient"',
            "a patient with several records would get a far weaker guarantee than the ε says",
        )
    if plan is None:
        if not policy.allow_privacy_off:
            raise PolicyRefused(
                'privacy = "off" is not allowed here', "policy.allow_privacy_off = true at the site"
            )
        return
    if plan.delta > policy.max_delta:
        raise PolicyRefused(f"delta {plan.delta} is above policy.max_delta {policy.max_delta}")
    if plan.delta >= 1 / site.site.declared_size:
        raise PolicyRefused(
            f"delta {plan.delta} is not below 1 / site.declared_size ({site.site.declared_size})"
        )
    _within_budget(study, site, plan, log)


def _within_budget(study: Study, site: Site, plan: DpPlan, log: StepLog) -> None:
    """ε of everything this site's step log holds, of any study, plus what the plan has yet to run
    (at least one round: a round asked for again is paid for again) is at most policy.max_epsilon.

    Errors: BudgetExceeded."""
    ran = log.steps()
    mine = sum(step.study == study.digest for step in ran)
    ahead = plan.events(max(plan.steps - mine, plan.local_steps))
    total = accountant.epsilon(events(ran) + ahead, plan.delta)
    if total > site.policy.max_epsilon:
        raise BudgetExceeded(
            f"the plan would bring this site's total to ε = {total:.2f}",
            f"at most policy.max_epsilon = {site.policy.max_epsilon}",
            "lower epsilon or rounds, or ask the site to raise its ceiling",
        )
