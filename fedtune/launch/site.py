"""Run a site (`fedtune client`): answer a coordinator's messages with the installed ClientApp.

    gateway <── forwarder <── SuperNode ── loopback, secret ──> join(): this process

The forwarder (forwarder.py) runs in this process too: it holds the site's certificate.

join() stands where Flower would start a process per message that unpacks the coordinator's app
bundle and runs it. Guarantee: only the ClientApp installed here runs; a bundle is never opened.
Other tasks and other kinds of message get a refusal. The process stays, and so does the model that
it has loaded.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.client.answers import FAILED
from fedtune.client.before_joining import check_before_joining
from fedtune.config import load_site
from fedtune.errors import InfrastructureError
from fedtune.files.writing import remove_drafts, replace
from fedtune.flower import api
from fedtune.flower.forwarder import Forwarder, Link
from fedtune.flower.forwarder import link as forwarder_link
from fedtune.flower.membership import reviewed
from fedtune.flower.packing import pack, unpack
from fedtune.flower.polling import Poll
from fedtune.flower.processes import (
    Child,
    Stopped,
    alone,
    bypass_proxy,
    free_port,
    interruptible,
)
from fedtune.observe.log import strict_here
from fedtune.observe.status import UNSIGNED
from fedtune.progress import OnEvent

log = logging.getLogger("fedtune.client")

App = Callable[[Message, Context], Message]
# The kinds of message that a site answers.
ANSWERED = ("query.prepare", "train", "train.ready", "train.masked", "query.evaluate")
REFUSAL = f"this site answers {', '.join(ANSWERED)}, no more"
POLL_SECONDS = (0.05, 0.5)  # between two polls for a task, on loopback
GONE_SECONDS = 6.0  # a coordinator that cannot be reached for so long is not there
LONG_SECONDS = 30.0  # a SuperNode that lasted so long was waiting, not failing
BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)


def join(
    site_path: Path,
    *,
    once: bool = False,
    watch: bool = False,
    on_event: OnEvent | None = None,
    client_app: ClientApp | App | None = None,
    patience: float = 90.0,
) -> None:
    """Take part in the coordinator's studies until a signal comes; reconnect as often as needed.

    once: return when a coordinator that gave this site work has gone. watch: take part in studies
    without a last round, and in no others. client_app: in place of
    client.app:app. patience: seconds to go on being refused; after a crash Flower refuses a site
    for about 60 s, until the old session has expired. Events: "joined", "answered" {kind, and
    client.reply_facts'}, "refused" {kind}, "failed" {kind, error}, "waiting" {address; study, done:
    of one that is finished}, "connected" (again), "reconnecting" {seconds}, "stopped" {reason};
    each has a text for people.
    Before it connects, site file, data sheet and records are checked (`check_before_joining`),
    and data that the site declares public or generated is signed for.
    Errors: those of that check; InfrastructureError when the coordinator goes on refusing this
    site; KeyboardInterrupt at Ctrl-C. SIGTERM ends it without an error."""
    site = load_site(site_path)
    check_before_joining(site)
    link = forwarder_link(site, site_path)
    executor = _Executor(
        site_path.resolve(), client_app or _installed_app(), on_event or _ignore, once
    )
    executor.coordinator, executor.watch = link.answer.coordinator, watch
    executor.reviewed = reviewed(link.answer)
    bypass_proxy()
    address = link.address
    text = f"site {site.site.name}: connecting to the coordinator at {address}"
    executor.notify("waiting", {"address": address, "text": text})
    state = site.site.state / "flower"
    try:
        with interruptible(), alone(state, "fedtune client"):
            remove_drafts(site.site.state)
            with Forwarder(link, state) as forwarder:
                executor.run_supernodes(state, forwarder, patience)
    except Stopped as stop:
        if stop.name == "SIGINT":  # as every command takes it
            raise KeyboardInterrupt from None
        reason = f"stopped by {stop.name}"
        executor.notify("stopped", {"reason": reason, "text": reason})


class _Executor:
    """Answers the tasks of one SuperNode after another."""

    def __init__(self, site_path: Path, app: ClientApp | App, notify: OnEvent, once: bool) -> None:
        self._site_path, self._app, self.notify, self._once = site_path, app, notify, once
        self._last: dict[str, Any] = {}  # the facts of the newest answer
        self.coordinator = ""  # the signing key that this site enrolled with
        self.reviewed = ""  # digest of the plan that the coordinator's answer brought for review
        self.watch = False  # whether it takes part in studies without a last round
        self.joined = False  # whether the coordinator accepted the last SuperNode
        self._worked = False

    def run_supernodes(self, state: Path, forwarder: Forwarder, patience: float) -> None:
        """Run one SuperNode after another until `once` is fulfilled. Errors: InfrastructureError
        when the coordinator goes on refusing this site for `patience` seconds."""
        failures: list[float] = []  # when, since the last success or long wait
        while True:
            began = time.monotonic()
            problem = self.run_supernode(state, forwarder)
            if problem is None:
                return
            ended = time.monotonic()
            if self.joined or ended - began > LONG_SECONDS:
                failures = []
            failures.append(ended)
            if not self.joined and ended - failures[0] > patience:
                raise problem
            wait = BACKOFF_SECONDS[min(len(failures), len(BACKOFF_SECONDS)) - 1]
            self.notify("reconnecting", {"seconds": wait, "text": "connecting again"})
            time.sleep(wait)

    def run_supernode(self, state: Path, forwarder: Forwarder) -> InfrastructureError | None:
        """Run one SuperNode until it ends and return the reason; None: `once` is fulfilled."""
        self.joined, problem = False, None
        if forwarder.refusal:
            return _refusal(forwarder)  # asked again by the forwarder, until that changes
        secret, port = secrets.token_bytes(32), free_port()
        secret_file = replace(state / "executor.secret", secret, private=True)
        # fmt: off
        options = [
            "--superlink", f"127.0.0.1:{forwarder.port}",
            "--root-certificates", str(forwarder.certificate),
            "--auth-supernode-private-key", str(forwarder.link.keys / "node.key"),
            "--host", "127.0.0.1", "--port", str(port),
            "--isolation", "process", "--superexec-auth-secret-file", str(secret_file),
        ]
        # fmt: on
        with Child("supernode", options, home=state, log=state / "supernode.log") as node:
            runtime = api.Runtime(f"127.0.0.1:{port}", secret)
            try:
                node.wait_for_port("127.0.0.1", port)
                if self._work(node, runtime, f"127.0.0.1:{port}", forwarder):
                    return None
            except InfrastructureError as error:
                problem = error
            except Exception as error:  # the SuperNode ended, or its wait failed: start another
                if node.alive:
                    self._failed("connection", error)
            finally:
                runtime.close()
                node.stop()
            if forwarder.distrust:
                raise _distrust(forwarder.link)
            if forwarder.refusal or node.has_logged(api.SUPERNODE_REFUSED):
                return _refusal(forwarder)
            return problem or node.ended()

    def _work(self, node: Child, runtime: api.Runtime, address: str, forwarder: Forwarder) -> bool:
        """Answer tasks until the SuperNode ends or the gateway refuses this site (False), or `once`
        is fulfilled (True)."""
        coordinator, waiting = forwarder.link.address, False
        poll = Poll(*POLL_SECONDS)
        while node.alive and not (forwarder.refusal or forwarder.distrust):
            if not self.joined and node.has_logged(api.SUPERNODE_JOINED):
                self.joined = True
                text = f"connected to {coordinator}; waiting for a study; Ctrl-C ends"
                self.notify("joined", {"address": coordinator, "text": text})
            if claim := runtime.acquire([api.CLIENT_APP, api.AGENT_APP]):
                self._answer(node, address, claim)
                poll.again()
            elif self._once and self._worked:
                if forwarder.away > GONE_SECONDS:
                    return True
            elif waiting != (forwarder.away > GONE_SECONDS):
                waiting = not waiting
                if waiting:
                    self.notify("waiting", {"address": coordinator, **self._ended(coordinator)})
                elif self.joined:
                    self.notify("connected", {"text": "connected again; waiting for work"})
            poll.pause()
        return False

    def _answer(self, node: Child, address: str, claim: api.Claim) -> None:
        with api.ClientTask(address, claim, give_up=lambda: not node.alive) as task:
            message, context = task.pull()
            task.push(pack(self.reply(claim.kind, message, context)))
        self._worked = True

    def reply(self, task_kind: str, message: Message, context: Context) -> Message:
        """Return the installed app's reply, or a refusal; of an exception that there was one."""
        kind = message.metadata.message_type
        if task_kind != api.CLIENT_APP or kind not in ANSWERED:
            self.notify("refused", {"kind": kind, "text": f"REFUSED {kind}: {REFUSAL}"})
            return api.error_reply(message, REFUSAL)
        context.run_config = {}  # the coordinator's; the site's own file is all that counts here
        context.node_config = {"site": str(self._site_path), "coordinator": self.coordinator}
        context.node_config |= {"watch": self.watch, "reviewed": self.reviewed}
        try:
            reply = self._app(unpack(message), context)
        except Exception as error:
            self._failed(kind, error)
            return api.error_reply(message, FAILED)
        facts, before = _reply_facts(message, reply, context), self._last
        self._last = facts
        if facts.get("status") == UNSIGNED and facts == before:
            return reply  # asked again, and still nobody has signed: said once
        self.notify("answered", {"kind": kind, "text": f"{kind}: answered", **self._last})
        return reply

    def _ended(self, coordinator: str) -> dict[str, Any]:
        """Describe the wait for a coordinator that is gone: its study is finished, or it failed."""
        last = self._last
        rounds, status = last.get("rounds"), last.get("status")
        whole = last.get("round") == rounds and status in ("trained", "answered")
        if rounds and (whole or status == "finished"):
            text = f"study {last['study']} is finished; waiting for another; Ctrl-C ends"
            return {"study": last["study"], "done": rounds, "text": text}
        text = f"the coordinator at {coordinator} is not there; waiting for it; Ctrl-C ends"
        return {"text": text}

    def _failed(self, kind: str, error: Exception) -> None:
        name = type(error).__name__
        self.notify("failed", {"kind": kind, "error": name, "text": f"{kind}: FAILED: {name}"})


def _reply_facts(message: Message, reply: Message, context: Context) -> dict[str, Any]:
    """Describe the reply for the site's screen and log; an error here does not stop the reply."""
    from fedtune.client.reply_facts import reply_facts

    try:
        return reply_facts(message, reply, context)
    except Exception as error:
        if strict_here():
            raise
        log.warning("this answer cannot be described: %s", type(error).__name__)
        return {}


def _refusal(forwarder: Forwarder) -> InfrastructureError:
    why, ahead = forwarder.refusal, forwarder.ahead
    early, late = api.CLOCK_WINDOW
    is_out = not -late < ahead < -early  # Flower refuses what a node signs at such a time
    if is_out and not why:
        direction = "ahead of" if ahead > 0 else "behind"
        why = f"this site's clock is {abs(ahead):.0f} s {direction} its own"
    why = f" ({why})" if why else ""
    if forwarder.clock or is_out:
        return InfrastructureError(
            f"no connection to the coordinator at {forwarder.link.address}{why}",
            "clocks that agree, here and there",
            "set the clocks of both ends (NTP); `fedtune doctor` compares them",
        )
    return InfrastructureError(
        f"the coordinator at {forwarder.link.address} refuses this site{why}",
        "an admitted site whose keys no other process uses",
        "`fedtune enroll` again, and have the request admitted",
    )


def _distrust(link: Link) -> InfrastructureError:
    return InfrastructureError(
        f"the certificate of {link.address} does not verify",
        "one for this address by the CA in the coordinator's answer",
        "ask the coordinator to start with --name and this address, or for a new answer; a proxy "
        "that opens TLS must let this address through",
    )


def _installed_app() -> ClientApp:
    from fedtune.client.app import app

    return app


def _ignore(_name: str, _facts: dict[str, Any]) -> None:
    pass
