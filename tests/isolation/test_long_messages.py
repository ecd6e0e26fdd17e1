"""Neither half of a site ends for a coordinator's message that is odd, or longer than it reads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedtune.core.vault import process as vault_process
from fedtune.core.vault import rank_process
from fedtune.core.wire import events, requests
from fedtune.core.wire.arrays import pack_arrays
from fedtune.core.wire.requests import FAILED, Answer, Request, RequestError
from fedtune.core.wire.spool import Spool
from fedtune.courier.app import client_app
from fedtune.courier.executor import Executor
from fedtune.courier.process import by_file, by_socket
from fedtune.flower import api
from fedtune.flower.packing import PACKED
from fedtune.launch.event_reader import EventReader

FEW, WORDS, BYTES = 8, 4000, 5000  # bounds of this file's messages, so that they are short


@pytest.fixture(autouse=True)
def short_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MOST_ARRAYS", FEW)
    monkeypatch.setattr(requests, "MOST_WORDS", WORDS)
    monkeypatch.setattr(requests, "MOST_BYTES", BYTES)


class Vault:
    """A vault's own loop, in a thread; its answers are made up."""

    def __init__(self) -> None:
        courier, end = Pipe()
        self.courier: Connection = courier
        self.told: list[str] = []

        def run() -> None:
            tell: Any = lambda event, _: self.told.append(event)  # noqa: E731
            with closing(end):
                vault_process.serve(Path("site.toml"), end, tell, 1, {})

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.courier.close()
        self._thread.join(60)
        assert not self._thread.is_alive()


ANSWER = Answer("site", {"status": "void", "reason": ""})


@pytest.fixture()
def vault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vault]:
    monkeypatch.setattr(rank_process, "team", lambda *_: nullcontext())
    monkeypatch.setattr(vault_process, "answer_and_tell", lambda *_: ANSWER)
    with closing(Vault()) as running:
        yield running


def message(content: RecordDict, kind: str = "train") -> Message:
    return api.create_message(1, 1, content, kind, 2, "")


def asked(executor: Executor, content: RecordDict, kind: str = "train") -> Message:
    own = Context(1, 2, {}, RecordDict(), {})
    return executor.reply(api.CLIENT_APP, message(content, kind), own)


def array(data: bytes = b"", shape: tuple[int, ...] = (1,), dtype: str = "float32") -> Array:
    return Array(dtype=dtype, shape=shape, stype="x", data=data)


def packed(content: RecordDict) -> RecordDict:
    proto = api.recorddict_to_proto(content).SerializeToString()
    return RecordDict({PACKED: ConfigRecord({PACKED: proto})})


def with_arrays(**arrays: Array) -> RecordDict:
    order = ConfigRecord({"plan": "x"})
    return RecordDict({"adapter": ArrayRecord({**arrays}), "order": order})


ODD_TEXT = "\0\x1b[2J\u2028\U0001f600" * 20
LONG = {
    "too many arrays": packed(with_arrays(**{str(n): array() for n in range(FEW + 1)})),
    "a long text": RecordDict({"order": ConfigRecord({"plan": "x" * WORDS})}),
    "a text that grows": RecordDict({"order": ConfigRecord({"plan": "\0" * (WORDS // 4)})}),
    "bytes that grow": RecordDict({"order": ConfigRecord({"plan": b"\0" * (WORDS // 2)})}),
    "a long list": RecordDict({"order": ConfigRecord({"plan": [1] * WORDS})}),
    "a long name": RecordDict({"order": ConfigRecord({"x" * WORDS: 1})}),
    "a long table's name": RecordDict({"x" * WORDS: ConfigRecord({"x": 1})}),
    "an array's long name": with_arrays(**{"x" * WORDS: array()}),
    "an array's long type": with_arrays(a=array(dtype="x" * WORDS)),
    "many axes": with_arrays(a=array(shape=(1,) * WORDS)),
    "a long array": with_arrays(a=array(b"x" * (BYTES + 1))),
    "long arrays together": with_arrays(a=array(b"x" * BYTES), b=array(b"x")),
}
ODD = {
    "nothing": RecordDict(),
    "the longest": with_arrays(a=array(b"x" * BYTES), b=array()),
    "odd texts": RecordDict({ODD_TEXT: ConfigRecord({ODD_TEXT: ODD_TEXT})}),
    "odd values": RecordDict(
        {
            "order": ConfigRecord({"a": [1.5, 2.5], "b": b"\xff", "c": 2**63 - 1, "d": True}),
            "set": ConfigRecord({"a": float("nan"), "b": float("-inf"), "c": [b"\xff", b""]}),
        }
    ),
    "a record of another kind": RecordDict({"order": MetricRecord({"a": 1})}),
    "one name for two kinds": RecordDict({"adapter": ConfigRecord({"adapter": "adapter"})}),
    "an odd shape": with_arrays(a=array(shape=(-1, 0, 2**40))),
    "packed twice": packed(packed(RecordDict())),
    "no protobuf": RecordDict({PACKED: ConfigRecord({PACKED: b"\xff" * 100})}),
}


@pytest.mark.parametrize("name", LONG)
def test_a_message_that_no_vault_reads_is_answered_with_a_failure(name: str, vault: Vault) -> None:
    """And the next message reaches the vault, which has not ended."""
    told: list[tuple[str, dict[str, Any]]] = []
    executor = Executor(client_app(by_socket(vault.courier)), lambda *event: told.append(event))
    reply = asked(executor, LONG[name])
    assert reply.has_error() and reply.error.reason == FAILED
    assert [(event, facts["error"]) for event, facts in told] == [("failed", "RequestError")]
    assert not asked(executor, with_arrays(a=array(b"x"))).has_error()


@pytest.mark.parametrize("name", ["too many arrays", "long arrays together"])
def test_without_the_senders_check_the_message_ends_the_vault(
    name: str, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin."""
    executor = Executor(client_app(by_socket(vault.courier)), lambda *_: None)
    honest, courier = requests._is_too_long, threading.current_thread()

    def unless_sent(*lengths: int) -> bool:
        return threading.current_thread() is not courier and honest(*lengths)

    monkeypatch.setattr(requests, "_is_too_long", unless_sent)
    assert asked(executor, LONG[name]).has_error()
    assert asked(executor, with_arrays(a=array(b"x"))).has_error()


@pytest.mark.parametrize("name", ODD)
def test_an_odd_message_is_answered_and_so_is_the_next_one(name: str, vault: Vault) -> None:
    executor = Executor(client_app(by_socket(vault.courier)), lambda *_: None)
    for kind in ("query.prepare", "train", "train.masked"):
        with suppress(ValueError):  # Flower itself does not carry it
            asked(executor, ODD[name], kind)
    assert not asked(executor, with_arrays(a=array(b"x"))).has_error()


@pytest.mark.parametrize("name", LONG)
def test_nothing_of_it_is_written_to_a_spool(name: str, tmp_path: Path) -> None:
    spool = Spool.at(tmp_path / "spool")
    reply = asked(Executor(client_app(by_file(spool)), lambda *_: None), LONG[name])
    assert reply.has_error() and reply.error.reason == FAILED
    assert not [*spool.requests.iterdir()]


def test_an_answer_that_no_courier_reads_becomes_a_failure(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an update of more than 4 GiB. The next one is answered."""
    long = Answer("site", {"status": "trained", "reason": ""}, "update", pack_arrays(ZEROS))
    answers = [long, ANSWER]
    monkeypatch.setattr(vault_process, "answer_and_tell", lambda *_: answers.pop(0))
    found = list[str]()
    with suppress(EOFError, OSError):  # the vault has ended
        for _ in range(2):
            requests.send(vault.courier, Request("train", {}))
            found.append(requests.receive_answer(vault.courier).status)
    assert found == ["failed", "void"]


ZEROS = {"a": np.zeros(BYTES, np.float32)}


def test_of_a_long_message_not_one_byte_is_sent() -> None:
    here, there = Pipe()
    with here, there:
        with pytest.raises(RequestError, match="too long for the process that receives it"):
            requests.send(here, Request("train", {}, pack_arrays(ZEROS)))
        assert not there.poll(0)


# ------------------------------------------------------------------ what is shown of such a message


def read_after(long: str) -> list[str]:
    """Send an event with a long text, then a short one. Return the texts that are received."""
    (here, there), found = Pipe(), list[str]()
    with here, there, suppress(EOFError, OSError):
        reader, tell = EventReader(there), events.Teller(here)
        tell("refused", {"text": long})
        tell("joined", {"text": "connected"})
        while len(found) < 2 and reader.poll():
            found.append(str(events.receive(reader)[1]["text"]))
    return found


def test_a_long_event_is_left_out_and_counted_and_the_next_one_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twin: if it is sent, its reader reads nothing any more."""
    long = "x" * events.MOST
    counted = "1 events were not shown: they were too long, or this screen stood still"
    assert read_after(long) == [counted, "connected"]
    monkeypatch.setattr(events, "MOST", 2 * events.MOST)
    assert read_after(long) == []


def test_of_a_refused_messages_type_a_screen_gets_the_start() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    executor = Executor(lambda asked, _: asked, lambda *event: told.append(event))
    asked(executor, RecordDict(), "query." + "x" * 2_000_000)
    ((event, facts),) = told
    assert event == "refused" and len(json.dumps(facts)) < 1000
