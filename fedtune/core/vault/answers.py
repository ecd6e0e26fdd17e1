"""Answer a coordinator's requests: return an admission for a plan, a sealed update for an order."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedtune.core.config import Study, study_from_json
from fedtune.core.errors import (
    ConfigError,
    FedtuneError,
    PolicyRefused,
    Refused,
    describe,
    is_fault,
)
from fedtune.core.ledger.audit_log import REPEATS
from fedtune.core.progress import stage
from fedtune.core.registry.reasons import WAITING, reason_of
from fedtune.core.vault import orders as work
from fedtune.core.vault.noted import acts
from fedtune.core.vault.prepared import Admission, Held, Unprepared, Update, Void
from fedtune.core.vault.site_checks import check_watch
from fedtune.core.vault.waiting_plans import check_plan_length, keep_plan
from fedtune.core.vault.worker import SiteWorker, worker
from fedtune.core.wire.arrays import Packed, bodies, pack_arrays, read_frozen
from fedtune.core.wire.protocol import check_peer, version_fields
from fedtune.core.wire.requests import FAILED, Answer, Kind, Request, Scalar
from fedtune.core.wire.seal import SealError, body_digest, check_end, check_order, check_plan

log = logging.getLogger("fedtune.client")
ENTRY = 4096  # most bytes that an entry of the audit log takes on the disk
site_errors: dict[
    str, FedtuneError
] = {}  # site file -> the last error there in this process, for `simulate` to show
Work = Callable[[SiteWorker, str, Request], Update]


@dataclass(frozen=True)
class Place:
    """A site that answers requests in this process, and how the site takes part.

    - site: the path of the site file
    - coordinator: the public signing key of the coordinator with which the site enrolled; "" if any
      coordinator may ask (a simulation)
    - watch: True if the site takes part only in studies without a last round, False if only in
      others; None in a simulation, where either may run
    - reviewed: the digest of the plan that the coordinator sent for review when the site enrolled;
      "" if it sent none
    - simulated: whether the person who runs the study runs this site too
    - peers: the signing keys of all sites, if the site is simulated"""

    site: str
    coordinator: str = ""
    watch: bool | None = None
    reviewed: str = ""
    simulated: bool = False
    peers: tuple[str, ...] = ()

    def worker(self) -> SiteWorker:
        """Return the SiteWorker that answers for this site. This process has one for each site
        file. In a simulation it also gets `peers`, the signing keys of all sites.
        Errors: ConfigError if the site file cannot be used."""
        site = worker(self.site)
        site.simulated = self.simulated
        if self.simulated:
            site.peers = self.peers
        return site


@dataclass(frozen=True)
class Order:
    """What it takes to answer one kind of order. An order is a coordinator's request for an update,
    a draw, masked words or the answer to a query.

    - work: the function that does the order's work
    - arrays: the name under which the answer's arrays are sent
    - done: the answer's status on success
    - suffix: the text after the plan's digest in an order of this kind, so that an order of one
      kind is never taken for another"""

    work: Work
    arrays: str
    done: str
    suffix: str = ""


ORDERS: dict[Kind, Order] = {
    "train": Order(work.train, "update", "trained"),
    "ready": Order(work.draw_sum, "ready", "ready", ":ready"),
    "masked": Order(work.mask_sum, "update", "masked", ":masked"),
    "evaluate": Order(work.evaluate, "answer", "answered", ":evaluation"),
}


def answer(place: Place, request: Request) -> Answer:
    """Return a site's answer to one request. If the site refuses the request or a fault occurs, the
    answer says so in its status and reason. place: the site, and how it takes part."""
    if request.kind == "prepare":
        return _admission(place, request)
    return _answer_and_seal(place, request, ORDERS[request.kind])


def _admission(place: Place, request: Request) -> Answer:
    """Answer a plan with this site's admission. If the plan is refused, or cannot be read, the
    answer has a status and a reason that say so. If the request says that the study has ended, note
    the end; the status is then "finished". place: the site, and how it takes part."""
    fields: dict[str, Scalar] = {"name": "", "key": "", "declared_size": 0, "status": "admitted"}
    fields |= {"reason": "", **version_fields()}

    def attempt() -> None:
        nonlocal fields
        site = place.worker()
        fields["name"] = site.site.site.name
        plan = request.tables["plan"]
        check_peer("the coordinator", plan, "this site")
        fields["key"] = site.key.public
        check_plan_length(str(plan["study"]))
        study = study_from_json(str(plan["study"]))
        if study.digest != plan["digest"]:
            raise ConfigError("the plan received does not have the digest that it claims")
        coordinator = check_plan(plan, study.digest)
        if place.coordinator not in ("", coordinator):
            raise PolicyRefused(
                "the plan is not signed by the coordinator with which this site enrolled"
            )
        if plan.get("finished") is True:
            check_end(plan, study.digest, coordinator)
            fields["status"] = "finished"
            return site.end_run(study.digest)
        check_watch(study, place.watch)
        all_runs, site = site, site.begin_run(study.digest)
        has_basis = study.objective.basis_digest is not None
        frozen = read_frozen(request.arrays, study.lora, has_basis=has_basis)
        with site.room_to_answer():
            admission = site.prepare(study, frozen, coordinator)
            fields |= admission.fields()
            note_admission(site, study, admission)
        if admission.admitted:
            all_runs.keep_run(study.digest, site)
        if admission.waits:  # where the ledger's room is its own again
            keep_plan(site.current(), study)

    if failure := run_guarded(attempt, place):
        fields["status"], fields["reason"] = failure
        if fields["key"]:  # else there may be no ledger here, and a refusal makes none
            note_refusal(place, failure, kind="plan")
    fields["admitted"] = fields["status"] == "admitted"
    return Answer("admission", fields)


def _answer_and_seal(place: Place, request: Request, kind: Order) -> Answer:
    """Check a coordinator's order, do its work, and return the sealed result. If a check or the
    work fails, the answer has a status and a reason that say so. place: the site, and how it takes
    part; kind: what it takes to answer orders of this kind."""
    fields = {"name": "", "status": kind.done, "reason": "", "events": "[]"}
    fields |= {"header": "", "signature": ""}
    arrays: dict[str, Packed] = {}

    def attempt() -> None:
        nonlocal arrays
        site = place.worker()
        fields["name"] = site.site.site.name
        order = request.tables["order"]
        digest, number = _plan_of(order["plan"], kind.suffix), int(str(order["round"]))
        site = site.of_run(digest)
        beside, table = bodies(request.arrays), request.tables.get("set")
        check_order(order, site.coordinator_of(digest), beside, table)
        rule, nonce = site.site.policy.admission, str(order["nonce"])
        with site.room_to_answer():
            site.home.check_not_frozen()
            try:
                with stage(f"{fields['name']}, round {number}"):
                    update = kind.work(site, digest, request)
            except Held:
                about: dict[str, Any] = {"plan": digest, "round": number, "kind": kind.arrays}
                note(site, "wait", "policy.answers", **about)
                raise
            site.home.check_not_frozen()  # again: a round lasts, and a person may have frozen it
            note(site, "release", rule, plan=digest, round=number, kind=kind.arrays)
            packed = pack_arrays(update.delta)
            complete = fields | {"events": json.dumps(update.events), **update.said}
            content_digest = body_digest(bodies(packed), complete)
            fields.update(complete, **site.sealed(digest, number, nonce, content_digest))
        arrays = packed

    if failure := run_guarded(attempt, place):
        fields["status"], fields["reason"] = failure
        note_refusal(place, failure, kind=kind.arrays)
    return Answer("site", fields, kind.arrays, arrays)


def note(site: SiteWorker, event: str, rule: str, **facts: Any) -> None:
    """Add an entry to the audit log for something that the site's process did, unless the entry
    would need disk space that is reserved for the ledger (files.room).

    - site: the SiteWorker of this site, with its settings and ledger
    - event: the kind of act, one of `audit_log.EVENTS`
    - rule: the rule of the policy by which it was done
    - facts: numbers and short texts about it, by name

    A coordinator can cause such entries without end and at no cost, and they must not take the
    space of a charge or a withdrawal. If there is no space, the site logs a warning, and the
    coordinator gets the same answer.

    Errors: InfrastructureError; the caller then does not do the act."""
    if site.room.has_space(ENTRY):
        acts(site).add(event, rule, once=REPEATS, **facts)
    else:
        log.warning(
            "%s is not in the audit log: the disk has no space beside the ledger's room; to do: "
            "free space",
            event,
        )


def note_admission(site: SiteWorker, study: Study, admission: Admission) -> None:
    """Enter the site's decision on a plan in the audit log: that the plan was admitted, with or
    without a signature of a person at the site, or that it waits for this signature. Errors:
    PolicyRefused with the admission's reason if the site refuses the plan; InfrastructureError if
    the log cannot be written."""
    about = {"plan": study.digest, "study": study.study.name}
    if admission.admitted:
        policy = site.current().policy
        signed = site.home.admitted(study.digest, policy.own_memberships)
        note(site, "admit", policy.admission, **about, signed=signed)
    elif admission.waits:
        note(site, "wait", "policy.admission", **about)
    else:
        raise PolicyRefused(admission.reason)


def note_refusal(place: Place, failure: tuple[str, str], **facts: Any) -> None:
    """Enter a refusal in the audit log, with the rule by which the site refused. If the log cannot
    be written, log a warning only.

    failure: status and reason as `run_guarded` returns them; nothing is entered unless the status
    is "refused". facts: numbers and short texts about the refusal, by name."""
    status, reason = failure
    if status == "refused":
        try:
            note(place.worker(), "refuse", reason_of(reason), **facts)
        except FedtuneError as error:
            log.warning("not in the audit log: %s", error)


def _plan_of(named: Any, suffix: str) -> str:
    digest = str(named)
    if not digest.endswith(suffix):
        raise SealError("the order is of another kind than the request that carries it")
    return digest.removesuffix(suffix)


def run_guarded(attempt: Callable[[], None], place: Place) -> tuple[str, str] | None:
    """Run `attempt`, and return None if it succeeded; else the status and reason of its failure,
    which are sent to the coordinator. place: the site at which it runs. If the status is "failed",
    the error is logged at the site only; an error of fedtune is also stored in `site_errors` under
    place.site, so that `simulate` can show it.

    Guarantee: the text of a refusal is sent, since it names only rules and public values. Of any
    other failure the coordinator learns only that there was one. A record's content never makes a
    round fail: a step that cannot be summed becomes a step of noise alone (dp.plan.SitePlan), and
    is charged."""
    try:
        attempt()
    except Unprepared as error:
        return "unprepared", str(error)
    except Void as error:
        return "void", str(error)
    except Held as error:
        return WAITING, str(error)
    except Refused as error:
        return "refused", str(error)
    except BaseException as error:
        if not is_fault(error):
            raise
        if isinstance(error, FedtuneError):
            site_errors[place.site] = error
        log.warning("%s", describe(error))  # stays at the site
        return "failed", FAILED
    return None
