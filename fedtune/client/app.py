"""The ClientApp: hands Flower's messages to the site's worker and returns its replies."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.client import work
from fedtune.client.answers import guarded, note_admission, note_refusal, sealed, site_errors
from fedtune.client.site import SiteWorker, worker
from fedtune.client.site_checks import check_watch
from fedtune.client.site_file import site_file
from fedtune.config import study_from_json
from fedtune.errors import ConfigError, PolicyRefused
from fedtune.flower.arrays import read_frozen
from fedtune.flower.grid import PEERS, SIMULATED
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
        nonlocal answer
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
            return site.finish(study.digest)
        check_watch(study, context.node_config.get("watch"))
        sent, has_basis = message.content.array_records["frozen"], study.objective.basis_digest
        frozen = read_frozen(sent, study.lora, has_basis=has_basis is not None)
        with site.room_to_answer():
            admission = site.prepare(study, frozen, coordinator)
            answer |= admission.fields()
            note_admission(site, study, admission)

    if failure := guarded(attempt, context):
        answer["status"], answer["reason"] = failure
        if answer["key"]:  # before it, there may be no ledger here, and none is made for a refusal
            note_refusal(context, site_of, failure, kind="plan")
    answer["admitted"] = answer["status"] == "admitted"
    return Message(RecordDict({"admission": ConfigRecord(dict(answer))}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train one round as ordered and return the sealed update."""
    return sealed(message, context, site_of, work.train, record="update", done="trained")


@app.train("ready")
def ready(message: Message, context: Context) -> Message:
    """Draw a noised sum for an attempt at a round, and return the sealed statement of it."""
    kind = {"record": "ready", "done": "ready", "order_for": ":ready"}
    return sealed(message, context, site_of, work.ready, **kind)


@app.train("masked")
def masked(message: Message, context: Context) -> Message:
    """Return the sealed, masked words of this site's draw for the set that came with the order."""
    kind = {"record": "update", "done": "masked", "order_for": ":masked"}
    return sealed(message, context, site_of, work.masked, **kind)


@app.query("evaluate")
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the adapter on the site's held-out records; return the noised, sealed answer."""
    kind = {"record": "answer", "done": "answered", "order_for": ":evaluation"}
    return sealed(message, context, site_of, work.evaluate, **kind)


def site_of(context: Context) -> SiteWorker:
    """Return the worker of this node's site file. Errors: ConfigError."""
    site = worker(site_file(context))
    site.simulated = SIMULATED in context.node_config
    if PEERS in context.node_config:  # in a simulation alone
        site.peers = tuple(str(context.node_config[PEERS]).split())
    return site
