"""Import the names of Flower that are not in its public API. No other file imports them.

tests/flower/test_contract.py states what fedtune needs of each name, and `make flower` tests this
with every release of Flower. None of the names belongs to a gRPC service. If the import of a name
loads a web server, a function imports it, only when it is needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app.message import make_message
from flwr.common.constant import (
    SUPERLINK_NODE_ID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
    SubStatus,
)
from flwr.common.serde import (
    fab_to_proto,
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
    recorddict_to_proto,
    run_from_proto,
)
from flwr.proto import recorddict_pb2
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry as inflatable
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime import run_clientapp

__all__ = [
    "SUPERLINK_NODE_ID",
    "SYSTEM_TIME_TOLERANCE",
    "TIMESTAMP_TOLERANCE",
    "AcquireTaskRequest",
    "ConfirmMessageReceivedRequest",
    "ControlHttpClient",
    "ErrorCode",
    "Fab",
    "HeartbeatSender",
    "ProtoMessage",
    "ProtoRecordDict",
    "ProtobufCall",
    "ProtobufRequestContext",
    "PullAppMessagesRequest",
    "PullObjectRequest",
    "PullTaskInputRequest",
    "PushObjectRequest",
    "PushObjectResponse",
    "PushTaskOutputRequest",
    "RegisterNodeRequest",
    "RetryInvoker",
    "Run",
    "RuntimeHttpClient",
    "RuntimeTokenHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "SendTaskHeartbeatRequest",
    "StartRunRequest",
    "SubStatus",
    "SuperExecAuthHttpInterceptor",
    "TaskType",
    "exponential",
    "fab_to_proto",
    "get_object_body",
    "get_object_head_values_from_object_content",
    "inflatable",
    "inflate_object_from_contents",
    "iterate_object_tree",
    "load_http_grid",
    "load_superlink",
    "load_supernode",
    "make_message",
    "message_from_proto",
    "message_to_proto",
    "pull_and_inflate_object_from_tree",
    "pull_replies",
    "recorddict_from_proto",
    "recorddict_to_proto",
    "run_clientapp",
    "run_from_proto",
]


def load_superlink() -> tuple[Any, Any]:
    """Import what is needed to run a SuperLink. Return two things: the module whose get_middleware
    the SuperLink calls, and the SuperLink's main function."""
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink

    return extensions, flower_superlink


def load_supernode() -> tuple[Any, Any, Any]:
    """Import what is needed to run a SuperNode. Return three things: the module with the
    SuperNode's loop, the class of the client by which it reaches the SuperLink, and the SuperNode's
    main function."""
    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode
    from flwr.supernode.fleet_http_client import FleetHttpClient

    return start_client_internal, FleetHttpClient, flower_supernode


def load_http_grid() -> Any:
    """Import and return the class of Flower's Grid over HTTP, through which a ServerApp sends
    messages. This import also loads the SuperLink's web server."""
    from flwr.superlink.grid import HttpGrid

    return HttpGrid


def pull_replies(asked: Iterable[str]) -> PullAppMessagesRequest:
    """Build the request that asks a SuperLink for replies. asked: the ids of the messages whose
    replies are wanted. Flower 1.43 renamed the request's field and made it a StringList; both forms
    are supported."""
    if "message_ids" in PullAppMessagesRequest.DESCRIPTOR.fields_by_name:
        return PullAppMessagesRequest(message_ids=list(asked))
    texts: Any = recorddict_pb2.StringList(vals=list(asked))
    newer: Any = PullAppMessagesRequest
    request: PullAppMessagesRequest = newer(reply_to_message_ids=texts)
    return request
