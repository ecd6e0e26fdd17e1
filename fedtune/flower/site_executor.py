"""A site: `fedtune client`, which answers a coordinator's messages with the installed ClientApp.

    coordinator <── TLS, node key ── SuperNode ── loopback, secret ──> join(): this process

join() stands where Flower would start a process per message that unpacks the coordinator's app
bundle and runs it. Guarantee: only the ClientApp installed here runs; a bundle is never opened.
Other tasks and other kinds of message get a refusal. The process stays, and so does the model that
it has loaded.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.config import CoordinatorTable, Site, load_site
from fedtune.errors import ConfigError, InfrastructureError
from fedtune.flower import api
from fedtune.flower.processes import (
    Child,
    Stopped,
    bypass_proxy,
    free_port,
    interruptible,
    reachable,
    write_private,
)

Event = Callable[[str, dict[str, Any]], None]
App = Callable[[Message, Context], Message]
ANSWERED = ("query.prepare", "train")  # the kinds of message that a site answers
REFUSAL = "this site answers query.prepare and train, no more"
POLL_SECONDS = 0.2  # between two looks for a task, on loopback
GONE_SECONDS = 6.0  # a coordinator that cannot be reached for so long is not there
LONG_SECONDS = 30.0  # a SuperNode that lasted so long was waiting, not failing
BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)


def join(
    site_path: Path,
    *,
    once: bool = False,
    on_event: Event | None = None,
    client_app: ClientApp | App | None = None,
    patience: float = 90.0,
) -> None:
    """Take part in the coordinator's studies until a signal comes; reconnect as often as needed.

    once: return when a coordinator that gave this site work has gone. client_app: in place of
    client.app:app. patience: seconds to go on being refused; after a crash Flower refuses a site
    for about 60 s, until the old session has expired. Events: "joined", "answered" {kind},
    "refused" {kind}, "failed" {kind, error}, "waiting" {address}, "reconnecting" {seconds}; some
    have a text for people.
    Errors: ConfigError; InfrastructureError when the coordinator goes on refusing this site."""
    site = load_site(site_path)
    link = _coordinator(site, site_path)
    executor = _Executor(
        site_path.resolve(), client_app or _installed_app(), on_event or _ignore, once
    )
    bypass_proxy()
    try:
        with interruptible():
            failures: list[float] = []  # when, since the last success or long wait
            while True:
                began = time.monotonic()
                problem = executor.attend(site.site.state / "flower", link)
                if problem is None:
                    return
                ended = time.monotonic()
                if executor.joined or ended - began > LONG_SECONDS:
                    failures = []
                failures.append(ended)
                if not executor.joined and ended - failures[0] > patience:
                    raise problem
                wait = BACKOFF_SECONDS[min(len(failures), len(BACKOFF_SECONDS)) - 1]
                executor.tell("reconnecting", {"seconds": wait, "text": "connecting again"})
                time.sleep(wait)
    except Stopped:
        return


class _Executor:
    """Answers the tasks of one SuperNode after another."""

    def __init__(self, site_path: Path, app: ClientApp | App, tell: Event, once: bool) -> None:
        self._site_path, self._app, self.tell, self._once = site_path, app, tell, once
        self.joined = False  # whether the coordinator accepted the last SuperNode
        self._worked = False

    def attend(self, state: Path, link: CoordinatorTable) -> InfrastructureError | None:
        """Run one SuperNode until it ends, and say why; None: `once` is fulfilled."""
        secret, port = secrets.token_bytes(32), free_port()
        secret_file = write_private(state / "executor.secret", secret)
        # fmt: off
        options = [
            "--superlink", link.address, "--root-certificates", str(link.ca),
            "--auth-supernode-private-key", str(link.node_key),
            "--host", "127.0.0.1", "--port", str(port),
            "--isolation", "process", "--superexec-auth-secret-file", str(secret_file),
        ]
        # fmt: on
        self.joined, problem = False, None
        with Child("supernode", options, home=state, log=state / "supernode.log") as node:
            runtime = api.Runtime(f"127.0.0.1:{port}", secret)
            try:
                node.wait_for_port("127.0.0.1", port)
                if self._work(node, runtime, f"127.0.0.1:{port}", link.address):
                    return None
            except InfrastructureError as error:
                problem = error
            except Exception as error:  # the SuperNode ended, or waits for an answer in vain: anew
                if node.alive:
                    self.tell("failed", {"kind": "connection", "error": type(error).__name__})
            finally:
                runtime.close()
                node.stop()
            if node.said(api.SUPERNODE_REFUSED):
                if node.said("certificate verify failed"):
                    raise _distrust(link)
                return _refusal(link)
            return problem or node.ended()

    def _work(self, node: Child, runtime: api.Runtime, address: str, coordinator: str) -> bool:
        """Answer task after task: False when the SuperNode ends, True when `once` is fulfilled."""
        absence, waiting = _Absence(coordinator), False
        while node.alive:
            if not self.joined and node.said(api.SUPERNODE_JOINED):
                self.joined = True
                self.tell("joined", {"text": "connected; waiting for work"})
            if claim := runtime.acquire([api.CLIENT_APP, api.AGENT_APP]):
                self._answer(node, address, claim)
            elif self._once and self._worked:
                if absence.seconds() > GONE_SECONDS:
                    return True
            elif not (self.joined or waiting) and absence.seconds() > GONE_SECONDS:
                waiting = True
                text = f"waiting for the coordinator at {coordinator}"
                self.tell("waiting", {"address": coordinator, "text": text})
            time.sleep(POLL_SECONDS)
        return False

    def _answer(self, node: Child, address: str, claim: api.Claim) -> None:
        with api.ClientTask(address, claim, give_up=lambda: not node.alive) as task:
            message, context = task.pull()
            task.push(self.reply(claim.kind, message, context))
        self._worked = True

    def reply(self, task_kind: str, message: Message, context: Context) -> Message:
        """The installed app's reply, or a refusal; of an exception only the class is told."""
        kind = message.metadata.message_type
        if task_kind != api.CLIENT_APP or kind not in ANSWERED:
            self.tell("refused", {"kind": kind})
            return api.error_reply(message, REFUSAL)
        context.run_config = {}  # the coordinator's; the site's own file is all that counts here
        context.node_config = {"site": str(self._site_path)}
        try:
            reply = self._app(message, context)
        except Exception as error:
            self.tell("failed", {"kind": kind, "error": type(error).__name__})
            return api.error_reply(message, type(error).__name__)
        self.tell("answered", {"kind": kind, "text": f"{kind}: done; waiting for work"})
        return reply


class _Absence:
    """For how long the coordinator's port has been closed, looked at once a second."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._looked, self._since = 0.0, 0.0

    def seconds(self) -> float:
        now = time.monotonic()
        if now - self._looked > 1:
            self._looked = now
            self._since = 0.0 if reachable(self._host, self._port) else self._since or now
        return now - self._since if self._since else 0.0


def _coordinator(site: Site, path: Path) -> CoordinatorTable:
    if site.coordinator is None:
        raise ConfigError(
            f"{path}: coordinator: key is missing",
            "a [coordinator] table with address, ca and node_key",
        )
    host, colon, port = site.coordinator.address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ConfigError(f"{path}: coordinator.address: not an address", "host:port")
    for key in ("ca", "node_key"):
        if not getattr(site.coordinator, key).is_file():
            raise ConfigError(f"{path}: coordinator.{key}: no such file")
    return site.coordinator


def _refusal(link: CoordinatorTable) -> InfrastructureError:
    return InfrastructureError(
        f"the coordinator at {link.address} refuses this site",
        "a registered node key that no other process uses",
        f"give {link.node_key}.pub to the coordinator, for its nodes folder",
    )


def _distrust(link: CoordinatorTable) -> InfrastructureError:
    return InfrastructureError(
        f"the certificate of {link.address} does not verify",
        f"one for this address that {link.ca} signed",
        "ask the coordinator for its CA certificate, and for the address in its certificate",
    )


def _installed_app() -> ClientApp:
    from client.app import app

    return app


def _ignore(_name: str, _facts: dict[str, Any]) -> None:
    pass
