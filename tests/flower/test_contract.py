"""What fedtune needs of Flower's private names: their signatures, fields and behaviour.

`python -m tests.flower.releases` runs this file with one release after another. What is not asked
here may change: then nothing of ours notices."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flwr.app
import httpx
import pytest
from flwr.serverapp import Grid

from fedtune.core import boot
from fedtune.flower import private
from tests.flower.releases import USED

N = None
# How each is called: positional arguments, and those by name.
CALLS: dict[str, tuple[Callable[[], Any], int, tuple[str, ...]]] = {
    "make_message": (lambda: private.make_message, 2, ()),
    "ControlHttpClient": (lambda: private.ControlHttpClient.from_server_address, 4, ()),
    "RuntimeHttpClient": (
        lambda: private.RuntimeHttpClient.from_server_address,
        4,
        ("retry_invoker",),
    ),
    "RuntimeVersionHttpInterceptor": (lambda: private.RuntimeVersionHttpInterceptor, 1, ()),
    "RuntimeTokenHttpInterceptor": (lambda: private.RuntimeTokenHttpInterceptor, 1, ()),
    "SuperExecAuthHttpInterceptor": (
        lambda: private.SuperExecAuthHttpInterceptor,
        0,
        ("master_secret", "protected_methods"),
    ),
    "HeartbeatSender": (lambda: private.HeartbeatSender, 1, ()),
    "RetryInvoker": (
        lambda: private.RetryInvoker,
        2,
        ("max_tries", "max_time", "should_giveup"),
    ),
    "exponential": (lambda: private.exponential, 0, ("max_delay",)),
    "Fab": (lambda: private.Fab, 3, ()),
    "Run.create_empty": (lambda: private.Run.create_empty, 1, ()),
    "get_object_body": (lambda: private.get_object_body, 2, ()),
    "inflate_object_from_contents": (lambda: private.inflate_object_from_contents, 2, ()),
    "pull_and_inflate_object_from_tree": (
        lambda: private.pull_and_inflate_object_from_tree,
        3,
        ("initial_backoff", "backoff_cap", "max_tries_per_object"),
    ),
    "pull_task_input": (lambda: private.run_clientapp.pull_task_input, 1, ()),
    "push_message": (lambda: private.run_clientapp.push_message, 3, ()),
    "HttpGrid": (lambda: private.load_http_grid(), 3, ("token",)),
    "FleetHttpClient.PushObject": (lambda: private.load_supernode()[1].PushObject, 2, ()),
    "the SuperLink": (lambda: private.load_superlink()[1], 0, ()),
    "its middleware": (lambda: private.load_superlink()[0].get_middleware, 0, ()),
    "the SuperNode": (lambda: private.load_supernode()[2], 0, ()),
}
FIELDS: dict[str, tuple[str, ...]] = {
    "AcquireTaskRequest": ("supported_task_types",),
    "ConfirmMessageReceivedRequest": ("node", "run_id", "message_object_id"),
    "PullObjectRequest": ("node", "run_id", "object_id"),
    "PullTaskInputRequest": (),
    "PushObjectRequest": ("session_id", "object_id"),
    "PushObjectResponse": ("stored",),
    "PushTaskOutputRequest": ("sub_status",),
    "RegisterNodeRequest": ("public_key", "name"),
    "SendTaskHeartbeatRequest": (),
    "StartRunRequest": ("fab",),
    "ProtoMessage": ("metadata", "content"),
    "ProtoRecordDict": (),
}
CODES = {
    "LOAD_CLIENT_APP_EXCEPTION",
    "CLIENT_APP_RAISED_EXCEPTION",
    "MESSAGE_UNAVAILABLE",
    "REPLY_MESSAGE_UNAVAILABLE",
    "NODE_UNAVAILABLE",
    "CLIENT_APP_CRASHED",
}
SUPERLINK_OPTIONS = (
    *("--host", "--port", "--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile", "--database"),
    *("--enable-supernode-auth", "--isolation", "--superexec-auth-secret-file"),
    "--disable-runtime-dependency-installation",
)
SUPERNODE_OPTIONS = (
    *("--superlink", "--root-certificates", "--auth-supernode-private-key", "--host", "--port"),
    *("--isolation", "--superexec-auth-secret-file"),
)
# In place of grpc: whatever is asked of it is a class of its own, and nothing works.
WITHOUT_GRPC = """
import sys, types
class Kind(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Kind(name, (Exception,), {})
class Nothing(types.ModuleType):
    __getattr__ = Kind.__getattr__
for name in ("grpc", "grpc.aio", "grpc._channel", "grpc_health", "grpc_health.v1",
             "grpc_health.v1.health_pb2", "grpc_health.v1.health_pb2_grpc"):
    sys.modules[name] = Nothing(name)
sys.modules["grpc"].__version__ = "99.0.0"
sys.modules["grpc._utilities"] = Nothing("grpc._utilities")
sys.modules["grpc._utilities"].first_version_is_lower = lambda *given: False
from fedtune.flower import private
private.load_superlink(), private.load_supernode(), private.load_http_grid()
print("needs no service")
"""


@pytest.mark.skipif(USED not in os.environ, reason="the installed release: nobody named another")
def test_the_release_that_was_named_is_in_use_here_and_in_a_process_of_ours() -> None:
    folder = Path(os.environ[USED])
    assert Path(flwr.app.__file__).is_relative_to(folder)
    child = boot.command("timeit", "-n1", "-r1", "import flwr; print(flwr.__file__)")
    ran = subprocess.run(child, env=boot.environment(), capture_output=True, text=True)
    assert Path(ran.stdout.splitlines()[0]).is_relative_to(folder), ran.stderr


@pytest.mark.parametrize("name", private.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(private, name) is not None


@pytest.mark.parametrize("name", CALLS)
def test_each_is_called_as_before(name: str) -> None:
    of, number, names = CALLS[name]
    inspect.signature(of()).bind(*[N] * number, **dict.fromkeys(names))


def test_twin_another_signature_is_noticed() -> None:
    for wrong in (lambda address: 0, lambda address, insecure, ca, interceptors, token: 0):
        with pytest.raises(TypeError):
            inspect.signature(wrong).bind(N, N, N, N)


@pytest.mark.parametrize("name", FIELDS)
def test_each_message_has_its_fields(name: str) -> None:
    made = getattr(private, name)()
    assert set(FIELDS[name]) <= set(made.DESCRIPTOR.fields_by_name)


def test_replies_are_asked_for_by_what_they_answer() -> None:
    request = private.pull_replies(["a", "b"])
    held = getattr(request, "message_ids", None)
    if held is None:
        newer: Any = request
        held = newer.reply_to_message_ids.vals
    assert list(held) == ["a", "b"]
    assert private.pull_replies([]).ByteSize() <= 2  # 1.43: a list that is empty, and not none


def test_constants_are_what_they_mean() -> None:
    assert {code for code in CODES if isinstance(getattr(private.ErrorCode, code), int)} == CODES
    assert isinstance(private.SUPERLINK_NODE_ID, int)
    assert private.SYSTEM_TIME_TOLERANCE > 0 and private.TIMESTAMP_TOLERANCE > 0
    kinds = {private.TaskType.SERVER_APP, private.TaskType.CLIENT_APP, private.TaskType.AGENT_APP}
    assert len(kinds) == 3
    assert private.SubStatus.FAILED != private.SubStatus.COMPLETED


def message() -> flwr.app.Message:
    metadata = flwr.app.Metadata(
        run_id=7,
        message_id="",
        src_node_id=private.SUPERLINK_NODE_ID,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="1",
        created_at=time.time(),
        ttl=60.0,
        message_type="train",
        src_task_id=3,
    )
    content = flwr.app.RecordDict({"c": flwr.app.ConfigRecord({"round": 1})})
    return private.make_message(metadata, content)


def test_a_message_survives_protobuf() -> None:
    packed = private.message_to_proto(message()).SerializeToString()
    again = private.message_from_proto(private.ProtoMessage.FromString(packed))
    assert again.metadata.dst_node_id == 2 and again.metadata.run_id == 7
    content = private.ProtoRecordDict.FromString(
        private.recorddict_to_proto(message().content).SerializeToString()
    )
    assert private.recorddict_from_proto(content)["c"]["round"] == 1
    again.metadata.__dict__["_message_id"] = "id"  # as HttpGrid and replies.py set it
    assert again.metadata.message_id == "id"


def test_an_object_is_taken_apart_and_put_together() -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

    sent = message()
    objects = {name: each.deflate() for name, each in get_all_nested_objects(sent).items()}
    names = [each.object_id for each in private.iterate_object_tree(get_object_tree(sent))]
    assert set(names) == set(objects)
    for content in objects.values():
        kind, children, _ = private.get_object_head_values_from_object_content(content)
        assert kind in private.inflatable and set(children) <= set(objects)
        private.get_object_body(content, private.inflatable[kind])
    again = private.inflate_object_from_contents(sent.object_id, objects)
    assert isinstance(again, flwr.app.Message) and again.content["c"]["round"] == 1


def test_a_bundle_and_a_run_are_made() -> None:
    fab = private.fab_to_proto(private.Fab("ab", b"bundle", {}))
    assert private.StartRunRequest(fab=fab).fab.content == b"bundle"
    assert private.Run.create_empty(7).run_id == 7
    assert callable(private.run_from_proto)


def test_a_request_that_fails_is_repeated_until_somebody_gives_up() -> None:
    tried: list[int] = []

    def fails() -> None:
        tried.append(1)
        raise httpx.ConnectError("no")

    patience = private.RetryInvoker(
        lambda: private.exponential(max_delay=5),
        httpx.HTTPError,
        max_tries=None,
        max_time=600.0,
        should_giveup=lambda error: len(tried) == 1,
    )
    with pytest.raises(httpx.ConnectError):
        patience.invoke(fails)
    patience.max_tries = 1  # set later, as at the end of a run
    assert len(tried) == 1


def test_a_heartbeat_is_told_whether_it_arrived() -> None:
    sender = private.HeartbeatSender(lambda: True)
    sender.start()
    assert sender.is_running
    sender.stop()
    assert not sender.is_running


def test_an_interceptor_adds_a_header() -> None:
    """`_Key` in api.py: the context holds the request, and the next call takes the context."""
    assert "request" in inspect.get_annotations(private.ProtobufRequestContext)


def test_a_grid_has_the_parts_that_are_replaced() -> None:
    """Methods of the public class that replies.py and the loopback grid lean on, and what api.py
    replaces in HttpGrid."""
    made = private.load_http_grid()("127.0.0.1:1", False, b"", token="t")
    assert hasattr(made, "_retry_invoker") and hasattr(type(made), "_runtime_client")
    assert hasattr(made, "node") and made.node.node_id == private.SUPERLINK_NODE_ID
    assert issubclass(type(made), Grid)
    inspect.signature(made.set_run).bind(N)
    inspect.signature(made.pull_messages).bind(["a"])
    inspect.signature(made.push_messages).bind([message()])
    inspect.signature(made.get_nodes).bind()
    inspect.signature(made.close).bind()
    inspect.signature(Grid.create_message).bind(N, N, "train", 2, "1", ttl=1.0)


def test_a_supernode_sleeps_by_its_module_time_and_pulls_by_a_name_that_is_replaced() -> None:
    loop, _, _ = private.load_supernode()
    assert loop.time.sleep is time.sleep
    assert "pull_and_inflate_object_from_tree" in vars(private.run_clientapp)
    assert private.run_clientapp.pull_task_input.__globals__ is vars(private.run_clientapp)


def test_what_a_supernode_logs_is_what_the_courier_looks_for() -> None:
    from fedtune.flower import api

    loop, _, _ = private.load_supernode()
    package = sys.modules[loop.__name__.rpartition(".")[0]].__path__[0]
    said = subprocess.run(
        ["grep", "-rhoF", "--include=*.py", *(f"-e{line}" for line in texts(api)), package],
        capture_output=True,
        text=True,
    )
    assert set(said.stdout.splitlines()) == set(texts(api))


def texts(api: Any) -> tuple[str, ...]:
    return (api.SUPERNODE_JOINED, *api.SUPERNODE_REFUSED)


@pytest.mark.parametrize(
    ("program", "options"),
    [("superlink", SUPERLINK_OPTIONS), ("supernode", SUPERNODE_OPTIONS)],
)
def test_the_programs_know_the_options_that_are_given(
    program: str, options: tuple[str, ...]
) -> None:
    load = "load_superlink()[1]" if program == "superlink" else "load_supernode()[2]"
    code = "import sys; sys.argv = ['x', '--help']; from fedtune.flower import private; private."
    code += f"{load}()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert {option for option in options if option not in shown} == set()


def test_no_name_is_of_a_grpc_service() -> None:
    """With a grpc in which nothing works, all of it loads: a release without gRPC services takes
    nothing from us. Twin: Flower's own gRPC servers do not."""
    ran = subprocess.run([sys.executable, "-c", WITHOUT_GRPC], capture_output=True, text=True)
    assert ran.stdout.strip() == "needs no service", ran.stderr[-2000:]
    serve = "from flwr.supercore.grpc_health import run_health_server_grpc_no_tls as run"
    code = f"{WITHOUT_GRPC}\n{serve}\nrun('127.0.0.1:0')\nprint('served')"
    twin = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "served" not in twin.stdout
