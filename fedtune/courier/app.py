"""Define the ClientApp, which passes the coordinator's messages to the vault as requests, and sends
the vault's answers back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.core.wire.requests import FAILED, Answer, Kind, Request
from fedtune.flower import api
from fedtune.flower.records import as_record

Ask = Callable[[Context, Request, float], Answer]  # the float: seconds to wait for the answer
# Type of Flower's message -> the kind of request, and the name of the message's array record.
ASKED: Mapping[str, tuple[Kind, str]] = {
    "query.prepare": ("prepare", "frozen"),
    "train": ("train", "adapter"),
    "train.ready": ("ready", "adapter"),
    "train.masked": ("masked", ""),
    "query.evaluate": ("evaluate", "adapter"),
}


def client_app(ask: Ask) -> ClientApp:
    """Build the Flower app that passes each of the coordinator's messages on as a request, and
    replies with the vault's answer. ask: a function that sends a request to the vault and returns
    the answer; it takes Flower's context, the request, and how many seconds the coordinator
    waits."""
    app = ClientApp()

    def pass_on(message: Message, context: Context) -> Message:
        seconds = message.metadata.ttl
        return as_message(ask(context, as_request(message), seconds), message)

    app.query("prepare")(pass_on)
    app.train()(pass_on)
    app.train("ready")(pass_on)
    app.train("masked")(pass_on)
    app.query("evaluate")(pass_on)
    return app


def as_request(message: Message) -> Request:
    """Convert a coordinator's message to a request for the vault, without parsing its arrays.
    message: a message whose type is in `ASKED`."""
    kind, arrays = ASKED[message.metadata.message_type]
    brought = message.content.array_records.get(arrays, ArrayRecord())
    return Request(kind, message.content.config_records, brought)


def as_message(answer: Answer, message: Message) -> Message:
    """Convert the vault's answer to the reply to `message`. An answer that only reports a failure
    becomes a Flower error."""
    if not answer.table:
        return api.error_reply(message, FAILED)
    content = RecordDict()
    if answer.arrays_name:
        content[answer.arrays_name] = as_record(answer.arrays)
    content[answer.table] = ConfigRecord(dict(answer.fields))
    return Message(content, reply_to=message)
