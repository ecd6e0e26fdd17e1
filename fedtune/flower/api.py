"""Call the parts of Flower that are not in its public API; fedtune/flower/private.py imports them.
These parts are the reason why fedtune requires flwr 1.42.

Flower's Runtime API gives out tasks. The Runtime API of a SuperLink gives out a ServerApp task for
each run; that of a SuperNode gives out a ClientApp task for each message. The process that claims
a task holds the task's token, keeps the task alive with heartbeats, and reports how it ended."""

from __future__ import annotations

import hmac
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
from flwr.app import DEFAULT_TTL, Context, Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from fedtune.flower.polling import Impatient
from fedtune.flower.private import (
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_TOLERANCE,
    AcquireTaskRequest,
    ConfirmMessageReceivedRequest,
    ControlHttpClient,
    ErrorCode,
    Fab,
    HeartbeatSender,
    ProtobufCall,
    ProtobufRequestContext,
    ProtoMessage,
    ProtoRecordDict,
    PullObjectRequest,
    PullTaskInputRequest,
    PushObjectRequest,
    PushObjectResponse,
    PushTaskOutputRequest,
    RegisterNodeRequest,
    RetryInvoker,
    Run,
    RuntimeHttpClient,
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SendTaskHeartbeatRequest,
    StartRunRequest,
    SubStatus,
    SuperExecAuthHttpInterceptor,
    TaskType,
    exponential,
    fab_to_proto,
    get_object_body,
    get_object_head_values_from_object_content,
    inflatable,
    inflate_object_from_contents,
    iterate_object_tree,
    load_http_grid,
    load_superlink,
    load_supernode,
    make_message,
    message_from_proto,
    message_to_proto,
    pull_and_inflate_object_from_tree,
    pull_replies,
    recorddict_from_proto,
    recorddict_to_proto,
    run_clientapp,
    run_from_proto,
)

__all__ = [
    "AGENT_APP",
    "CLIENT_APP",
    "CLOCK_WINDOW",
    "SERVER_APP",
    "SUPERLINK_NODE_ID",
    "SUPERNODE_JOINED",
    "SUPERNODE_REFUSED",
    "Claim",
    "ClientTask",
    "ConfirmMessageReceivedRequest",
    "ErrorCode",
    "ProtoMessage",
    "ProtoRecordDict",
    "PullObjectRequest",
    "Run",
    "Runtime",
    "create_message",
    "error_reply",
    "get_object_body",
    "get_object_head_values_from_object_content",
    "inflatable",
    "inflate_object_from_contents",
    "iterate_object_tree",
    "make_message",
    "make_resumable",
    "message_from_proto",
    "message_to_proto",
    "node_keys",
    "pull_replies",
    "recorddict_from_proto",
    "recorddict_to_proto",
    "register",
    "run_program",
    "server_grid",
    "start_run",
]

SERVER_APP = TaskType.SERVER_APP
CLIENT_APP = TaskType.CLIENT_APP
AGENT_APP = TaskType.AGENT_APP
SUPERNODE_JOINED = "SuperNode ID: "  # what a SuperNode logs once the SuperLink has accepted it
# What a SuperNode logs if the SuperLink does not accept it. After a 401 it interrupts itself and
# logs only the second line.
SUPERNODE_REFUSED = (
    "Failed to initialize the connection to the SuperLink",
    "SuperNode terminated gracefully.",
)
# How many seconds the SuperLink's clock may be past a node's signed timestamp: (least, most).
CLOCK_WINDOW = (-SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE)
CONTROL_HEADER = "x-fedtune-control"
OUTAGE_SECONDS = 600.0  # how long requests to a silent SuperLink or SuperNode are repeated
# A task is given out before all parts of its message have arrived. Flower would look for them again
# after 1 s and then 2 s.
_soon: Any = {"initial_backoff": 0.02, "backoff_cap": 0.5, "max_tries_per_object": None}
_pull = partial(pull_and_inflate_object_from_tree, **_soon)
run_clientapp.pull_and_inflate_object_from_tree = _pull  # type: ignore[attr-defined]


def run_program(name: Literal["superlink", "supernode"]) -> None:
    """Run Flower's SuperLink or SuperNode, with fedtune's changes, until it ends. The program
    reads its options from sys.argv."""
    if name == "superlink":
        extensions, flower_superlink = load_superlink()
        from starlette.middleware import Middleware  # only here: this import takes long, too

        at = sys.argv.index("--superexec-auth-secret-file") + 1
        locked = Middleware(Locked, _control_key(Path(sys.argv[at]).read_bytes()))
        extensions.get_middleware = lambda: (locked,)
        flower_superlink()
    else:
        start_client_internal, client, flower_supernode = load_supernode()
        start_client_internal.time = Impatient()
        client.PushObject = make_resumable(client.PushObject)
        flower_supernode()


class Locked:
    """An ASGI wrapper around a SuperLink that refuses requests without the coordinator's secret.
    The routes in OPEN are excepted, since they authenticate their callers themselves: a site's
    calls are signed by its node key, and calls of a process that executes tasks carry the secret or
    a task's token.

    Without this wrapper, everybody with an account on this machine could call Flower's Control API,
    which registers nodes and starts, stops and lists runs.

    app: the ASGI application of the SuperLink. key: the text, derived from the secret, that a
    caller must send in CONTROL_HEADER."""

    OPEN = ("/v1/fleet/", "/v1/runtime/")

    def __init__(self, app: Callable[..., Awaitable[None]], key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan" and not scope["path"].startswith(self.OPEN):
            secret = dict(scope["headers"]).get(CONTROL_HEADER.encode(), b"")
            if not hmac.compare_digest(secret, self._key):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
        await self._app(scope, receive, send)


class _Key:
    """An interceptor of Flower's HTTP client that adds to each request the key that a locked
    SuperLink requires (see Locked). secret: the SuperLink's secret."""

    def __init__(self, secret: bytes) -> None:
        self._key = _control_key(secret)

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[CONTROL_HEADER] = self._key
        return call_next(context)


def _control_key(secret: bytes) -> str:
    return hmac.digest(secret, b"fedtune control", "sha256").hex()


Push = Callable[[Any, PushObjectRequest], PushObjectResponse]


def make_resumable(push: Push) -> Push:
    """Wrap the function by which a SuperNode pushes one part of a message, so that after a broken
    connection only this part is sent again. Return the new function. push: Flower's own function.

    The wrapper corrects two reactions of Flower. If an answer is lost, Flower sends the part again.
    If the part had arrived, the SuperLink answers that it expects no such part, and Flower drops
    the whole message; the wrapper instead answers a repeated part with "stored". If a connection
    breaks during TLS, Flower takes this for a certificate that does not verify, and gives up; the
    wrapper replaces the error by one after which Flower tries again. If a part is really lost, the
    coordinator notices that it is missing and asks for the update again."""
    begun: set[tuple[str, str]] = set()

    def again(client: Any, request: PushObjectRequest) -> PushObjectResponse:
        part = (request.session_id, request.object_id)
        repeated = part in begun
        begun.add(part)
        try:
            answer = push(client, request)
        except (httpx.ReadError, httpx.WriteError) as error:
            raise type(error)("the connection broke off") from None
        begun.discard(part)
        return PushObjectResponse(stored=True) if repeated else answer

    return again


@dataclass(frozen=True)
class Claim:
    """A task that this process has claimed.

    - kind: the kind of task
    - token: a secret text that authenticates calls about this task"""

    kind: str
    token: str


class Runtime:
    """A client of a Runtime API, which gives out tasks to callers that have the secret.

    - address: HOST:PORT of the API
    - secret: the secret of the SuperLink or SuperNode; a caller must prove that it has it to get a
      task
    - ca: the CA (PEM) of the server's certificate; with None the client uses plain HTTP, which is
      for loopback only"""

    def __init__(self, address: str, secret: bytes, ca: bytes | None = None) -> None:
        self._client = RuntimeHttpClient.from_server_address(
            address,
            ca is None,
            ca,
            [
                RuntimeVersionHttpInterceptor("fedtune"),
                SuperExecAuthHttpInterceptor(
                    master_secret=secret,
                    protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
                ),
            ],
        )

    def acquire(self, kinds: Sequence[str]) -> Claim | None:
        """Claim the oldest pending task of these kinds and return it; None if there is none.
        Errors: httpx.HTTPError."""
        reply = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=list(kinds)))
        if not (reply.HasField("task") and reply.token):
            return None
        return Claim(reply.task.type, reply.token)

    def close(self) -> None:
        self._client.close()


def register(address: str, ca: bytes, secret: bytes, nodes: dict[str, bytes]) -> None:
    """Register sites at a SuperLink, so that it accepts their SuperNodes.

    - address: HOST:PORT of the SuperLink
    - ca: the certificate (PEM) by which the SuperLink's own certificate is checked
    - secret: the secret of the locked SuperLink (see Locked), from which the key in each request is
      derived
    - nodes: name of a site -> its public node key (PEM)

    Errors: httpx.HTTPError."""
    with _control(address, ca, secret) as control:
        for name, key in nodes.items():
            control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))


def start_run(address: str, ca: bytes, secret: bytes, bundle: bytes, digest: str) -> None:
    """Start a run at a new SuperLink. The run's ServerApp task can then be claimed.

    - address: HOST:PORT of the SuperLink
    - ca: the certificate (PEM) by which the SuperLink's own certificate is checked
    - secret: the secret of the locked SuperLink (see Locked), from which the key in each request is
      derived
    - bundle: a Flower app bundle (a zip archive)
    - digest: the bundle's sha256 in hexadecimal

    Errors: httpx.HTTPError."""
    # Import the module of the Grid now: on a busy machine this takes longer than the half minute
    # without a heartbeat after which a claimed task is lost.
    load_http_grid()
    with _control(address, ca, secret) as control:
        control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, bundle, {}))))


def _control(address: str, ca: bytes, secret: bytes) -> ControlHttpClient:
    interceptors: list[Any] = [RuntimeVersionHttpInterceptor("fedtune"), _Key(secret)]
    return ControlHttpClient.from_server_address(address, False, ca, interceptors)


@contextmanager
def server_grid(
    address: str, ca: bytes, claim: Claim, give_up: Callable[[], bool]
) -> Iterator[Grid]:
    """A context manager: open the Grid of a claimed ServerApp task, i.e. Flower's object through
    which a coordinator sends messages to sites, and yield it. At the end of the block the run ends,
    too.

    - address: HOST:PORT of the SuperLink
    - ca: the certificate (PEM) by which the SuperLink's own certificate is checked
    - claim: the task, as `Runtime.acquire` returned it
    - give_up: called after each failed request. A request that failed for a temporary reason is
      repeated for OUTAGE_SECONDS, or until give_up() returns True.

    The Grid's messages belong to this run and task."""
    logging.getLogger("flwr").setLevel(logging.WARNING)  # Flower's own handler shows more
    grid = load_http_grid()(address, False, ca, token=claim.token)
    grid._retry_invoker = _patience(give_up)
    client = grid._runtime_client
    reply = client.PullTaskInput(PullTaskInputRequest())
    own = partial(create_message, reply.run.run_id, reply.task_id)
    grid.create_message = own
    grid.set_run(run_from_proto(reply.run))
    status = SubStatus.FAILED
    try:
        with _heartbeat(client):
            yield grid
        status = SubStatus.COMPLETED
    finally:
        grid._retry_invoker.max_tries = 1
        _finish(client, status)
        grid.close()


def node_keys(grid: Grid) -> dict[int, str]:
    """Return the public key (PEM) of each connected node: a dict from the node's number to its key.
    The SuperLink has verified the keys. Errors: httpx.HTTPError."""
    return {node.node_id: node.public_key.decode() for node in grid.get_nodes()}


class ClientTask:
    """A claimed task at a site's own SuperNode: `pull` fetches its message, and `push` sends the
    reply. As a context manager it keeps the task alive during the block, and ends the task at the
    end of it.

    - address: HOST:PORT of the SuperNode's Runtime API, on loopback
    - claim: the task, as `Runtime.acquire` returned it
    - give_up: called after each failed request. A request that failed for a temporary reason is
      repeated for OUTAGE_SECONDS, or until give_up() returns True: a reply may hold an update on
      which ε was spent.

    The task's input also holds the app bundle, which is never opened."""

    def __init__(self, address: str, claim: Claim, give_up: Callable[[], bool]) -> None:
        self._patience = _patience(give_up)
        self._client = RuntimeHttpClient.from_server_address(
            address,
            True,
            None,
            [RuntimeVersionHttpInterceptor("fedtune"), RuntimeTokenHttpInterceptor(claim.token)],
            retry_invoker=self._patience,
        )
        self._alive = _heartbeat(self._client)
        self._status = SubStatus.FAILED

    def pull(self) -> tuple[Message, Context]:
        """Fetch the task's input. Return two things: the message to answer, and Flower's context
        for the ClientApp. Errors: httpx.HTTPError."""
        message, self._context, _, _ = run_clientapp.pull_task_input(self._client)
        return message, self._context

    def push(self, reply: Message) -> None:
        """Send the reply to the SuperNode. Errors: httpx.HTTPError."""
        run_clientapp.push_message(self._client, reply, self._context)
        self._status = SubStatus.COMPLETED

    def __enter__(self) -> ClientTask:
        self._alive.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._patience.max_tries = 1
        self._alive.__exit__(None, None, None)
        _finish(self._client, self._status)
        self._client.close()


def error_reply(message: Message, reason: str) -> Message:
    """Build a reply that tells the coordinator of an error. message: the message that it answers;
    reason: a fixed text that says nothing about records, since it leaves the site."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def _patience(give_up: Callable[[], bool]) -> RetryInvoker:
    """Return a policy for Flower's clients: a request that fails for a temporary reason is repeated
    for OUTAGE_SECONDS, or until give_up() returns True. It replaces Flower's own policy, which
    never gives up, and which sends SIGINT to this process if a task is lost."""
    return RetryInvoker(
        lambda: exponential(max_delay=5),
        httpx.HTTPError,
        max_tries=None,
        max_time=OUTAGE_SECONDS,
        should_giveup=lambda error: give_up() or not _passing(error),
    )


def create_message(
    run_id: int,
    task_id: int | None,
    content: RecordDict,
    message_type: str,
    dst_node_id: int,
    group_id: str,
    ttl: float | None = None,
) -> Message:
    """Create a message of a coordinator's run and task. Flower's own function takes both from
    variables of the process, which does not fit a coordinator whose process has several runs, one
    for each study.

    - run_id: the number of the run
    - task_id: the number of the claimed ServerApp task; None in a simulation, which has no tasks
    - content: the records of the message
    - message_type: what the message asks the site to do, such as "train" or "query.prepare"
    - dst_node_id: the number of the node that receives the message
    - group_id: a text that the messages of one exchange share, such as the round's number
    - ttl: for how many seconds the message and its reply are valid; None for Flower's DEFAULT_TTL

    Returns the message without an id, which it gets when it is pushed."""
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=dst_node_id,
        reply_to_message_id="",
        group_id=group_id,
        created_at=time.time(),
        ttl=DEFAULT_TTL if ttl is None else ttl,
        message_type=message_type,
        src_task_id=task_id,
    )
    return make_message(metadata, content)


@contextmanager
def _heartbeat(client: RuntimeHttpClient) -> Iterator[None]:
    """A context manager: send heartbeats while the block runs, so that the client's task stays
    alive."""
    sender = HeartbeatSender(partial(_beat, client))
    sender.start()
    try:
        yield
    finally:
        if sender.is_running:
            sender.stop()


def _beat(client: RuntimeHttpClient) -> bool:
    """Send a heartbeat. Return True if it arrived, and False if it failed for a temporary reason.
    If it failed for good, since the task no longer exists, return True as well: Flower would send
    SIGINT to this process after a failure."""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPError as error:
        return not _passing(error)
    return True


def _finish(client: RuntimeHttpClient, status: str) -> None:
    with suppress(httpx.HTTPError):  # the API, and with it the task, may have ended
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=status))


def _passing(error: Exception) -> bool:
    """Return whether an error of a request is temporary, so that the same request may succeed
    later."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in {502, 503, 504}
    return isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower()
