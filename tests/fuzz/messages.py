"""Messages for the fuzz tests: random ones, and valid ones with something changed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedtune.core.config import Encoding
from fedtune.core.wire import seal
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.codec import SCALES, VALUES, encode
from fedtune.core.wire.keys import SigningKey
from fedtune.flower import api
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record
from fedtune.launch.in_one_process import app
from tests.server.fakes import EVENT, zeros

Pick = random.Random
TEXTS = (
    *("", "trained", "refused", "failed", "a", "ε" * 40, "\x00", "\ud800", "[]", "{}", "null"),
    *("[" * 2_000, "1e999", "NaN", "-1", "9" * 5_000, '{"a":1,"a":2}', "x" * 20_000),
)
NUMBERS = (0, 1, -1, 2**31, 2**62, -(2**62), 0.0, 1.5, float("nan"), float("inf"), 5e-324, 1e308)
EVENT_KEYS = ("sigma", "q", "max_grad_norm", "records", "steps")


class Forge:
    """A site that may sign: everything its key covers can still be nonsense."""

    def __init__(self, wanted: seal.Header, seed: int, encoding: Encoding = "float32") -> None:
        self.random, self.key, self.wanted = Pick(seed), SigningKey(), wanted
        self.encoding = encoding

    # ------------------------------------------------------------------------ honest, then not

    def update(self) -> dict[str, np.ndarray]:
        return encode({name: a + 0.25 for name, a in zeros().items()}, self.encoding)

    def honest(self) -> RecordDict:
        return self.sealed(to_record(self.update()), json.dumps([{**EVENT, "steps": 1}]))

    def sealed(self, arrays: ArrayRecord, events: str, **header: Any) -> RecordDict:
        said = {"name": "a", "status": "trained", "reason": "", "events": events}
        body = seal.body_digest(bodies(arrays), said)
        head = replace(self.wanted, body=body, ledger={"token": "00"}, **header)
        return RecordDict(
            {"update": arrays, "site": ConfigRecord(said | seal.seal(self.key, head))}
        )

    def signed_nonsense(self) -> RecordDict:
        """The seal is right; arrays or log are not, or are by luck."""
        arrays = {name: Array(a) for name, a in self.update().items()}
        for _ in range(self.random.randint(0, 2)):
            name = self.random.choice([*arrays, SCALES, "other"])
            arrays[name] = self.array()
        record = ArrayRecord({name: a for name, a in arrays.items() if self.random.random() < 0.97})
        events = self.events() if self.random.random() < 0.5 else '[{"sigma":1.5,"q":0.25}]'
        return self.sealed(record, events)

    def altered_content(self) -> RecordDict:
        """An honest message, then one field of it replaced."""
        content = self.honest()
        which = self.random.random()
        if which < 0.5:
            site = content["site"]
            name = self.random.choice([*site, "more"])
            value = self.value()
            site[name] = value
        elif which < 0.8:
            name = self.random.choice(list(content["update"]))
            content["update"][name] = self.array()
        else:
            name = self.random.choice(["update", "site", "more"])
            content = RecordDict({**content, name: self.record()})
        return content

    def altered_bytes(self) -> bytes:
        """The bytes of an honest message as Flower sends it, then some of them changed."""
        body = bytearray(self.wire_bytes())
        for _ in range(self.random.randint(1, 4)):
            at, kind = self.random.randrange(len(body)), self.random.random()
            if kind < 0.5:
                body[at] ^= 1 << self.random.randrange(8)
            elif kind < 0.7:
                body[at:at] = self.random.randbytes(self.random.randint(1, 8))
            elif kind < 0.9:
                del body[at : at + self.random.randint(1, 16)]
            else:
                del body[at:]
            if not body:
                break
        return bytes(body)

    def wire_bytes(self) -> bytes:
        if not hasattr(self, "_wire"):
            order = InProcessGrid([], app).create_message(RecordDict(), "train", 1, "1")
            order.metadata.__dict__["_message_id"] = "1"
            reply = Message(self.honest(), reply_to=order)
            self._wire = bytes(api.message_to_proto(reply).SerializeToString())
        return self._wire

    # ------------------------------------------------------------------------------- anything

    def anything(self) -> RecordDict:
        names = ("update", "site", "admission", "plan", "order", "adapter", "frozen", "more")
        return RecordDict(
            {self.random.choice(names): self.record() for _ in range(self.random.randint(0, 3))}
        )

    def record(self) -> Any:
        kind = self.random.random()
        if kind < 0.4:
            return ConfigRecord(
                {self.name(): self.value() for _ in range(self.random.randint(0, 6))}
            )
        if kind < 0.9:
            names = (VALUES, SCALES, "layer.B", self.name())
            found = {self.random.choice(names): self.array() for _ in range(2)}
            return ArrayRecord(found)
        return MetricRecord({self.name(): self.random.choice(NUMBERS)})

    def name(self) -> str:
        known = ("status", "reason", "events", "header", "signature", "name", "admitted", "key")
        more = ("declared_size", "study", "digest", "plan", "round", "nonce", "receipt", "x")
        return self.random.choice([*known, *more])

    def value(self) -> Any:
        kind = self.random.random()
        if kind < 0.5:
            return self.random.choice(TEXTS)
        if kind < 0.75:
            return self.random.choice(NUMBERS)
        if kind < 0.85:
            return self.random.choice([True, False])
        if kind < 0.95:
            return self.random.randbytes(self.random.randint(0, 200))
        return [self.random.choice(NUMBERS[:6])]

    def array(self) -> Array:
        shape = self.random.choice([(10,), (5, 2), (), (0,), (1,), (2**62,), (-1,), (4096, 2)])
        dtype = self.random.choice([self.encoding, "float32", "float64", "object", "<f4", ""])
        stype = self.random.choice(["numpy.ndarray", "numpy.ndarray", "pickle", ""])
        return Array(dtype, shape, stype, self.body())

    def body(self) -> bytes:
        shape = self.random.choice([(10,), (5, 2), (), (0,), (1,)])
        kind = self.random.choice([self.encoding, "<f4", "<f8", "<i8", ">f4", "|S3"])
        body = bytearray(Array(np.zeros(shape, kind)).data)
        for _ in range(self.random.choice([0, 0, 1, 2])):
            body[self.random.randrange(min(len(body), 80))] = self.random.randrange(256)
        if self.random.random() < 0.2:
            del body[self.random.randrange(len(body)) :]
        if self.random.random() < 0.1:
            body += self.random.randbytes(16)
        return bytes(body)

    def events(self) -> str:
        found: Any = [
            {key: self.random.choice([*NUMBERS, "1", None, [], 10**400]) for key in EVENT_KEYS}
            for _ in range(self.random.randint(0, 2))
        ]
        if self.random.random() < 0.4:
            found = [{**EVENT, "steps": self.random.choice([1, 5, 10**8, 10**9, True, 0.5])}]
        if self.random.random() < 0.1:
            found = self.random.choice([{}, 3, "sigma", None, [[]], {"sigma": 1}])
        return json.dumps(found)

    def kinds(self) -> list[Callable[[], RecordDict | bytes]]:
        return [
            *(self.honest, self.signed_nonsense, self.signed_nonsense, self.altered_content),
            *(self.altered_bytes, self.altered_bytes, self.anything, self.noise),
        ]

    def noise(self) -> bytes:
        return self.random.randbytes(self.random.randint(0, 300))
