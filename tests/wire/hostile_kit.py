"""What test_hostile.py and test_hostile_bytes.py share."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtune.core.config import Encoding
from fedtune.core.wire import seal
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.codec import SCALES, VALUES, encode
from fedtune.core.wire.keys import SigningKey
from fedtune.flower import api
from fedtune.flower.records import to_record
from fedtune.server.admission import Outcome, outcome
from fedtune.server.bound import Terms
from fedtune.server.exchange import Reply
from tests.server.fakes import EVENT, make_study, zeros

STUDY = make_study()


KEY, COORDINATOR = SigningKey(), SigningKey()


WANTED = seal.Header(STUDY.digest, 3, "sha256:b", "a", COORDINATOR.public, "nonce-1", "", {})
TERMS = Terms(EVENT["q"], EVENT["sigma"], 1.0, 1, steps=4, divisor=25.0)
EVENTS = '[{"sigma":1.5,"q":0.25,"max_grad_norm":1.0,"records":1,"steps":1}]'
ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "int8")
SPELLED = {"float32": "<f4", "float16": "<f2", "int8": "|i1"}


@dataclass
class Wire:
    """encoding: of every message of the test that runs."""

    encoding: Encoding = "float32"

    def record(self, arrays: dict[str, np.ndarray]) -> ArrayRecord:
        return to_record(encode(arrays, self.encoding))

    def numbers(self, *shape: int) -> np.ndarray:
        return np.zeros(shape, SPELLED[self.encoding])


wire = Wire()


def message(record: ArrayRecord | None = None, key: SigningKey = KEY, **header: Any) -> RecordDict:
    """What an honest site sends; `record` and `header` as they are changed before sealing."""
    record = wire.record({n: a + 0.5 for n, a in zeros().items()}) if record is None else record
    said = {"name": "a", "status": "trained", "reason": "", "events": EVENTS}
    body = seal.body_digest(bodies(record), said)
    sealed = seal.seal(key, replace(WANTED, body=body, ledger={"token": "00"}, **header))
    return RecordDict({"update": record, "site": ConfigRecord(said | sealed)})


def judge(content: RecordDict, wanted: seal.Header = WANTED, longest: float = 10.0) -> Outcome:
    limits: dict[str, Any] = {"terms": TERMS, "longest": longest, "encoding": wire.encoding}
    return outcome(Reply(2, content), zeros(), True, [], KEY.public, wanted, **limits)


def honest() -> RecordDict:
    return message()


def changed(name: str, change: Callable[[Array], Array]) -> RecordDict:
    record = wire.record(zeros())
    record[name] = change(record[name])
    return message(record)


def scaled(change: Callable[[np.ndarray], np.ndarray]) -> RecordDict:
    """Other scales beside honest numbers; where there are none, the numbers changed."""
    arrays = encode({n: a + 0.5 for n, a in zeros().items()}, wire.encoding)
    name = SCALES if SCALES in arrays else VALUES
    return message(to_record(arrays | {name: change(arrays[name])}))


def body_of(data: bytes) -> Callable[[Array], Array]:
    return lambda old: Array(old.dtype, old.shape, old.stype, data)


def npy(array: np.ndarray) -> bytes:
    return Array(array).data


def renamed(shape: bytes) -> bytes:
    """The body of the values, which says of itself that it has another shape."""
    small = npy(wire.numbers(10))
    return small.replace(b"(10,), }" + b" " * (len(shape) - 8), shape)


def another_encoding() -> RecordDict:
    other = ENCODINGS[(ENCODINGS.index(wire.encoding) + 1) % 3]
    return message(to_record(encode(zeros(), other)))


LIES: dict[str, tuple[Callable[[], RecordDict], str]] = {
    "another key": (lambda: message(key=SigningKey()), "not signed by the key"),
    "an earlier round": (lambda: message(round=2), "sealed for another round"),
    "another run or order": (lambda: message(nonce="nonce-0"), "sealed for another nonce"),
    "another coordinator": (lambda: message(receiver="0" * 64), "sealed for another receiver"),
    "another study": (lambda: message(plan="sha256:0"), "sealed for another plan"),
    "another base": (lambda: message(base="sha256:0"), "sealed for another base"),
    "another site": (lambda: message(site="b"), "sealed for another site"),
    "2⁶² numbers claimed": (
        lambda: changed(VALUES, body_of(renamed(b"(4611686018427387904,), }"))),
        "'values' is not plain",
    ),
    "pickle": (
        lambda: changed(VALUES, lambda o: body_of(
            pickle.dumps([0] * 60).ljust(len(o.data), b"\0")[: len(o.data)])(o)),
        "not in .npy format",
    ),
    "an object array": (
        lambda: changed(VALUES, lambda o: body_of(
            o.data.replace(SPELLED[wire.encoding].encode(), b"|O "))(o)),
        "its header says otherwise",
    ),
    "another type inside": (
        lambda: changed(VALUES, lambda o: body_of(
            o.data.replace(SPELLED[wire.encoding].encode(), other_type()))(o)),
        "'values' is not plain",
    ),
    "fp64": (
        lambda: changed(VALUES, lambda _: Array(np.zeros(10))), "in NumPy's format, as was agreed",
    ),
    "another encoding": (another_encoding, ""),
    "the wrong shape": (
        lambda: changed(VALUES, lambda _: Array(wire.numbers(5, 2))),
        "'values' has another shape",
    ),
    "another shape inside": (
        lambda: changed(VALUES, body_of(npy(wire.numbers(5, 2)))),
        "not as many numbers as agreed",
    ),
    "rank 4096": (
        lambda: changed(VALUES, lambda _: Array(wire.numbers(4096 * 10))),
        "'values' has another shape",
    ),
    "bytes too many": (
        lambda: changed(VALUES, lambda old: body_of(old.data + b"\0" * 4096)(old)),
        "has not as many bytes as its shape needs",
    ),
    "an array too many": (
        lambda: message(ArrayRecord({**wire.record(zeros()), "x": Array(wire.numbers(2))})),
        "has other arrays than agreed",
    ),
    "an array too few": (
        lambda: message(ArrayRecord({SCALES: Array(np.ones(1, np.float32))})),
        "has other arrays than agreed",
    ),
    "NaN": (lambda: scaled(lambda s: s * np.float32(np.nan)), "not"),
    "infinity": (lambda: scaled(lambda s: s * np.float32(np.inf)), "not"),
    "too long": (lambda: scaled(lambda s: s * np.float32(1e3)), "is longer"),
}  # fmt: skip


def other_type() -> bytes:
    return b"<f2" if wire.encoding != "float16" else b"<f4"


def on_the_wire(content: RecordDict) -> bytes:
    return bytes(api.recorddict_to_proto(content).SerializeToString())


def same(one: RecordDict, other: RecordDict) -> bool:
    return on_the_wire(one) == on_the_wire(other)
