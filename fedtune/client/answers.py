"""Answer a coordinator's order, to train or to evaluate, with a sealed message."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedtune.client.noted import acts
from fedtune.client.prepared import Admission, Unprepared, Update, Void
from fedtune.client.site import SiteWorker
from fedtune.config import Study
from fedtune.errors import FedtuneError, PolicyRefused, Refused, describe
from fedtune.evidence.audit_log import REPEATS
from fedtune.flower.arrays import bodies, to_record
from fedtune.observe.log import reason_of
from fedtune.progress import stage
from fedtune.wire.seal import SealError, body_digest, check_order

log = logging.getLogger("fedtune.client")
site_errors: dict[
    str, FedtuneError
] = {}  # by site file, for this process alone; `simulate` shows it
# What is sent of a failure, whatever it was: its class would be an answer about the records, or
# about the room that they leave on this machine. The site's own log says what happened.
FAILED = "the site's own log says why"
Work = Callable[[SiteWorker, str, Message], Update]


def sealed(
    message: Message,
    context: Context,
    site_of: Callable[[Context], SiteWorker],
    work: Work,
    *,
    record: str,
    done: str,
    order_for: str = "",
) -> Message:
    """Check an order, run `work` and seal its result: arrays as `record`, status `done`.

    order_for: what follows the plan's digest in an order for this kind of work, so that an order
    for one kind is never taken for another."""
    answer = {"name": "", "status": done, "reason": "", "events": "[]"}
    answer |= {"header": "", "signature": ""}
    arrays = ArrayRecord()

    def attempt() -> None:
        nonlocal arrays
        site = site_of(context)
        answer["name"] = site.site.site.name
        order = message.content.config_records["order"]
        digest, number = _plan_of(order["plan"], order_for), int(str(order["round"]))
        site = site.of_run(digest)
        check_order(order, site.coordinator_of(digest))
        rule, nonce = site.site.policy.admission, str(order["nonce"])
        with site.room_to_answer():
            with stage(f"{answer['name']}, round {number}"):
                update = work(site, digest, message)
            note(site, "release", rule, plan=digest, round=number, kind=record)
            update_arrays = to_record(update.delta)
            complete = answer | {"events": json.dumps(update.events), **update.said}
            content_digest = body_digest(bodies(update_arrays), complete)
            answer.update(complete, **site.sealed(digest, number, nonce, content_digest))
        arrays = update_arrays

    if failure := guarded(attempt, context):
        answer["status"], answer["reason"] = failure
        note_refusal(context, site_of, failure, kind=record)
    content = RecordDict({record: arrays, "site": ConfigRecord(dict(answer))})
    return Message(content, reply_to=message)


def note(site: SiteWorker, event: str, rule: str, **facts: Any) -> None:
    """Enter an act of the site's process in its audit log. Errors: InfrastructureError, with which
    what was to be done is not done."""
    acts(site).add(event, rule, once=REPEATS, **facts)


def note_admission(site: SiteWorker, study: Study, admission: Admission) -> None:
    """Enter in the audit log that a plan was admitted, and whether a person here signed it, or that
    it waits for one. Errors: PolicyRefused where the site refuses it; as `note`."""
    about = {"plan": study.digest, "study": study.study.name}
    if admission.admitted:
        rule, signed = site.current().policy.admission, site.home.admitted(study.digest)
        note(site, "admit", rule, **about, signed=signed)
    elif admission.waits:
        note(site, "wait", "policy.admission", **about)
    else:
        raise PolicyRefused(admission.reason)


def note_refusal(
    context: Context,
    site_of: Callable[[Context], SiteWorker],
    failure: tuple[str, str],
    **facts: Any,
) -> None:
    """Enter a refusal, with the rule that said no; the coordinator is answered in any case."""
    status, reason = failure
    if status == "refused":
        try:
            note(site_of(context), "refuse", reason_of(reason), **facts)
        except FedtuneError as error:
            log.warning("not in the audit log: %s", error)


def _plan_of(named: Any, order_for: str) -> str:
    digest = str(named)
    if not digest.endswith(order_for):
        raise SealError("the order is for another kind of work")
    return digest.removesuffix(order_for)


def guarded(attempt: Callable[[], None], context: Context) -> tuple[str, str] | None:
    """Run `attempt` and return the status and reason of its failure, None if it succeeded.

    Guarantee: only a refusal's text leaves the site (rules and public values); of any other failure
    that there was one. Once a record was read, a round does not fail by what it holds: what cannot
    be summed is a step of noise alone (dp.plan.SitePlan), and is charged."""
    try:
        attempt()
    except Unprepared as error:
        return "unprepared", str(error)
    except Void as error:
        return "void", str(error)
    except Refused as error:
        return "refused", str(error)
    except Exception as error:
        if isinstance(error, FedtuneError):
            site_errors[str(context.node_config.get("site"))] = error
        log.warning("%s", describe(error))  # stays at the site
        return "failed", FAILED
    return None
