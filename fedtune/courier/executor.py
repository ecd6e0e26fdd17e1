"""Answer the tasks that the coordinator gives this site through Flower's SuperNode (the client
process of Flower), and start a new SuperNode whenever one ends.

    gateway <── forwarder <── SuperNode ── loopback, secret ──> Executor: this process

For each message Flower would start a process that unpacks the coordinator's app bundle and runs it.
The executor replaces this process. Guarantee: only the given app runs, and a bundle is never
opened. Other tasks and other types of message are refused."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.core.errors import InfrastructureError
from fedtune.core.files.writing import replace
from fedtune.core.processes import Child
from fedtune.core.progress import OnEvent
from fedtune.core.wire.requests import FAILED
from fedtune.courier.app import ASKED
from fedtune.flower import api
from fedtune.flower.forwarder import Forwarder
from fedtune.flower.link import Link
from fedtune.flower.packing import pack, size, unpack
from fedtune.flower.polling import Poll
from fedtune.flower.ports import free_port

App = Callable[[Message, Context], Message]
SAID = 4_096  # bytes of the end of a SuperNode's log that are copied to this process's log
REFUSAL = f"this site answers {', '.join(ASKED)}, no more"
POLL_SECONDS = (0.05, 0.5)  # shortest and longest pause between two polls for a task
GONE_SECONDS = 6.0  # without an answer for so long, the coordinator counts as gone
LONGEST = 100  # characters of the type of a message that is refused
LONG_SECONDS = 30.0  # a SuperNode that ran for longer does not count as a failure
BACKOFF_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)


class Executor:
    """Answers the tasks of one SuperNode (Flower's client process) after another.

    - app: Flower's ClientApp, or a function that returns the reply to a message
    - notify: called with each event: a connection, an answer, a refusal, a failure
    - once: whether the work is done when the coordinator has given this site at least one task, and
      is then no longer there"""

    def __init__(self, app: ClientApp | App, notify: OnEvent, once: bool = False) -> None:
        self._app = app
        self.notify = notify
        self._once = once
        self.joined = False  # whether the coordinator has accepted the present SuperNode
        self._worked = False

    def run_supernodes(self, state: Path, forwarder: Forwarder, patience: float) -> None:
        """Run one SuperNode after another without end; but if the executor was made with `once`,
        return when the coordinator has gone.

        - state: the folder of the SuperNode's log and of its secret for this process
        - forwarder: the running connection to the coordinator's gateway
        - patience: seconds for which to try again while the coordinator does not accept this site

        Errors: InfrastructureError if the coordinator has accepted no SuperNode for `patience`
        seconds since the first failure, or the gateway's certificate does not verify."""
        failures: list[float] = []  # times of the failures since the last success or long run
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
        """Run one SuperNode until it ends, and return the reason as an error. Return None if the
        work is done: `once` was set, and the coordinator has gone.

        - state: the folder of the SuperNode's log and of its secret for this process
        - forwarder: the running connection to the coordinator's gateway

        Errors: InfrastructureError if the gateway's certificate does not verify."""
        self.joined, problem = False, None
        if forwarder.refusal:
            return _refusal(forwarder)  # the forwarder asks again, and notices if this changes
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
            except Exception as error:  # the SuperNode or a call to it failed: start another
                if node.alive and not _was_refused(node):
                    self._report_failure("connection", error)
            finally:
                runtime.close()
                refused = _was_refused(node)  # asked before `stop`, which logs the same
                node.stop()
            if forwarder.distrust:
                raise _distrust(forwarder.link)
            if forwarder.refusal or refused:
                return _refusal(forwarder)
            _say_log(node)  # into courier.log, which a person can read
            ended = problem or node.build_end_error()
            return InfrastructureError(
                ended.happened, ended.expected, f"read {state / 'courier.log'}"
            )

    def _work(self, node: Child, runtime: api.Runtime, address: str, forwarder: Forwarder) -> bool:
        """Answer the tasks of one SuperNode. Return False when the SuperNode has ended or the
        gateway refuses this site, and True when the work is done (`once`).

        - node: the SuperNode's process
        - runtime: the client of the SuperNode's API, which gives out the tasks
        - address: the HOST:PORT of this API on loopback
        - forwarder: the running connection to the gateway, which tells whether the coordinator is
          there"""
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
                    text = f"the coordinator at {coordinator} is not there; waiting for it; "
                    facts = {"address": coordinator, "gone": True, "text": text + "Ctrl-C ends"}
                    self.notify("waiting", facts)
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
        """Return the app's reply to a task's message. If the task is refused, or the app raises an
        exception, return an error reply with a fixed text. The app does not see the settings that
        the coordinator put into `context`.

        - task_kind: Flower's type of the task; only CLIENT_APP is answered
        - message: the coordinator's message, which is refused unless its type is in ASKED
        - context: Flower's context, whose settings are emptied"""
        kind = message.metadata.message_type
        if task_kind != api.CLIENT_APP or kind not in ASKED:
            kind = kind[:LONGEST]  # the coordinator's words
            self.notify("refused", {"kind": kind, "text": f"REFUSED {kind}: {REFUSAL}"})
            return api.error_reply(message, REFUSAL)
        context.run_config, context.node_config = {}, {}
        try:
            received = unpack(message)
            reply = self._app(received, context)
        except Exception as error:
            self._report_failure(kind, error)
            return api.error_reply(message, FAILED)
        if not reply.has_error():
            moved = {"bytes_down": size(received.content), "bytes_up": size(reply.content)}
            self.notify("answered", {"kind": kind, "text": f"{kind}: answered", **moved})
        return reply

    def _report_failure(self, kind: str, error: Exception) -> None:
        name = type(error).__name__
        self.notify("failed", {"kind": kind, "error": name, "text": f"{kind}: FAILED: {name}"})


def _was_refused(node: Child) -> bool:
    return any(map(node.has_logged, api.SUPERNODE_REFUSED))


def _refusal(forwarder: Forwarder) -> InfrastructureError:
    why, ahead = forwarder.refusal, forwarder.ahead
    early, late = api.CLOCK_WINDOW
    is_out = not -late < ahead < -early  # if so, the SuperLink refuses the node's signed requests
    if is_out and not why:
        direction = "ahead of" if ahead > 0 else "behind"
        why = f"this site's clock is {abs(ahead):.0f} s {direction} the coordinator's"
    why = f" ({why})" if why else ""
    if forwarder.clock or is_out:
        return InfrastructureError(
            f"no connection to the coordinator at {forwarder.link.address}{why}",
            "clocks that agree, at this site and at the coordinator",
            "set the clocks of both ends (NTP); `fedtune doctor` compares them",
        )
    return InfrastructureError(
        f"the coordinator at {forwarder.link.address} refuses this site{why}",
        "an admitted site whose keys no other process uses",
        "run `fedtune enroll` again, and have the request admitted",
    )


def _distrust(link: Link) -> InfrastructureError:
    return InfrastructureError(
        f"the certificate of {link.address} does not verify",
        "a certificate for this address, signed by the CA in the coordinator's answer",
        "ask the coordinator to start its server with --name and this address, or to send a new "
        "answer; a proxy that decrypts TLS must pass this address on unopened",
    )


def _say_log(node: Child) -> None:
    """Print the end of a SuperNode's log to this process's log, since the SuperNode's own log is
    deleted when it ends."""
    with suppress(OSError):
        print(node.log.read_bytes()[-SAID:].decode(errors="replace"), flush=True)
