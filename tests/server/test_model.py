"""Model-based: whatever happens in whatever order, no contribution is lost, doubled or made up.

`tests/server/model.py` says what is simulated and what must hold. Sequences that once failed are
written out below."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedtune.core.errors import InfrastructureError
from fedtune.core.wire.seal import open_seal
from fedtune.server.admission import Tally
from tests.server.model import AT_LEAST, NAMES, ROUNDS, World

names = st.sampled_from(NAMES)
# Real ledgers wait for the disk at every entry; in memory the same sequences run ten times faster.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
FAULTS = ("request", "response", "twice", "replay", "garbage")


class Consortium(RuleBasedStateMachine):
    @initialize(rounds=st.integers(0, 3))
    def begin(self, rounds: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.world = World(self.folder)
        for name in NAMES:
            self.world.copy_ledger(name)
        if rounds:
            self.world.advance(rounds)

    @rule(rounds=st.integers(1, 3))
    def run_and_kill_after(self, rounds: int) -> None:
        self.world.advance(rounds)

    @rule(where=st.sampled_from(["push", "pull"]), after=st.integers(1, 12))
    def run_and_kill_within(self, where: str, after: int) -> None:
        self.world.network.kill_at = where, after
        self.world.advance(2)

    @rule(files=st.integers(1, 4))
    def run_and_fill_the_disk(self, files: int) -> None:
        self.world.disk_full_at = files
        self.world.advance(2)
        self.world.disk_full_at = 0

    def break_the_network(self, name: str, kind: str) -> None:
        self.world.network.faults[self.world.nodes[name]] = kind

    @rule(name=names, kind=st.sampled_from(FAULTS))
    def run_over_a_broken_network(self, name: str, kind: str) -> None:
        self.break_the_network(name, kind)
        self.world.advance(1)

    @rule(name=names, where=st.sampled_from(["reserving", "training", "released"]))
    def crash_a_site(self, name: str, where: str) -> None:
        self.world.sites[name].crash = where

    @rule(name=names)
    def refuse(self, name: str) -> None:
        self.world.sites[name].refuses = True

    @rule(name=names)
    def leave(self, name: str) -> None:
        self.world.network.away.add(self.world.nodes[name])

    @rule(name=names)
    def join(self, name: str) -> None:
        self.world.join(name)

    @rule(name=st.sampled_from(NAMES[2:]))  # two stay, so that most studies can end
    def revoke(self, name: str) -> None:
        self.world.revoke(name)

    @rule(name=names)
    def copy_the_ledger(self, name: str) -> None:
        self.world.copy_ledger(name)

    @rule(name=st.sampled_from(NAMES[:2]))
    def roll_the_ledger_back(self, name: str) -> None:
        self.world.roll_back(name)

    @rule(seconds=st.sampled_from([-86_400.0, -5.0, 3_600.0, 1e8]))
    def move_the_clock(self, seconds: float) -> None:
        self.world.clock += seconds

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """Once all is well again, the study ends, if enough sites are left to end it."""
        if not hasattr(self, "folder"):
            return
        try:
            if self.world.heal() >= AT_LEAST:
                ends(self.world)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def limits(examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples, stateful_step_count=steps, derandomize=True, deadline=None,
        database=None, suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip


TestConsortium = Consortium.TestCase
TestConsortium.settings = limits(15, 15)


@pytest.mark.long
def test_many_more_sequences():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Consortium, settings=limits(1_000, 25))


# --------------------------------------------------------------------------- written-out ones


@pytest.fixture
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield World(Path(folder))


def ends(world: World) -> None:
    world.check()
    world.advance(ROUNDS)
    world.check()
    assert world.finished, world.error


def test_nothing_happens(world: World):
    world.advance(ROUNDS)
    ends(world)
    kept = world.progress()
    assert kept is not None
    np.testing.assert_allclose(kept.adapter["u"], ROUNDS / len(NAMES), atol=1e-6)


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_alone(world: World, kind: str):
    world.advance(1)
    world.network.faults[world.nodes["a"]] = kind
    world.advance(1)
    assert not world.network.faults or kind == "twice"
    ends(world)


@pytest.mark.parametrize("where", ["reserving", "training", "released"])
def test_a_site_that_crashes_is_charged_at_most_once_more(world: World, where: str):
    for name in NAMES:
        world.sites[name].crash = where
    world.advance(1)
    world.check()
    for site in world.sites.values():
        charged = [c.round for c in site.ledger.charges("records")]
        assert charged.count(1) == (2 if where == "training" else 1)
        assert site.trained.count(1) == 1
    ends(world)


def test_a_rolled_back_site_is_out_for_good(world: World):
    world.copy_ledger("a")
    world.advance(2)
    world.roll_back("a")
    ends(world)
    assert world.banned == {"a": 2}
    kept = world.progress()
    assert kept is not None
    assert [("a" in h["participants"]) for h in kept.history] == [True] * 2 + [False] * 4


def test_a_full_disk_loses_no_round(world: World):
    world.advance(2)
    world.disk_full_at = 3
    world.advance(2)
    assert isinstance(world.error, InfrastructureError)
    assert "No space" in str(world.error) and str(world.error).count("out") >= 1
    world.disk_full_at = 0
    ends(world)


def test_a_revoked_site_is_in_no_later_round(world: World):
    world.advance(2)
    world.revoke("d")
    world.join("d")
    ends(world)
    kept = world.progress()
    assert kept is not None and "d" not in kept.history[-1]["participants"]


def test_below_quorum_nothing_counts(world: World):
    for name in NAMES[1:]:
        world.network.away.add(world.nodes[name])
    world.advance(1)
    assert isinstance(world.error, InfrastructureError) and world.progress() is None
    assert world.sites["a"].trained == []
    for name in NAMES[1:]:
        world.join(name)
    ends(world)


# ------------------------------------------------------------------------------------- twins


def test_the_twin_that_counts_twice_is_caught(world: World, monkeypatch: pytest.MonkeyPatch):
    from fedtune.server.rounds import _Run

    take = _Run._take

    def greedy(self: Any, *given: Any) -> str:
        take(self, *given)
        return take(self, *given)

    monkeypatch.setattr(_Run, "_take", greedy)
    world.advance(1)
    world.check()  # the key alone keeps it from counting twice
    monkeypatch.setattr(Tally, "has", lambda self, *key: False)
    monkeypatch.setattr("fedtune.server.admission._check_log", lambda *_: None)
    world.advance(1)
    with pytest.raises(AssertionError):
        world.check()


def test_the_twin_that_takes_any_round_and_nonce_is_caught(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    def lax(site: Any, key: str, wanted: Any) -> Any:
        said = json.loads(site["header"])
        return open_seal(site, key, replace(wanted, nonce=said["nonce"], round=said["round"]))

    world.advance(1)
    monkeypatch.setattr("fedtune.core.wire.seal.open_seal", lax)
    world.network.faults[world.nodes["a"]] = "replay"
    world.advance(1)
    world.check()  # the step log shows no new step: a second line of defence
    monkeypatch.setattr("fedtune.server.admission._check_log", lambda *_: None)
    world.network.faults[world.nodes["a"]] = "replay"
    world.advance(1)
    with pytest.raises(AssertionError, match="a ghost"):
        world.check()


def test_the_twin_without_a_quorum_is_caught(world: World, monkeypatch: pytest.MonkeyPatch):
    world.advance(1)
    table = world.study.strategy.model_copy(update={"min_sites": 1})
    monkeypatch.setattr("fedtune.server.rounds._Run.table", table, raising=False)
    monkeypatch.setattr("fedtune.server.rounds._Run.__setattr__", _all_but("table"), raising=False)
    for name in NAMES[1:]:
        world.network.away.add(world.nodes[name])
    world.advance(1)
    with pytest.raises(AssertionError, match="below quorum"):
        world.check()


def _all_but(kept: str) -> Any:
    def set_(self: Any, name: str, value: Any) -> None:
        if name != kept:
            object.__setattr__(self, name, value)

    return set_
