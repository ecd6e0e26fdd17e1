"""A consortium for the model-based test: sites with real ledgers, a network that misbehaves.

Site i sends the unit vector e_i, so the adapter counts what was aggregated: a round of n
participants adds 1/n for each of them and nothing for anybody else."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.app import Message, RecordDict
from safetensors.numpy import load, save

import fedtune.core.vault.answers
import fedtune.launch.in_one_process
from fedtune.core.config import Study
from fedtune.core.errors import FedtuneError, PolicyRefused
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.models.lora import digest as arrays_digest
from fedtune.core.vault.prepared import Update
from fedtune.core.wire.codec import Shapes, encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import Header, seal
from fedtune.flower import api
from fedtune.flower import grid as grid_module
from fedtune.flower.grid import InProcessGrid
from fedtune.server import rounds, store
from tests.server.fakes import EVENT, FakeSite, make_parts, make_study

NAMES = ("a", "b", "c", "d")
ROUNDS = 6
AT_LEAST = 2  # strategy.min_sites


def study() -> Study:
    made = make_study(min_sites=AT_LEAST, round_timeout=0.02)
    training = made.training.model_copy(update={"rounds": ROUNDS})
    return made.model_copy(update={"evaluation": None, "training": training})


class Killed(KeyboardInterrupt):
    """The coordinator dies here: nothing may catch it."""


@dataclass
class UnitSite(FakeSite):
    """Sends its unit vector once per round. trained: what it really did, as (round, adapter)."""

    state: Path = Path()
    crash: str = ""  # where the next round dies: reserving, training, released
    refuses: bool = False
    trained: list[int] = field(default_factory=list)
    rolled_back: bool = False
    open: bool = False  # whether its ledger can be used

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A new process: the ledger is read again, the plan is gone."""
        self.known = self.open = False
        with suppress(LedgerError):  # a rolled-back one that already knows that it is
            self.ledger = Ledger(self.state)
            self.key = self.ledger.key
            self.ledger.declare("records", [], "h", [b"1", b"2"])
            self.open = True

    def train(
        self, digest: str, round_: int, adapter: dict[str, np.ndarray], receipt: str
    ) -> Update:
        if self.refuses:
            self.refuses = False
            raise PolicyRefused("not this round")
        self._die("reserving")
        if not self.open:
            raise LedgerError("its ledger was rolled back")
        if receipt:
            self.ledger.accept_receipt(json.loads(receipt), self.coordinator)
        given = arrays_digest(adapter)
        body = self.ledger.released(digest, round_, given)
        if body is None:
            charge = Charge(digest, "s", round_, 1.5, 0.25, 1, 1, 1.0, "record", "first")
            number = self.ledger.reserve("records", charge, given, lambda charges: None)
            self._die("training")
            self.steps += 1
            self.trained.append(round_)
            vector = np.zeros(len(NAMES), np.float32)
            vector[NAMES.index(self.name)] = 1.0
            events = json.dumps([{**EVENT, "steps": self.steps}])
            body = save(encode({"u": vector}, "float32"), {"events": events})
            self.ledger.release(number, body)
        self._die("released")
        text = body[8 : 8 + int.from_bytes(body[:8], "little")]
        return Update(load(body), json.loads(json.loads(text)["__metadata__"]["events"]))

    def shapes(self, digest: str) -> Shapes:
        return {"u": (len(NAMES),)}

    def _die(self, where: str) -> None:
        if self.crash == where:
            self.crash = ""
            self.restart()
            raise RuntimeError("crashed")

    def sealed(self, digest: str, round_: int, nonce: str, body: str) -> dict[str, str]:
        statement = self.ledger.head_statement()
        header = Header(
            digest, round_, self.base, self.name, self.coordinator, nonce, body, statement
        )
        return seal(self.key, header)


class Network(InProcessGrid):
    """faults: node -> what happens to its next order: request, response, twice, replay, garbage.
    away: nodes that are not connected."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__([Path(name) for name in names], fedtune.launch.in_one_process.app, str)
        self.faults: dict[int, str] = {}
        self.away: set[int] = set()
        self.old: dict[int, RecordDict] = {}  # node -> its first answer
        self.kill_at: tuple[str, int] | None = None  # (push or pull, how many from now)

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            self._maybe_die("push")
            node = message.metadata.dst_node_id
            (identity,) = super().push_messages([message])
            if node in self.away or self._fault(node, message, "request"):
                del self._waiting[identity]
            pushed.append(identity)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for identity in message_ids:
            if identity not in self._waiting:
                continue
            asked = grid_module.decode(self._waiting[identity])
            node = asked.metadata.dst_node_id
            if node in self.old and self._fault(node, asked, "replay"):
                del self._waiting[identity]  # the site never sees it; its old answer comes instead
                yield Message(self.old[node], reply_to=asked)
                continue
            for reply in super().pull_messages([identity]):
                self._maybe_die("pull")
                yield from self._delivered(node, asked, reply)

    def _delivered(self, node: int, asked: Message, reply: Message) -> Iterator[Message]:
        if reply.has_error() or "update" not in reply.content:
            yield reply
            return
        content = reply.content
        if self._fault(node, asked, "garbage"):
            raise KeyError("an object of a kind that Flower does not know")
        if self._fault(node, asked, "response"):
            return
        if len(content["update"]):
            self.old.setdefault(node, content)
        yield reply
        if self._fault(node, asked, "twice"):
            yield reply

    def _fault(self, node: int, message: Message, kind: str) -> bool:
        if message.metadata.message_type != "train" or self.faults.get(node) != kind:
            return False
        del self.faults[node]
        return True

    def _maybe_die(self, where: str) -> None:
        if self.kill_at and self.kill_at[0] == where:
            left = self.kill_at[1] - 1
            self.kill_at = (where, left) if left else None
            if not left:
                raise Killed


class World:
    """One study from its first round to its last, through whatever happens in between."""

    def __init__(self, home: Path) -> None:
        self.home, self.study = home, study()
        self.sites = {name: UnitSite(name, state=home / name) for name in NAMES}
        self.key = SigningKey()
        self.network = Network(NAMES)
        self.nodes = dict(zip(NAMES, self.network._contexts, strict=True))
        self.copies: dict[str, set[int]] = {}  # site -> rounds it had trained when it was copied
        self.banned: dict[str, int] = {}  # rolled back behind a receipt: last round it may be in
        self.revoked: dict[str, int] = {}
        self.told: list[int] = []  # rounds that were reported as done
        self.disk_full_at = 0  # the so-manieth replaced file from now fails
        self.clock = 0.0
        self.finished = False
        self.error: BaseException | None = None

    # -------------------------------------------------------------------------------- moves

    def copy_ledger(self, name: str) -> None:
        shutil.rmtree(self.home / f"{name}.old", ignore_errors=True)
        shutil.copytree(self.home / name, self.home / f"{name}.old")
        self.copies[name] = set(self.sites[name].trained)

    def roll_back(self, name: str) -> None:
        """Put an old copy of the site's whole state in place of the state."""
        if name not in self.copies:
            return
        shutil.rmtree(self.home / name)
        shutil.copytree(self.home / f"{name}.old", self.home / name)
        site, kept = self.sites[name], self.progress()
        site.restart()
        done = {h["round"] for h in kept.history if name in h["participants"]} if kept else set()
        if done - self.copies[name]:  # the coordinator holds a receipt for what is gone
            assert kept is not None
            self.banned.setdefault(name, kept.round)
        site.rolled_back = True

    def revoke(self, name: str) -> None:
        kept = self.progress()
        self.network.away.add(self.nodes[name])
        self.revoked.setdefault(name, kept.round if kept else 0)

    def join(self, name: str) -> None:
        if name not in self.revoked:
            self.network.away.discard(self.nodes[name])

    def advance(self, upto: int) -> None:
        """Start the coordinator, and kill it once it has done `upto` more rounds."""
        done = 0

        def on_event(kind: str, data: dict[str, Any]) -> None:
            nonlocal done
            if kind == "round":
                self.told.append(data["round"])
                done += 1
                if done == upto and data["round"] < ROUNDS:
                    raise Killed

        start = SimpleNamespace(
            adapter={"u": np.zeros(len(NAMES), np.float32)}, frozen={}, strategy={}
        )
        start.study = self.study
        parts = make_parts(start=lambda _: start, key=self.key)
        self.error = None
        with self._machine():
            try:
                rounds.run(
                    self.network, self.study, self.home / "out", resume=True, parts=parts,
                    on_event=on_event,
                )  # fmt: skip
                self.finished = True
            except (Killed, FedtuneError) as error:
                self.error = error
        self.network._waiting.clear()  # a new coordinator is a new run at Flower
        self.network.kill_at = None

    def heal(self) -> int:
        """No more faults, and everybody who may is back; how many surely can take part."""
        self.network.faults.clear()
        for name, site in self.sites.items():
            self.join(name)
            site.crash, site.refuses = "", False
        return sum(not s.rolled_back and n not in self.revoked for n, s in self.sites.items())

    # ------------------------------------------------------------------------------- truths

    def progress(self) -> store.Progress | None:
        return store.load(self.home / "out", self.study)

    def check(self) -> None:
        kept = self.progress()
        if kept is None:
            assert not self.told and not self.finished
            return
        assert kept.round >= max(self.told, default=0), "a finished round is gone"
        assert [h["round"] for h in kept.history] == list(range(1, kept.round + 1))
        expected = np.zeros(len(NAMES))
        for entry in kept.history:
            names = entry["participants"]
            assert len(names) == len(set(names)) >= AT_LEAST, "a round below quorum was counted"
            assert not set(names) & set(entry["missing"])
            for name in names:
                expected[NAMES.index(name)] += 1 / len(names)
                assert entry["round"] in self.sites[name].trained, "a ghost"
                for ended in (self.revoked, self.banned):
                    assert entry["round"] <= ended.get(name, ROUNDS), "it had no say any more"
        np.testing.assert_allclose(kept.adapter["u"], expected, atol=1e-5)
        for site in self.sites.values():
            if not site.rolled_back:  # nothing trained without a charge
                charged = [charge.round for charge in site.ledger.charges("records")]
                assert all(charged.count(r) >= site.trained.count(r) for r in set(site.trained))
        if self.finished:
            assert kept.round == ROUNDS

    # ------------------------------------------------------------------------------ machine

    def _machine(self) -> Any:
        """The files and the clock of the coordinator's machine, and who answers at a node."""
        stack, real = ExitStack(), os.replace

        def replace(source: Any, target: Any) -> None:
            if self.disk_full_at and str(target).startswith(str(self.home / "out")):
                self.disk_full_at -= 1
                if not self.disk_full_at:
                    raise OSError(errno.ENOSPC, "No space left on device")
            real(source, target)

        def now() -> float:
            return 1.7e9 + self.clock

        find: Callable[[str], UnitSite] = self.sites.__getitem__
        stack.enter_context(patch.object(fedtune.core.vault.answers, "worker", find))
        stack.enter_context(patch.object(os, "replace", replace))
        stack.enter_context(patch.object(api, "time", SimpleNamespace(time=now)))
        return stack
