"""The ClientApp: messages to the site's worker and back, the same wherever it runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.site import SiteWorker, Unprepared, worker
from fedtune.config import study_from_json
from fedtune.errors import ConfigError, FedtuneError, Refused
from fedtune.flower.arrays import from_record, to_record
from fedtune.sites import sites_in

app = ClientApp()
log = logging.getLogger("fedtune.client")
trouble: dict[str, FedtuneError] = {}  # by site file, for this process alone; `simulate` shows it


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Plan in, admission out."""
    said: dict[str, str | int] = {"name": "", "declared_size": 0, "status": "admitted"}
    said["reason"] = ""

    def attempt() -> None:
        site = site_of(context)
        said["name"] = site.site.site.name
        plan = message.content.config_records["plan"]
        study = study_from_json(str(plan["study"]))
        if study.digest != plan["digest"]:
            raise ConfigError("the plan received is not the one it claims to be")
        answer = site.prepare(study, from_record(message.content.array_records["frozen"]))
        said.update(name=answer.name, declared_size=answer.declared_size)
        if not answer.admitted:
            said.update(status="refused", reason=answer.reason)

    if failure := guarded(attempt, context):
        said["status"], said["reason"] = failure
    said["admitted"] = said["status"] == "admitted"
    return Message(RecordDict({"admission": ConfigRecord(dict(said))}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Adapter in, update out."""
    said = {"name": "", "status": "trained", "reason": "", "events": "[]"}
    update = ArrayRecord()

    def attempt() -> None:
        nonlocal update
        site = site_of(context)
        said["name"] = site.site.site.name
        order = message.content.config_records["round"]
        adapter = from_record(message.content.array_records["adapter"])
        made = site.train(str(order["digest"]), int(str(order["round"])), adapter)
        update, said["events"] = to_record(made.delta), json.dumps(made.events)

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
    """The worker of this node's site file: node_config["site"], else (in Flower's simulation) the
    n-th site file of the folder run_config["sites"], n being the partition. Errors: ConfigError."""
    path = context.node_config.get("site")
    if path is None:
        folder, number = context.run_config.get("sites"), context.node_config.get("partition-id")
        if folder is None or number is None:
            raise ConfigError("this node does not know its site file", 'node_config["site"]')
        found = sites_in(Path(str(folder)))
        if not 0 <= int(number) < len(found):
            raise ConfigError(f"{folder}: no site file for partition {number}")
        path = str(found[int(number)])
    return worker(str(path))
