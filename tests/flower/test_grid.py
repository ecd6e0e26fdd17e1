"""The in-process Grid keeps Flower's promises; what passes through it is what the wire carries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.core.errors import DataError
from fedtune.core.wire.arrays import WireError, unpack_arrays
from fedtune.flower import api
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record

PATHS = [Path("/sites/a.toml"), Path("/sites/b.toml")]


def echo() -> ClientApp:
    app = ClientApp()

    @app.query("echo")
    def answer(message: Message, context: Context) -> Message:
        content = message.content
        content["who"] = ConfigRecord({"site": context.node_config["site"]})
        return Message(content, reply_to=message)

    return app


def ask(grid: InProcessGrid, node: int, content: RecordDict | None = None) -> Message:
    return grid.create_message(content or RecordDict(), "query.echo", node, "1")


def test_it_is_a_grid():
    assert isinstance(InProcessGrid(PATHS, echo()), Grid)


def test_each_node_has_its_own_site_file():
    grid = InProcessGrid(PATHS, echo())
    nodes = grid.get_node_ids()
    replies = grid.send_and_receive([ask(grid, node) for node in nodes])
    assert [r.content["who"]["site"] for r in replies] == [str(path) for path in PATHS]
    assert [r.metadata.src_node_id for r in replies] == nodes
    assert api.SUPERLINK_NODE_ID not in nodes


def test_contents_survive_the_wire_bit_for_bit():
    grid = InProcessGrid(PATHS, echo())
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((3, 4)).astype(np.float32), "empty": np.zeros((0, 2), "f4")}
    arrays["odd"] = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    content = RecordDict({"a": to_record(arrays), "c": ConfigRecord({"n": 3, "b": True, "s": "é"})})
    (reply,) = grid.send_and_receive([ask(grid, 2, content)])
    back = unpack_arrays(reply.content["a"])
    assert all(
        back[n].tobytes() == a.tobytes() and back[n].shape == a.shape for n, a in arrays.items()
    )
    assert dict(reply.content["c"]) == {"n": 3, "b": True, "s": "é"}


def test_the_receiver_gets_a_copy():
    app = ClientApp()

    @app.query("echo")
    def vandal(message: Message, context: Context) -> Message:
        message.content["c"]["n"] = 4
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(PATHS, app)
    content = RecordDict({"c": ConfigRecord({"n": 3})})
    grid.send_and_receive([ask(grid, 2, content)])
    assert content["c"]["n"] == 3


def test_bytes_are_counted_by_node_and_direction():
    grid = InProcessGrid(PATHS, echo())
    big = RecordDict({"a": to_record({"x": np.zeros(1000, np.float32)})})
    grid.send_and_receive([ask(grid, 2, big), ask(grid, 3)])
    assert grid.bytes_down[2] > 4000 > grid.bytes_down[3] > 0
    assert grid.bytes_up[2] > 4000 > grid.bytes_up[3] > 0


def test_a_message_runs_when_it_is_pulled_and_not_before():
    ran: list[int] = []
    app = ClientApp()

    @app.query("echo")
    def answer(message: Message, context: Context) -> Message:
        ran.append(context.node_id)
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(PATHS, app)
    ids = grid.push_messages([ask(grid, 2), ask(grid, 3)])
    assert ran == []
    replies = iter(grid.pull_messages(ids))
    assert ran == []
    next(replies)
    assert ran == [2]
    next(replies)
    assert ran == [2, 3]


def test_a_reply_is_delivered_once_and_answers_its_message():
    grid = InProcessGrid(PATHS, echo())
    ids = grid.push_messages([ask(grid, 2)])
    (reply,) = grid.pull_messages(ids)
    assert reply.metadata.reply_to_message_id == ids[0]
    assert list(grid.pull_messages([*ids, "no such message"])) == []


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError("Mrs Example has a fever"), "RuntimeError"),
        (KeyError("Mrs Example"), "KeyError"),
        (DataError("3 records have no text"), "DataError: 3 records have no text"),
    ],
)
def test_an_exception_becomes_an_error_reply_without_its_text(error, reason):
    app = ClientApp()

    @app.query("echo")
    def broken(message: Message, context: Context) -> Message:
        raise error

    grid = InProcessGrid(PATHS, app)
    (reply,) = grid.send_and_receive([ask(grid, 2)])
    assert reply.has_error() and reply.error.reason == reason
    assert reply.error.code == api.ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def test_ctrl_c_is_not_an_error_reply():
    app = ClientApp()

    @app.query("echo")
    def stopped(message: Message, context: Context) -> Message:
        raise KeyboardInterrupt

    grid = InProcessGrid(PATHS, app)
    with pytest.raises(KeyboardInterrupt):
        grid.send_and_receive([ask(grid, 2)])


def test_an_unknown_node_or_message_type_is_no_silence():
    grid = InProcessGrid(PATHS, echo())
    with pytest.raises(KeyError):
        grid.push_messages([ask(grid, 99)])
    (reply,) = grid.send_and_receive([grid.create_message(RecordDict(), "train", 2, "1")])
    assert reply.has_error()


# ------------------------------------------------------------------------------------ arrays


def tampered(body: bytes) -> ArrayRecord:
    record = to_record({"x": np.arange(6, dtype=np.float32).reshape(2, 3)})
    record["x"].data = body
    return record


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version, allow_pickle=True)
    return buffer.getvalue()


GOOD = npy(np.arange(6, dtype="<f4").reshape(2, 3))
CLAIMS_MORE = GOOD.replace(b"(2, 3), }      ", b"(2, 3000000), }")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not an array",
        GOOD[:-1],
        GOOD + b"x",
        npy(np.zeros((2, 3), "<f8")),
        npy(np.zeros((2, 3), ">f4")),
        npy(np.zeros((2, 3), "<i4")),
        npy(np.asfortranarray(np.zeros((2, 3), "<f4"))),
        npy(np.array([{"a": 1}], dtype=object)),
        npy(np.zeros((2, 3), "<f4"), version=(2, 0)),
        CLAIMS_MORE,
        GOOD.replace(b"(2, 3)", b"(-2,3)"),
    ],
)
def test_only_plain_fp32_of_its_stated_size_is_decoded(body):
    assert body != GOOD
    with pytest.raises(WireError):
        unpack_arrays(tampered(body))


def test_any_layout_is_sent_as_plain_fp32():
    base = np.arange(24, dtype=np.float64).reshape(4, 6)
    for view in (base, base.T, base[::2, ::-1], np.asfortranarray(base)):
        np.testing.assert_array_equal(unpack_arrays(to_record({"x": view}))["x"], view)
