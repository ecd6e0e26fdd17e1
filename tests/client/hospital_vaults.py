"""The vaults of a hospital's memberships, each in a process of its own that a test may kill, and
their coordinators, who ask them at the seam of requests (core/vault/process.serve).

A vault is forked from the test's process, which has built the network, and runs no self-test, so
that it starts in milliseconds. What it wrote stays when it is killed; what it had in memory is
gone, and it is started again, as its client would."""

from __future__ import annotations

import math
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from scipy.optimize import brentq
from scipy.stats import norm

from fedtune.core.config import load_site
from fedtune.core.dp.steplog import StepLog
from fedtune.core.ledger.files import DATABASE
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.vault import process
from fedtune.core.vault.policy import compute_plan
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.arrays import bodies, pack_arrays
from fedtune.core.wire.codec import encode
from fedtune.core.wire.events import Teller
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.protocol import version_fields
from fedtune.core.wire.requests import Answer, Request, receive_answer, send
from fedtune.core.wire.seal import digest_beside, order, sign_plan
from fedtune.public.start import Start

PATIENCE = 120.0  # seconds, far more than any answer takes
Statements = Callable[[], None]  # that run in a vault's process before it answers


@dataclass
class Vault:
    """The vault of one membership, and its consortium's coordinator."""

    site: Path
    made: Start
    before: Statements = lambda: None
    key: SigningKey = field(default_factory=SigningKey)
    answers: int = 0  # rounds that the coordinator has
    kills: int = 0
    asked: bool = False  # whether a request waits for its answer
    _pid: int = 0
    _end: Connection | None = None

    def start(self) -> None:
        ours, theirs = Pipe()
        told, tells = Pipe()
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                ours.close()
                told.close()
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                self.before()
                given: dict[str, Any] = {"coordinator": self.key.public, "simulated": False}
                process.serve(self.site, theirs, Teller(tells), 1, given)
            os._exit(0)
        theirs.close()
        tells.close()
        told.close()  # nobody looks at its events
        self._pid, self._end, self.asked = pid, ours, False
        self._admit()

    def kill(self) -> None:
        """End the process with SIGKILL, if there is one."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        if self._end:
            self._end.close()
        self._pid, self._end, self.asked = 0, None, False

    def ask(self, round_: int) -> None:
        """Order a round."""
        adapter = pack_arrays(encode(self.made.adapter, self.made.study.wire.adapter))
        beside = digest_beside(bodies(adapter))
        digest = self.made.study.digest
        about = order(self.key, digest, round_, "0" * 32, "", beside=beside)
        self._send(Request("train", {"order": about}, adapter))
        self.asked = True

    def wait(self, seconds: float = PATIENCE) -> Answer | None:
        """Return the answer; None if there is none after so many seconds."""
        assert self._end is not None
        if not self._end.poll(seconds):
            return None
        self.asked = False
        return receive_answer(self._end)

    def _admit(self) -> None:
        study = self.made.study
        plan = {"study": study.model_dump_json(), "digest": study.digest}
        plan |= {**sign_plan(self.key, study.digest), **version_fields()}  # type: ignore[dict-item]
        self._send(Request("prepare", {"plan": plan}, pack_arrays(self.made.frozen)))
        answer = self.wait()
        assert answer is not None, "no answer to a plan: the vaults wait for each other"
        self.admitted = answer.status == "admitted"
        self.reason = str(answer.fields["reason"])

    def _send(self, request: Request) -> None:
        assert self._end is not None
        send(self._end, request)


def warm(vaults: Mapping[str, Vault]) -> None:
    """Build the networks, which all processes share, in this one."""
    for vault in vaults.values():
        scratch = SiteWorker(load_site(vault.site), vault.site)
        made = vault.made
        scratch._prepare_model(made.study, None, made.frozen, vault.key.public)
        compute_plan(made.study, scratch.site, vault.key.public)
    process_cache.clear("workers")


@dataclass
class Story:
    """Orders of several coordinators at once, and kills, all drawn from a seed."""

    home: Path
    vaults: Mapping[str, Vault]
    seed: int
    rounds: int = 4  # of each study
    killing: float = 0.5  # how often an order ends with its vault
    pace: float = 0.15  # seconds in which an order is about done, of which a kill takes some moment

    def live(self) -> None:
        """Order each membership's rounds, in any order and at once; kill vaults at any moment."""
        draw = random.Random(self.seed)
        for vault in self.vaults.values():
            vault.start()
        deadline = time.monotonic() + PATIENCE
        while waiting := [v for v in self.vaults.values() if v.answers < self.rounds]:
            assert time.monotonic() < deadline, "no progress: the vaults wait for each other"
            vault = draw.choice(waiting)
            if not vault.admitted:  # the budget is used up
                vault.answers = self.rounds
                continue
            if not vault.asked:
                vault.ask(vault.answers + 1)
            if draw.random() < self.killing:
                time.sleep(draw.random() * self.pace)
                vault.kill()
                vault.kills += 1
                vault.start()
                continue
            if draw.random() < 0.5:  # meanwhile another is asked
                continue
            answer = vault.wait()
            assert answer is not None, "no answer: the vaults wait for each other"
            deadline = time.monotonic() + PATIENCE  # there is progress
            if answer.status == "trained":
                vault.answers += 1
            else:
                assert answer.status == "refused", dict(answer.fields)
                vault.answers = self.rounds
        for vault in self.vaults.values():
            vault.kill()

    def check(self, ceiling: float, delta: float) -> None:
        """Check the ledger against what was answered, logged and allowed.

        Errors: AssertionError."""
        ledger = Ledger(self.home)
        ledger.verify()
        charges = ledger.charges("records")
        steps = StepLog(self.home / "steps.jsonl").steps()
        assert len(charges) >= len({(s.study, s.round) for s in steps})
        for name, vault in self.vaults.items():
            mine = [charge for charge in charges if charge.membership == name]
            assert {charge.study for charge in mine} <= {vault.made.study.digest}
            logged = [step for step in steps if step.study == vault.made.study.digest]
            assert sum(charge.steps for charge in mine) >= len(logged), "a step is not charged"
        mu = math.sqrt(sum(c.steps / c.noise_multiplier**2 for c in charges))
        assert all(charge.sampling_rate == 1.0 for charge in charges)
        assert gaussian_epsilon(mu, len(self.vaults) * delta) <= ceiling, f"{len(charges)} charges"
        assert ledger_is_sound(self.home)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return ε at δ of steps that all take every unit, as Gaussian DP has it (Dong et al. 2022,
    Corollary 2.13); an accountant that shares no code with fedtune's."""
    if mu == 0:
        return 0.0

    def excess(epsilon: float) -> float:
        loss = norm.cdf(-epsilon / mu + mu / 2)
        return float(loss - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2) - delta)

    return float(brentq(excess, 0.0, 500.0)) if excess(0.0) > 0 else 0.0


def ledger_is_sound(home: Path) -> bool:
    with closing(sqlite3.connect(home / DATABASE)) as connection:
        return list(connection.execute("PRAGMA integrity_check")) == [("ok",)]
