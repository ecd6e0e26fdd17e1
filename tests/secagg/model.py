"""A consortium for the model-based test of secure aggregation: the shipped rounds, messages, site
workers and ledgers over a network that misbehaves; of a site's work the gradients alone are made
up, as one unit vector for each site.

Written down beside it, and compared: every draw (by its masking key), every set that a draw's words
left for, every sum that was opened. Of a site whose folder was put back to an earlier copy, the
draws of which its ledger lost the charge are left out of what is compared with the ledger, and of
nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from flwr.app import ConfigRecord, Message

import fedtune.core.vault.answers
import fedtune.launch.in_one_process
from fedtune.core.config import Study, load_site
from fedtune.core.dp.shared_noise import grid_of
from fedtune.core.errors import FedtuneError
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.secagg.draw import Draws, Waiting
from fedtune.core.secagg.statement import Ready, StatementError, parse, parse_set, set_digest
from fedtune.core.vault import budget, secure_round
from fedtune.core.vault.prepared import Update
from fedtune.core.wire import codec, seal
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.keys import SigningKey
from fedtune.flower import polling
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record
from fedtune.server import exchange, rounds, store
from fedtune.server.admission import plan_message
from fedtune.server.masked_sum import MaskedSum
from tests.secagg.network import Killed, Network
from tests.secagg.unit_sites import (
    COLLUDING,
    DIMENSION,
    LEAST,
    NAMES,
    NORM,
    PINNED,
    RATE,
    ROUNDS,
    SIGMA,
    SITE,
    SIZES,
    UnitWorker,
    lied,
    study,
)
from tests.server.fakes import make_parts
from tests.written import written

# Real ledgers wait for the disk at every entry.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
EPSILON, TOTAL = budget.accountant.epsilon, budget.total_epsilon


@dataclass
class Drawn:
    """A draw as it was made, and the sets that its words left for, with their bytes. lost: its
    charge was, with a folder that was put back."""

    waiting: Waiting
    lost: bool = False
    left: dict[str, bytes] = field(default_factory=dict)
    opened: set[frozenset[str]] = field(default_factory=set)


class World:
    """One study from its first round to its last, through whatever happens in between."""

    def __init__(self, home: Path, **strategy: Any) -> None:
        self.home, self.study, self.key = home, study(**strategy), SigningKey()
        self.keys = {name: Ledger(home / name).key.public for name in NAMES}
        for name in NAMES:
            peers = [self.keys[n] for n in PINNED if n != name]
            text = SITE.format(name=name, size=SIZES[name], peers=json.dumps(peers))
            (home / f"{name}.toml").write_text(text)
        self.sites: dict[str, UnitWorker] = {}
        for name in NAMES:
            self.restart(name)
        self.network = Network(self.saw)
        self.nodes = dict(zip(NAMES, self.network._contexts, strict=True))
        self.draws: dict[str, Drawn] = {}  # by public masking key
        self.statements: list[Ready] = []  # all that left a site
        self.sums: dict[int, np.ndarray] = {}  # by round, the newest that was opened
        self.told: list[tuple[str, str, str]] = []  # of each reply: site, status, reason
        self.units = dict.fromkeys(NAMES, 1)  # how many unit vectors a site sums
        self.put_back_sites: set[str] = set()
        self.noisy, self.garbled = dict.fromkeys(NAMES, True), False
        self.clock, self.finished = 0.0, False
        self.error: BaseException | None = None

    def restart(self, name: str) -> None:
        path = self.home / f"{name}.toml"
        self.sites[name] = UnitWorker(load_site(path), path)

    def copy(self, name: str) -> None:
        """Keep a copy of a site's folder, as a snapshot or a backup of its volume is one."""
        shutil.rmtree(self._copy_of(name), ignore_errors=True)
        shutil.copytree(self.home / name, self._copy_of(name))

    def put_back(self, name: str, *, running: bool = False) -> None:
        """Put the copy in the place of a site's folder, of which nothing is left. running: the
        site's process goes on, in place of another one."""
        if not self._copy_of(name).exists():
            return
        shutil.rmtree(self.home / name)
        shutil.copytree(self._copy_of(name), self.home / name)
        self.put_back_sites.add(name)
        if not running:
            self.restart(name)
        here = {(s.seq, s.adapter) for s in Ledger(self.home / name).spending()}
        for drawn in self.of_site(name):
            draw = drawn.waiting.ready.draw
            drawn.lost |= (drawn.waiting.reservation, draw.label) not in here

    def _copy_of(self, name: str) -> Path:
        return self.home / "copies" / name

    def of_site(self, name: str) -> list[Drawn]:
        return [drawn for drawn in self.draws.values() if drawn.waiting.ready.site == name]

    def advance(self, upto: int = ROUNDS, kill_at: int = 0) -> None:
        """Start the coordinator, and kill it after `upto` rounds more, or at a message."""
        done = 0

        def on_event(kind: str, data: dict[str, Any]) -> None:
            nonlocal done
            if kind == "site":
                self.told.append((data["name"], data["status"], data["reason"]))
            done += kind == "round"
            if kind == "round" and done == upto and data["round"] < ROUNDS:
                raise Killed

        start = SimpleNamespace(study=self.study, frozen={}, strategy={})
        start.adapter = {"u": np.zeros(DIMENSION, np.float32)}
        parts = make_parts(start=lambda _: start, key=self.key)
        self.network.messages, self.network.kill_at, self.error = 0, kill_at, None
        with self.at_work():
            try:
                rounds.run(
                    *(self.network, self.study, self.home / "out"),
                    **{"resume": True, "parts": parts, "on_event": on_event},
                )
                self.finished = True
            except (Killed, FedtuneError) as error:
                self.error = error
        self.network._waiting.clear()  # a new coordinator is a new run at Flower
        self.network.kill_at = 0

    def heal(self) -> None:
        self.network.faults.clear()
        self.network.away.clear()
        for site in self.sites.values():
            site.crash = site.lie = ""

    def progress(self) -> store.Progress | None:
        return store.load(self.home / "out", self.study)

    # --------------------------------------------------------------------- a lying coordinator

    def prepare(self, name: str) -> None:
        with self.at_work():
            node, content = self.nodes[name], plan_message(self.study, {}, self.key)
            message = self.network.create_message(content, "query.prepare", node, "x")
            (identity,) = InProcessGrid.push_messages(self.network, [message])
            (reply,) = InProcessGrid.pull_messages(self.network, [identity])
            assert reply.content["admission"]["admitted"], reply.content["admission"]

    def readied(
        self, *names: str, round_: int = 1, attempt: int = 1, value: float = 0.0
    ) -> list[Ready]:
        """Have sites draw, and return their statements."""
        for name in names:
            assert self.ask_ready(name, round_, attempt, value) == "ready"
        return self.statements[-len(names) :]

    def order(self, kind: str, round_: int, attempt: int, **records: Any) -> dict[str, Any]:
        plan = f"{self.study.digest}:{kind}"
        beside = seal.digest_beside(bodies(records.get("adapter", {})), records.get("set"))
        signed = seal.order(self.key, plan, round_, "nonce", "", attempt, beside=beside)
        return {"order": ConfigRecord(signed), **records}

    def ask_words(
        self, name: str, statements: list[Ready], draw: Any = None, text: str | None = None
    ) -> str:
        draw = draw or statements[0].draw
        sent = json.dumps([r.text() for r in statements]) if text is None else text
        said = ConfigRecord({"statements": sent})
        with self.at_work():
            records = self.order("masked", draw.round, draw.attempt, set=said)
            return self.network.tell(name, "train.masked", records)

    def ask_ready(self, name: str, round_: int, attempt: int, value: float = 0.0) -> str:
        adapter = {"u": np.full(DIMENSION, value, np.float32)}
        said = ConfigRecord({"asked": json.dumps(sorted(self.keys.values()))})
        record = to_record(codec.encode(adapter, "float32"))
        with self.at_work():
            records = self.order("ready", round_, attempt, set=said, adapter=record)
            return self.network.tell(name, "train.ready", records)

    def redeliver(self, name: str, back: int) -> None:
        """An old order of the honest coordinator comes once more; the answer goes nowhere."""
        if kept := self.network.orders[self.nodes[name]]:
            with self.at_work():
                self.network._answer(kept[-1 - back % len(kept)])

    # ------------------------------------------------------------------------------- the truth

    def drew(self, waiting: Waiting) -> None:
        self.draws[waiting.ready.masking] = Drawn(replace(waiting, total=waiting.total.copy()))

    def check_memory_alone(self, drawn: Drawn) -> None:
        """Neither a draw's key nor its sum is in any file of its site."""
        private = drawn.waiting.key.private_bytes_raw()
        secrets = (private, private.hex().encode(), drawn.waiting.total.tobytes())
        for path in (self.home / drawn.waiting.ready.site).rglob("*"):
            content = written(path) if path.is_file() else b""
            assert not any(secret in content for secret in secrets), f"key on disk: {path.name}"

    def saw(self, name: str, asked: Message, reply: Message) -> None:
        """What leaves a site, wherever it goes."""
        if reply.has_error() or "site" not in reply.content:
            return
        said, kind = reply.content["site"], asked.metadata.message_type
        if said["status"] == "ready":
            try:
                ready = parse(said["ready"])
            except StatementError:  # a lie that nobody takes
                return
            assert ready.masking in self.draws, "it says ready, and nothing was drawn"
            self.check_memory_alone(self.draws[ready.masking])
            self.statements.append(ready)
            return
        if said["status"] != "masked" or said["set"] == "a lie":
            return
        assert kind == "train.masked"
        statements = parse_set(asked.content["set"]["statements"])
        (mine,) = (r for r in statements if r.signing == self.keys[name])
        drawn = self.draws[mine.masking]
        drawn.left[set_digest(statements)] = b"".join(
            bytes(array.data) for array in reply.content["update"].values()
        )
        assert len(drawn.left) == 1, "one draw, two sets"
        honest = {r.signing for r in statements} & {self.keys[n] for n in (*PINNED, name)}
        assert len(honest) >= LEAST, "too few of the set are pinned"
        assert {r.draw for r in statements} == {mine.draw}, "statements about another draw"
        assert self.sites[name].draws.find(mine.draw) is None, "key kept"
        self.check_memory_alone(drawn)

    def opened(self, statements: dict[str, Ready], total: np.ndarray) -> None:
        keys = frozenset(ready.masking for ready in statements.values())
        exact = sum(self.draws[key].waiting.total for key in keys)
        assert self.garbled or (total == exact).all(), "a wrong sum was opened"
        for key in keys:
            self.draws[key].opened.add(keys)
            assert len(self.draws[key].opened) == 1, "two sums of one draw"
        self.sums[next(iter(statements.values())).draw.round] = total

    def check(self) -> None:
        """Every draw that left is paid for, once each; the adapter is what was opened."""
        for name in NAMES:
            try:
                spent = {s.seq: s for s in self.sites[name].ledger.spending()}
            except LedgerError:  # until it is restored, it charges and draws nothing
                assert name in self.put_back_sites
                continue
            mine = [drawn for drawn in self.of_site(name) if not drawn.lost]
            assert len({d.waiting.reservation for d in mine}) == len(mine), "one charge, two draws"
            for drawn in mine:
                paid, plan = spent[drawn.waiting.reservation], drawn.waiting.ready.draw
                charge = paid.charge
                assert (paid.adapter, charge.round) == (plan.label, plan.round)
                assert (charge.sites, charge.colluding) == (LEAST, COLLUDING)
                assert charge.event.noise_multiplier <= SIGMA * (1 + 1e-12)
                assert charge.fallback.noise_multiplier < SIGMA / 1.41
        kept = self.progress()
        if kept is None:
            return
        assert [h["round"] for h in kept.history] == list(range(1, kept.round + 1))
        expected = np.zeros(DIMENSION)
        for entry in kept.history:
            names = entry["participants"]
            assert len(set(names) & {*PINNED}) >= LEAST
            step = grid_of(self.study, SIGMA, DIMENSION) / sum(SIZES[n] for n in names)
            expected -= RATE * step * self.sums[entry["round"]]
        np.testing.assert_allclose(kept.adapter["u"], expected, rtol=1e-4, atol=1e-5)
        assert kept.round == ROUNDS or not self.finished

    # ------------------------------------------------------------------------------ the machine

    def local_sum(self, study: Study, data: Any, plan: Any, log: Any, round_: int, *_: Any) -> Any:
        """A site's noised sum of its unit vectors, by the plan's own noise."""
        data.site.die("training")
        name, unit = data.site.site.site.name, round(NORM / plan.plan.grid_at(DIMENSION))
        vector = torch.zeros(DIMENSION, dtype=torch.int64)
        vector[NAMES.index(name)] = unit * self.units[name]
        noised = plan.plan._add_noise_to(vector.clone(), log, round_)
        return (noised if self.noisy[name] else vector).numpy()

    def at_work(self) -> ExitStack:
        """Sites by name, a clock that sleeps without waiting, gradients made up, notes taken."""
        stack = ExitStack()
        real_keep, real_destroy = Draws.keep, Draws.destroy
        real_mask, real_open = secure_round.masks.mask, MaskedSum.open
        real = {"ready": secure_round.draw_sum, "masked": secure_round.mask_sum}
        at_work: list[UnitWorker] = []

        def kept(draws: Draws, waiting: Waiting) -> None:
            self.drew(waiting)
            real_keep(draws, waiting)
            at_work[-1].die("drawn")

        def masked(*given: Any) -> Any:
            at_work[-1].die("masking")
            return real_mask(*given)

        def destroyed(*given: Any) -> None:
            for site in at_work[-1:]:  # none where a study ended
                site.die("released")
            real_destroy(*given)

        def done_by(what: str, site: UnitWorker, *given: Any) -> Update:
            at_work.append(site)
            try:
                site.die("reserving")
                self.garbled |= what == "masked" and site.lie == "garbled words"
                return lied(site, what, real[what](site, *given))
            except RuntimeError:
                self.restart(site.site.site.name)
                raise
            finally:
                at_work.pop()

        def opened(this: MaskedSum) -> Any:
            total = real_open(this)
            self.opened(this.statements, total)
            return total

        def slept(seconds: float) -> None:
            self.clock += seconds

        clock = SimpleNamespace(monotonic=lambda: self.clock, sleep=slept, time=time.time)
        for where, name, what in (
            (fedtune.core.vault.answers, "worker", self.sites.__getitem__),
            (secure_round, "local_sum", self.local_sum),
            (Draws, "keep", kept),
            (Draws, "destroy", destroyed),
            (secure_round.masks, "mask", masked),
            (secure_round, "draw_sum", lambda *a: done_by("ready", *a)),
            (secure_round, "mask_sum", lambda *a: done_by("masked", *a)),
            (MaskedSum, "open", opened),
            (exchange, "time", clock),
            (polling, "time", clock),
            (budget.accountant, "epsilon", remembered(_epsilon)),
            (budget, "total_epsilon", remembered(_total)),
        ):
            stack.enter_context(patch.object(where, name, what))
        return stack


@cache
def _epsilon(events: tuple[Any, ...], delta: float) -> float:
    return EPSILON(list(events), delta)


@cache
def _total(events: tuple[Any, ...], *rest: Any) -> Any:
    return TOTAL(list(events), *rest)


def remembered(known: Any) -> Any:
    """The same charges come again in each sequence, and composing them takes its time."""
    return lambda events, *rest: known(tuple(events), *rest)
