"""A hostile coordinator's arrays: a site compares what they say of themselves with the plan before
it reads any of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedtune.core.config import LoraTable, PreconditionerTable
from fedtune.core.wire import arrays as module
from fedtune.core.wire.arrays import WireError, read_agreed, read_frozen
from fedtune.core.wire.codec import encode, layout
from fedtune.flower.records import to_record
from tests.server.fakes import SHAPES, zeros

RANK = 4


def factor(count: int = 2) -> dict[str, np.ndarray]:
    return {f"layer.{n}.A": np.full((RANK, 6), n, np.float32) for n in range(count)}


@pytest.fixture(autouse=True)
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arrays that were read."""
    names: list[str] = []
    honest = module._decode
    monkeypatch.setattr(module, "_decode", lambda n, *rest: names.append(n) or honest(n, *rest))
    return names


def said(**changes: Any) -> ArrayRecord:
    """A factor of which the first matrix says something else of itself."""
    record = to_record(factor())
    for key, value in changes.items():
        setattr(record["layer.0.A"], key, value)
    return record


def plan(rank: int | None, directions: int | None = None) -> LoraTable | None:
    """None: without an adapter. directions: of the preconditioner."""
    if rank is None:
        return None
    table = directions and PreconditionerTable(rank=directions)
    return LoraTable(rank=rank, a_init="public", preconditioner=table or None)


def many(count: int) -> ArrayRecord:
    one = Array(np.zeros((RANK, 1), np.float32))
    return ArrayRecord({f"layer.{n}.A": one for n in range(count)})


def test_what_the_plan_sends_is_read(read: list[str]) -> None:
    found = read_frozen(to_record(factor()), plan(RANK))
    assert {n: a.tolist() for n, a in found.items()} == {n: a.tolist() for n, a in factor().items()}
    assert read == sorted(factor()) and read_frozen(ArrayRecord(), None) == {}


@pytest.mark.parametrize(
    ("record", "rank"),
    [
        pytest.param(to_record(factor()), None, id="the plan sends none"),
        pytest.param(to_record(factor()), RANK + 1, id="another rank"),
        pytest.param(to_record({"a": np.zeros(RANK, np.float32)}), RANK, id="a vector"),
        pytest.param(to_record({"a": np.zeros((RANK, 2, 2), np.float32)}), RANK, id="a cube"),
        pytest.param(to_record({"a": np.zeros((RANK, 0), np.float32)}), RANK, id="nothing"),
        pytest.param(to_record({"a": np.zeros((RANK, 6), np.int8)}), RANK, id="bytes"),
        pytest.param(to_record({"a" * 513: factor()["layer.0.A"]}), RANK, id="a long name"),
        pytest.param(many(10_001), RANK, id="more than a network has"),
        pytest.param(said(shape=(RANK, 10**9)), RANK, id="a claim of 16 GB"),
        pytest.param(said(shape=(RANK, 1000)), RANK, id="more than it has"),
        pytest.param(said(dtype="float64"), RANK, id="doubles"),
        pytest.param(said(dtype="object"), RANK, id="objects"),
        pytest.param(said(stype="torch.tensor"), RANK, id="a pickle"),
        pytest.param(said(data=b"x" * (1 << 22)), RANK, id="4 MiB in 96 bytes' place"),
    ],
)
def test_a_factor_that_is_not_the_plans_is_not_read(
    record: ArrayRecord, rank: int | None, read: list[str]
) -> None:
    with pytest.raises(WireError):
        read_frozen(record, plan(rank))
    assert not read


def test_a_preconditioner_is_read_in_the_shape_of_the_plan_alone(read: list[str]) -> None:
    wide, thin = np.zeros((9, 3), np.float32), np.zeros((3, 2), np.float32)  # 2 of 3: no more fit
    sent = to_record({"l.lora_A.w": factor()["layer.0.A"], "l.lora_M.w": wide, "k.lora_M.w": thin})
    assert set(read_frozen(sent, plan(RANK, 3))) == set(sent)
    read.clear()
    for asked in (plan(RANK), plan(RANK, 4), plan(RANK, 2)):
        with pytest.raises(WireError):
            read_frozen(sent, asked)
    narrow = to_record({"l.lora_U.w": wide})
    table = PreconditionerTable(rank=3, narrow=True)
    asked = LoraTable(rank=RANK, a_init="public", preconditioner=table)
    assert set(read_frozen(narrow, asked)) == {"l.lora_U.w"}
    read.clear()
    for record, other in ((narrow, plan(RANK, 3)), (narrow, plan(RANK)), (sent, asked)):
        with pytest.raises(WireError):
            read_frozen(record, other)
    long = to_record({"l.lora_M.w": np.zeros((3, 9), np.float32)})
    with pytest.raises(WireError):
        read_frozen(long, plan(RANK, 9))
    assert not read


@pytest.mark.parametrize("encoding", ["float32", "float16", "int8"])
def test_an_adapter_is_as_long_as_the_network(encoding: Any, read: list[str]) -> None:
    honest = to_record(encode(zeros(), encoding))
    assert set(read_agreed(honest, SHAPES)) == set(SHAPES)
    read.clear()
    longer = {n: np.zeros((100, *shape), np.float32) for n, shape in SHAPES.items()}
    more = to_record(encode(zeros(), encoding) | {"more": np.zeros(3, np.float32)})
    for record in (to_record(encode(longer, encoding)), more, ArrayRecord()):
        with pytest.raises(WireError):
            read_agreed(record, SHAPES)
    assert not read


@pytest.mark.parametrize("dtype", ["float64", "object", "int64", ""])
def test_an_adapter_is_in_a_known_encoding(dtype: str, read: list[str]) -> None:
    record = to_record(encode(zeros(), "float32"))
    record["values"].dtype = dtype
    with pytest.raises(WireError):
        read_agreed(record, SHAPES)
    assert not read


def test_the_twin_without_the_look_before_all_is_read(
    monkeypatch: pytest.MonkeyPatch, read: list[str]
) -> None:
    monkeypatch.setattr(module, "check_agreed", lambda *_: None)
    longer = {n: np.zeros((100, *shape), np.float32) for n, shape in SHAPES.items()}
    with pytest.raises(WireError):
        read_agreed(to_record(encode(longer, "float32")), SHAPES)
    assert read == ["values"]
    assert layout(SHAPES, "float32")["values"].shape == (sum(map(math.prod, SHAPES.values())),)
