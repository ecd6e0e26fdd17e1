"""The ClientApp: messages to the site's worker and back, the same wherever it runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.find import site_file
from client.site import SiteWorker, Unprepared, worker
from fedtune.config import study_from_json
from fedtune.errors import ConfigError, FedtuneError, Refused
from fedtune.flower.arrays import bodies, from_record, to_record
from fedtune.wire.seal import body_digest, check_order, check_plan

app = ClientApp()
log = logging.getLogger("fedtune.client")
trouble: dict[str, FedtuneError] = {}  # by site file, for this process alone; `simulate` shows it


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Plan in, admission out."""
    said: dict[str, str | int] = {"name": "", "key": "", "declared_size": 0, "status": "admitted"}
    said["reason"] = ""

    def attempt() -> None:
        site = site_of(context)
        said["name"], said["key"] = site.site.site.name, site.key.public
        plan = message.content.config_records["plan"]
        study = study_from_json(str(plan["study"]))
        if study.digest != plan["digest"]:
            raise ConfigError("the plan received is not the one it claims to be")
        coordinator = check_plan(plan, study.digest)
        frozen = from_record(message.content.array_records["frozen"])
        answer = site.prepare(study, frozen, coordinator)
        said.update(name=answer.name, declared_size=answer.declared_size)
        if not answer.admitted:
            said.update(status="refused", reason=answer.reason)

    if failure := guarded(attempt, context):
        said["status"], said["reason"] = failure
    said["admitted"] = said["status"] == "admitted"
    return Message(RecordDict({"admission": ConfigRecord(dict(said))}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Order and adapter in, sealed update out."""
    said = {"name": "", "status": "trained", "reason": "", "events": "[]"}
    said |= {"header": "", "signature": ""}
    update = ArrayRecord()

    def attempt() -> None:
        nonlocal update
        site = site_of(context)
        said["name"] = site.site.site.name
        order = message.content.config_records["order"]
        digest, number = str(order["plan"]), int(str(order["round"]))
        check_order(order, site.coordinator_of(digest))
        adapter = from_record(message.content.array_records["adapter"])
        made = site.train(digest, number, adapter, str(order["receipt"]))
        record = to_record(made.delta)
        sealed = site.sealed(digest, number, str(order["nonce"]), body_digest(bodies(record)))
        said.update(sealed, events=json.dumps(made.events))
        update = record

    if failure := guarded(attempt, context):
        said["status"], said["reason"] = failure
    site = ConfigRecord(dict(said))
    return Message(RecordDict({"update": update, "site": site}), reply_to=message)


def guarded(attempt: Callable[[], None], context: Context) -> tuple[str, str] | None:
    """Status and reason of what went wrong, if anything. Guarantee: only a refusal's words leave
    the site (rules and public values); of any other exception the class alone."""
    try:
        attempt()
    except Unprepared as error:
        return "unprepared", str(error)
    except Refused as error:
        return "refused", str(error)
    except Exception as error:
        if isinstance(error, FedtuneError):
            trouble[str(context.node_config.get("site"))] = error
        own = str(error) if isinstance(error, FedtuneError) else ""
        log.warning("%s: %s", type(error).__name__, own)  # for the site's own eyes
        return "failed", type(error).__name__
    return None


def site_of(context: Context) -> SiteWorker:
    """The worker of this node's site file. Errors: ConfigError."""
    return worker(site_file(context))
