"""The ClientApp: messages to the site's worker and back, the same wherever it runs."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.client.answers import Work, guarded, sealed, trouble
from fedtune.client.policy import check_watch
from fedtune.client.site import SiteWorker, worker
from fedtune.client.site_file import site_file
from fedtune.config import study_from_json
from fedtune.errors import ConfigError, PolicyRefused
from fedtune.flower.arrays import read_frozen
from fedtune.wire.protocol import check_peer, spoken
from fedtune.wire.seal import check_plan

__all__ = ["app", "evaluate", "prepare", "site_of", "train", "trouble"]
app = ClientApp()


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Plan in, admission out."""
    said: dict[str, str | int] = {"name": "", "key": "", "declared_size": 0, "status": "admitted"}
    said |= {"reason": "", **spoken()}

    def attempt() -> None:
        site = site_of(context)
        said["name"] = site.site.site.name
        plan = message.content.config_records["plan"]
        check_peer("the coordinator", plan, "this site")
        said["key"] = site.key.public
        study = study_from_json(str(plan["study"]))
        if study.digest != plan["digest"]:
            raise ConfigError("the plan received is not the one it claims to be")
        coordinator = check_plan(plan, study.digest)
        if context.node_config.get("coordinator", coordinator) != coordinator:
            raise PolicyRefused("the plan is not signed by the coordinator this site enrolled with")
        check_watch(study, context.node_config.get("watch"))
        sent = study.lora.rank if study.lora and study.lora.a_init == "public" else None
        frozen = read_frozen(message.content.array_records["frozen"], sent)
        answer = site.prepare(study, frozen, coordinator)
        said.update(name=answer.name, declared_size=answer.declared_size)
        if answer.lora_rank is not None:
            said["lora_rank"] = answer.lora_rank
        if not answer.admitted:
            said.update(status="refused", reason=answer.reason)

    if failure := guarded(attempt, context):
        said["status"], said["reason"] = failure
    said["admitted"] = said["status"] == "admitted"
    return Message(RecordDict({"admission": ConfigRecord(dict(said))}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Order and adapter in, sealed update out."""
    work: Work = lambda site, *order: site.train(*order)  # noqa: E731
    return sealed(message, context, site_of, work, record="update", done="trained")


@app.query("evaluate")
def evaluate(message: Message, context: Context) -> Message:
    """Order and adapter in, sealed and noised answer about the site's held-out records out."""
    work: Work = lambda site, *order: site.evaluate(*order)  # noqa: E731
    kind = {"record": "answer", "done": "answered", "order_for": ":evaluation"}
    return sealed(message, context, site_of, work, **kind)


def site_of(context: Context) -> SiteWorker:
    """The worker of this node's site file. Errors: ConfigError."""
    return worker(site_file(context))
