"""The ClientApp: hands Flower's messages to the site's worker and returns its replies."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.client.answers import Work, guarded, note, note_refusal, sealed, site_errors
from fedtune.client.policy import check_watch
from fedtune.client.site import SiteWorker, worker
from fedtune.client.site_file import site_file
from fedtune.config import study_from_json
from fedtune.errors import ConfigError, PolicyRefused
from fedtune.flower.arrays import read_frozen
from fedtune.wire.protocol import check_peer, version_fields
from fedtune.wire.seal import check_plan

__all__ = ["app", "evaluate", "prepare", "site_errors", "site_of", "train"]
app = ClientApp()


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Answer a plan with this site's admission."""
    answer: dict[str, str | int] = {"name": "", "key": "", "declared_size": 0, "status": "admitted"}
    answer |= {"reason": "", **version_fields()}

    def attempt() -> None:
        site = site_of(context)
        answer["name"] = site.site.site.name
        plan = message.content.config_records["plan"]
        check_peer("the coordinator", plan, "this site")
        answer["key"] = site.key.public
        study = study_from_json(str(plan["study"]))
        if study.digest != plan["digest"]:
            raise ConfigError("the plan received is not the one it claims to be")
        site = site.of_run(study.digest)
        coordinator = check_plan(plan, study.digest)
        if context.node_config.get("coordinator", coordinator) != coordinator:
            raise PolicyRefused("the plan is not signed by the coordinator this site enrolled with")
        if plan.get("finished") is True:
            answer["status"] = "finished"
            return
        check_watch(study, context.node_config.get("watch"))
        frozen = read_frozen(message.content.array_records["frozen"], study.lora)
        admission = site.prepare(study, frozen, coordinator)
        answer.update(name=admission.name, declared_size=admission.declared_size)
        if admission.lora_rank is not None:
            answer["lora_rank"] = admission.lora_rank
        if admission.declared is not None:
            answer["declared"] = admission.declared
        if admission.free_query:
            answer["free_query"] = True
        if not admission.admitted:
            raise PolicyRefused(admission.reason)
        rule = site.site.policy.admission
        note(site, "admit", rule, plan=study.digest, study=study.study.name)

    if failure := guarded(attempt, context):
        answer["status"], answer["reason"] = failure
        if answer["key"]:  # before it, there may be no ledger here, and none is made for a refusal
            note_refusal(context, site_of, failure, kind="plan")
    answer["admitted"] = answer["status"] == "admitted"
    return Message(RecordDict({"admission": ConfigRecord(dict(answer))}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round as ordered and return the sealed update."""
    work: Work = lambda site, *order: site.train(*order)  # noqa: E731
    return sealed(message, context, site_of, work, record="update", done="trained")


@app.query("evaluate")
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the adapter on the site's held-out records; return the noised, sealed answer."""
    work: Work = lambda site, *order: site.evaluate(*order)  # noqa: E731
    kind = {"record": "answer", "done": "answered", "order_for": ":evaluation"}
    return sealed(message, context, site_of, work, **kind)


def site_of(context: Context) -> SiteWorker:
    """Return the worker of this node's site file. Errors: ConfigError."""
    return worker(site_file(context))
