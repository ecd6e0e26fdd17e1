"""Describe each of a site's replies to its operator, on this machine alone; nothing is sent."""

from __future__ import annotations

from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Context, Message

from fedtune.client.budget_refusal import CEILINGS, TODO, explain
from fedtune.client.review import pending
from fedtune.client.site import SiteWorker, worker
from fedtune.client.site_file import site_file
from fedtune.config import Study, study_from_json
from fedtune.dp import accountant
from fedtune.dp.plan import plan_for_site
from fedtune.errors import FedtuneError
from fedtune.flower.packing import size
from fedtune.observe.status import UNSIGNED
from fedtune.report.claim import rounded_up

DONE = ("admitted", "trained", "ready", "masked", "answered")
PLAN = "query.prepare"  # the message that brings a plan


def reply_facts(message: Message, reply: Message, context: Context) -> dict[str, Any]:
    """Return a reply's study, round, status and reason, the study's ε so far and as planned, the
    bytes of both messages, and a line of text.

    epsilon: of all charged rounds of the study, interrupted ones included, at the plan's δ;
    fallback: with secure aggregation the same by this site's own noise alone.
    {} where the reply is not the app's."""
    record = _status_record(reply)
    if record is None:
        return {}
    site, status, reason = worker(site_file(context)), str(record["status"]), str(record["reason"])
    facts: dict[str, Any] = {"site": site.site.site.name, "status": status, "reason": reason}
    facts["bytes_up"] = {facts["site"]: size(reply.content)}
    facts["bytes_down"] = {facts["site"]: size(message.content)}
    study, facts["plan_digest"] = _study(message, site)
    name, place = "a plan", ""
    if study is not None:
        site = site.of_run(study.digest)
        if site.site.data.declared:
            facts["declared"] = {site.site.site.name: site.site.data.declared}
        name = facts["study"] = study.study.name
        rounds = study.training.rounds
        facts |= {"rounds": rounds} if rounds else {}
        if status == "finished":
            charges = site.ledger.charges(site.site.data.name)
            mine = (charge.round for charge in charges if charge.study == study.digest)
            facts["round"] = max(mine, default=0)  # the last one here
        if (number := _round(message)) is not None:
            facts["round"] = number
            place = f"round {number}" + (f" of {rounds}" if rounds else "")
        if (spent := _spent(study, site)) is not None:
            facts["epsilon"] = {site.site.site.name: spent.epsilon}
            if spent.fallback is not None:
                facts["fallback"] = {site.site.site.name: spent.fallback}
            if (planned := _planned(study, site)) is not None:
                facts["planned"] = {site.site.site.name: planned}
    facts["text"] = f"{name}: {f'{place} ' if place else ''}{_line(facts)}"
    reviewed = context.node_config.get("reviewed")  # the plan in the answer that it joined with
    if study is not None and message.metadata.message_type == PLAN and status != "finished":
        joined_with = status == "admitted" and reviewed == study.digest
        facts["signed"] = joined_with or site.home.admitted(study.digest)
        if not facts["signed"] and status in ("admitted", UNSIGNED):
            facts["text"] += f". {_unsigned(study, site, context, facts)}"
    refused = status == "refused" and any(ceiling in reason for ceiling in CEILINGS[:2])
    if study is not None and refused:
        facts["text"] += f"; {'; '.join(explain(study, site.site, site.ledger))}; {TODO}"
    if reviewed not in (None, "", facts["plan_digest"]) and facts.get("signed") is False:
        facts["text"] += (
            f". This is NOT the plan that came with the coordinator's answer ({reviewed})"
        )
    return facts


def _unsigned(study: Study, site: SiteWorker, context: Context, facts: dict[str, Any]) -> str:
    """Say that nobody here signed a plan, what it would spend, and how to read or sign it."""
    rule, spends = site.current().policy.admission, "it has no ε: no noise is added"
    for planned in facts.get("planned", {}).values():
        spends = f"it spends up to ε = {rounded_up(planned)} of {site.site.data.name!r}"
    review = f"`fedtune review {pending(site.site, study)} --site {site_file(context)}`"
    if facts["status"] == UNSIGNED:
        return (
            f"Nothing of it runs before a person here signs it; then {spends}. {review} says what "
            "it means, and with --sign admits it"
        )
    return (
        f'NOBODY HERE HAS SIGNED THIS PLAN; it runs by policy.admission = "{rule}", and {spends}. '
        f"{review} says what it means; Ctrl-C keeps this site out of it; with "
        'policy.admission = "reviewed" the next one waits for a person'
    )


def _status_record(reply: Message) -> ConfigRecord | None:
    if reply.has_error():
        return None
    records = reply.content.config_records
    record = records.get("admission") or records.get("site")
    return record if record is not None and {"status", "reason"} <= set(record) else None


def _study(message: Message, site: SiteWorker) -> tuple[Study | None, str | None]:
    """Return the study that a message is about, and its digest; None where unknown."""
    records = message.content.config_records
    try:
        if "plan" in records:
            study = study_from_json(str(records["plan"]["study"]))
            return study, study.digest
        digest = ":".join(str(records["order"]["plan"]).split(":")[:2])  # less the kind of work
        return site.of_run(digest).study_of(digest), digest
    except (FedtuneError, KeyError):
        return None, None


def _round(message: Message) -> int | None:
    order = message.content.config_records.get("order")
    return int(str(order["round"])) if order else None


class _Spent(NamedTuple):
    epsilon: float
    fallback: float | None


def _spent(study: Study, site: SiteWorker) -> _Spent | None:
    charges = [c for c in site.ledger.charges(site.site.data.name) if c.study == study.digest]
    if isinstance(study.privacy, str) or not all(c.noise_multiplier for c in charges):
        return None
    delta, fallback = study.privacy.delta, None
    if study.secure_aggregation:
        fallback = accountant.epsilon([charge.fallback for charge in charges], delta)
    return _Spent(accountant.epsilon([charge.event for charge in charges], delta), fallback)


def _planned(study: Study, site: SiteWorker) -> float | None:
    """Return ε of the whole plan here; in a study without a last round, of a patient's life."""
    try:
        plan = plan_for_site(study, site.site.site.declared_size)
    except FedtuneError:  # the plan fits no site of this size, and the reply says so
        return None
    return plan.epsilon if plan.lifetime is None else plan.lifetime


def _line(facts: dict[str, Any]) -> str:
    status: str = facts["status"]
    if status == "unprepared":
        return "this process has yet to see it, and asked for it again"
    if status == UNSIGNED:
        return "WAITING for a person at this site"
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
