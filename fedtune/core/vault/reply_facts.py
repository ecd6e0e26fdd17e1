"""Describe each of a site's answers to the person who runs the site, on this machine only. Nothing
is sent."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from fedtune.core.config import Study, study_from_json
from fedtune.core.dp import accountant
from fedtune.core.errors import FedtuneError
from fedtune.core.registry.reasons import HELD, WAITING
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.vault.answers import Place
from fedtune.core.vault.budget import most_epsilon_of_study
from fedtune.core.vault.budget_refusal import TODO, explain
from fedtune.core.vault.policy import compute_within_limits, plan_of_queries_beside
from fedtune.core.vault.waiting_plans import check_plan_length, keep_plan
from fedtune.core.vault.worker import SiteWorker, worker
from fedtune.core.wire.requests import Answer, Request

DONE = ("admitted", "trained", "ready", "masked", "answered")
# A refusal for what a dataset has spent. Words in quotation marks may be the coordinator's. A plan
# that is above policy.max_epsilon_per_study by itself is not computed for the screen.
BY_CEILING = re.compile(r"""[^'"]*policy\.max_(fallback_)?epsilon\b""")
PLANNED = (*DONE, WAITING)  # of a plan that the site's rules have admitted


def answer_facts(place: Place, request: Request, answer: Answer) -> dict[str, Any]:
    """Return facts about an answer for the screen of the person who runs the site: "site",
    "status", "reason", "plan_digest" and "text", a line for this person. As far as they are known
    and apply, the result also has "study", "round", "rounds", "signed" (whether somebody here
    signed the plan) and these, each as {site's name: value}:

    - epsilon: the ε of all charged rounds of the study at the plan's δ, interrupted rounds included
    - planned: the ε of the whole plan at this site
    - fallback: with secure aggregation, the ε of the charged rounds by this site's own noise alone
    - declared: "public" or "generated", if a person declared the site's data to be so

    place: the site that answered, and how it takes part."""
    site = worker(place.site)
    status = answer.status
    reason = str(answer.fields["reason"])
    facts: dict[str, Any] = {"site": site.site.site.name, "status": status, "reason": reason}
    study, facts["plan_digest"] = _study(request, site)
    name, where = "a plan", ""
    if study is not None:
        site = site.begin_run(study.digest)  # a new SiteWorker is not kept here
        if site.site.data.declared:
            facts["declared"] = {site.site.site.name: site.site.data.declared}
        name = facts["study"] = study.study.name
        rounds = study.training.rounds
        facts |= {"rounds": rounds} if rounds else {}
        if status == "finished":
            charges = site.ledger.charges(site.site.data.name) if site.has_ledger else []
            mine = (charge.round for charge in charges if charge.study == study.digest)
            facts["round"] = max(mine, default=0)  # the last one here
        if (number := _round(request)) is not None:
            facts["round"] = number
            where = f"round {number}" + (f" of {rounds}" if rounds else "")
        # A plan begins no ledger before its first order: there would be one for each name that
        # somebody makes up.
        if site.has_ledger and (spent := _compute_spent(study, site)) is not None:
            facts["epsilon"] = {site.site.site.name: spent.epsilon}
            if spent.fallback is not None:
                facts["fallback"] = {site.site.site.name: spent.fallback}
        planned = _compute_planned(study, site) if status in PLANNED else None
        if planned is not None:
            facts["planned"] = {site.site.site.name: planned}
    facts["text"] = f"{name}: {f'{where} ' if where else ''}{_line(facts)}"
    if status == WAITING and HELD in reason:
        facts["text"] += f": `fedtune let-go {place.site}`"
    reviewed = place.reviewed
    if study is not None and request.kind == "prepare" and status != "finished":
        joined_with = status == "admitted" and reviewed == study.digest
        own = site.site.policy.own_memberships
        facts["signed"] = joined_with or site.home.admitted(study.digest, own)
        if not facts["signed"] and status in ("admitted", WAITING):
            facts["text"] += f". {_describe_unsigned(study, site, place, facts)}"
    refused = status == "refused" and BY_CEILING.match(reason)
    if study is not None and refused:
        ledger = site.ledger if site.has_ledger else None  # of a run that has paid nothing
        facts["text"] += f"; {'; '.join(explain(study, site.site, ledger))}; {TODO}"
    if reviewed not in ("", facts["plan_digest"]) and facts.get("signed") is False:
        facts["text"] += (
            f". This is NOT the plan that came with the coordinator's answer ({reviewed})"
        )
    return facts


def _describe_unsigned(study: Study, site: SiteWorker, place: Place, facts: dict[str, Any]) -> str:
    """Describe a plan that nobody here has signed: its ε, and how to read or sign the plan. The
    plan is also stored for `fedtune review` (`keep_plan`).

    - study: the plan
    - site: the SiteWorker whose ledger is charged for it
    - place: the site at which it was answered
    - facts: the facts of the answer so far (`answer_facts`): status, and the ε planned if known"""
    rule, spends = site.current().policy.admission, "it has no ε: no noise is added"
    for planned in facts.get("planned", {}).values():
        spends = f"it spends ε = {rounded_up(planned)} of {site.site.data.name!r}"
        if (most := _compute_most(study, site)) > planned:
            spends += f", and up to {rounded_up(most)} if the coordinator orders rounds again"
    review = f"`fedtune review {keep_plan(site.site, study)} --site {place.site}`"
    if facts["status"] == WAITING:
        return (
            f"Nothing of it runs before a person here signs it; then {spends}. {review} says what "
            "the plan means; with --sign the same command admits it"
        )
    return (
        f'NOBODY HERE HAS SIGNED THIS PLAN; it runs by policy.admission = "{rule}", and {spends}. '
        f"{review} says what the plan means; Ctrl-C keeps this site out of the study; with "
        'policy.admission = "reviewed" the next plan waits for a person'
    )


def _study(request: Request, site: SiteWorker) -> tuple[Study | None, str | None]:
    """Return the study that a request is about, and its digest; (None, None) if this site does not
    know the study or the request has no valid plan."""
    tables = request.tables
    try:
        if "plan" in tables:
            text = str(tables["plan"]["study"])
            check_plan_length(text)
            study = study_from_json(text)
            return study, study.digest
        digest = ":".join(str(tables["order"]["plan"]).split(":")[:2])  # without Order.suffix
        return site.of_run(digest).study_of(digest), digest
    except (FedtuneError, KeyError):
        return None, None


def _round(request: Request) -> int | None:
    order = request.tables.get("order")
    return int(str(order["round"])) if order else None


class _Spent(NamedTuple):
    epsilon: float
    fallback: float | None


def _compute_spent(study: Study, site: SiteWorker) -> _Spent | None:
    charges = [c for c in site.ledger.charges(site.site.data.name) if c.study == study.digest]
    if isinstance(study.privacy, str) or not all(c.noise_multiplier for c in charges):
        return None
    delta, fallback = study.privacy.delta, None
    if study.secure_aggregation:
        fallback = accountant.epsilon([charge.fallback for charge in charges], delta)
    return _Spent(accountant.epsilon([charge.event for charge in charges], delta), fallback)


def _compute_planned(study: Study, site: SiteWorker) -> float | None:
    """Compute the ε that the whole plan costs at this site or, if the study has no last round, the
    lifetime ε of a unit. Return None for a study without privacy, and if the plan does not fit the
    site's declared size, or has more steps than the site's policy allows."""
    if not study.private:
        return None
    try:
        plan = compute_within_limits(study, site.site)
    except FedtuneError:  # the plan fits no site of this size, and the reply says so
        return None
    return plan.epsilon if plan.lifetime is None else plan.lifetime


def _compute_most(study: Study, site: SiteWorker) -> float:
    """Compute the largest ε to which the study may come at this site for a unit: each round, and
    each query that is charged to the same records, is answered as often as the site answers at
    all. In a study without a last round it is the lifetime ε, which no order exceeds. study: a plan
    whose ε was computed (`_compute_planned`)."""
    current = site.current()
    plan = compute_within_limits(study, site.site)
    if plan.lifetime is not None:
        return plan.lifetime
    queries = plan_of_queries_beside(study, current)
    return most_epsilon_of_study(current.policy, [plan, queries] if queries else [plan])


def _line(facts: dict[str, Any]) -> str:
    status: str = facts["status"]
    held = HELD in facts["reason"]
    if status == "unprepared":
        return "this process does not have the plan yet, and asked for it again"
    if status == WAITING:
        return "WAITING for a person at this site" + (" to let it go" if held else "")
    if status == "finished":
        return f"finished; the last round here was {facts['round']} of {facts['rounds']}"
    if status not in DONE:
        return f"{status.upper()}: {facts['reason'] or 'no reason given'}"
    line = status
    for spent in facts.get("epsilon", {}).values():
        line += f"; paid so far: ε = {rounded_up(spent)}"
    for planned in facts.get("planned", {}).values():
        line += f" of {rounded_up(planned)} planned"
    for fallback in facts.get("fallback", {}).values():
        line += f", {rounded_up(fallback)} whatever happens"
    for declared in facts.get("declared", {}).values():
        line += f", from a ledger of the run: the data is declared {declared}"
    last = facts.get("round") and facts["round"] == facts.get("rounds")
    if last and status != "ready":
        line += "; that was the last round"
    return line
