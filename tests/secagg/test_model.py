"""Model-based: whatever happens in whatever order, only whole sums are opened, each draw for one
set, and all are paid for. `tests/secagg/model.py` says what is simulated and what must hold."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.depth import long_but
from tests.secagg.model import MEMORY, World
from tests.secagg.unit_sites import NAMES, PINNED, READY_LIES, ROUNDS
from tests.server.test_model import limits

names = st.sampled_from(NAMES)
KINDS = ("train.ready", "train.masked")
FAULTS = ("request", "response", "twice", "replay", "garbage", "late")
CRASHES = ("reserving", "training", "drawn", "masking", "released")
LIES = (*READY_LIES, "another set", "short words")


class Consortium(RuleBasedStateMachine):
    @initialize(rounds=st.integers(0, 1))
    def begin(self, rounds: int) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.world = World(self.folder)
        if rounds:
            self.world.advance(rounds)

    @rule(rounds=st.integers(1, 2))
    def run_and_kill_after(self, rounds: int) -> None:
        self.world.advance(rounds)

    @rule(at=st.integers(1, 60))
    def run_and_kill_within(self, at: int) -> None:
        self.world.advance(2, kill_at=at)

    @rule(name=names, kind=st.sampled_from(KINDS), fault=st.sampled_from(FAULTS))
    def break_the_network(self, name: str, kind: str, fault: str) -> None:
        self.world.network.faults[self.world.nodes[name], kind] = fault

    @rule(name=names, where=st.sampled_from(CRASHES))
    def crash_a_site(self, name: str, where: str) -> None:
        self.world.sites[name].crash = where

    @rule(name=names)
    def restart_a_site(self, name: str) -> None:
        self.world.restart(name)

    @rule(name=names)
    def copy_a_folder(self, name: str) -> None:
        self.world.copy(name)

    @rule(name=names)
    def put_a_folder_back(self, name: str) -> None:
        """Of one site in a sequence: it fails from then on until it is restored, and the others
        have to end the study."""
        if self.world.put_back_sites <= {name}:
            self.world.put_back(name)

    @rule(name=names, lie=st.sampled_from(LIES))
    def lie(self, name: str, lie: str) -> None:
        self.world.sites[name].lie = lie

    @rule(name=names)
    def leave(self, name: str) -> None:
        self.world.network.away.add(self.world.nodes[name])

    @rule(name=names)
    def join(self, name: str) -> None:
        self.world.network.away.discard(self.world.nodes[name])

    @rule(name=names, back=st.integers(0, 8))
    def deliver_an_old_order(self, name: str, back: int) -> None:
        self.world.redeliver(name, back)

    @rule(name=names, round_=st.integers(1, ROUNDS), attempt=st.integers(1, 3))
    def ask_for_another_draw(self, name: str, round_: int, attempt: int) -> None:
        self.world.ask_ready(name, round_, attempt, value=0.5)

    @rule(name=names, chosen=st.sets(names, min_size=1), back=st.integers(0, 2))
    def ask_for_a_set_of_its_own(self, name: str, chosen: set[str], back: int) -> None:
        """The coordinator lies: any statements of one draw, or of several."""
        told = self.world.statements
        draws = list(dict.fromkeys(r.draw for r in told))
        if not draws:
            return
        draw = draws[-1 - back % len(draws)]
        newest = {r.site: r for r in told if r.draw == draw or back == 2}
        if some := [newest[n] for n in sorted({*chosen, name}) if n in newest]:
            self.world.ask_words(name, some, draw)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """Once all is well again, the study ends."""
        if not hasattr(self, "folder"):
            return
        try:
            self.world.heal()
            ends(self.world)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


TestConsortium = Consortium.TestCase
TestConsortium.settings = limits(6, 6)


@pytest.mark.long
def test_many_more_sequences():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Consortium, settings=limits(1_000, 20))


# --------------------------------------------------------------------------- written-out ones


def ends(fresh: World) -> None:
    fresh.check()
    for _ in range(4):  # what a lying coordinator had masked voids an attempt each
        fresh.advance()
        fresh.check()
        if fresh.finished:
            return
    raise AssertionError(f"the study does not end: {fresh.error}")


def test_nothing_happens(fresh: World):
    fresh.advance()
    assert fresh.finished, fresh.error
    fresh.check()
    assert len(fresh.draws) == ROUNDS * len(NAMES)


EACH = [(fault, kind) for fault in FAULTS for kind in KINDS]
ONCE = [(fault, KINDS[at % 2]) for at, fault in enumerate(FAULTS)]  # each fault and each kind


@pytest.mark.parametrize(("fault", "kind"), long_but(ONCE, EACH))
def test_each_fault_alone(fresh: World, fault: str, kind: str):
    fresh.advance(1)
    fresh.network.faults[fresh.nodes["a"], kind] = fault
    fresh.advance(1)
    assert not fresh.network.faults or fault == "twice"
    ends(fresh)


@pytest.mark.parametrize("where", CRASHES)
def test_a_site_that_crashes_pays_for_what_it_drew_and_the_study_goes_on(fresh: World, where: str):
    fresh.advance(1)
    fresh.sites["a"].crash = where
    fresh.advance(1)
    ends(fresh)


def test_a_site_that_restarts_between_ready_and_masked_costs_everybody_another(fresh: World):
    for name in ("d", "s"):
        fresh.network.away.add(fresh.nodes[name])
    fresh.network.saw = restarts_once(fresh, "a", "ready")
    fresh.advance(1)
    assert ("a", "void") in {told[:2] for told in fresh.told}
    assert [len(fresh.sites[n].ledger.spending()) for n in PINNED[:3]] == [2, 2, 2]
    assert len(fresh.draws) == 6 and sum(bool(d.opened) for d in fresh.draws.values()) == 3
    ends(fresh)


def test_a_site_that_restarts_after_masked_costs_nothing(fresh: World):
    fresh.network.saw = restarts_once(fresh, "a", "masked")
    fresh.advance()
    assert fresh.finished and len(fresh.draws) == ROUNDS * len(NAMES)
    fresh.check()


def restarts_once(world: World, name: str, after: str) -> Callable[[str, Message, Message], None]:
    """What the network tells of each reply, after which a site restarts once."""
    restarted = list[str]()

    def saw(site: str, asked: Message, reply: Message) -> None:
        World.saw(world, site, asked, reply)
        said = {} if reply.has_error() else reply.content.get("site", {})
        if site == name and said.get("status") == after and not restarted:
            restarted.append(site)
            world.restart(site)

    return saw


def test_a_folder_put_back_is_noticed_by_the_receipt_and_the_others_go_on(fresh: World):
    fresh.advance(1)
    fresh.copy("a")
    fresh.advance(1)
    fresh.put_back("a")
    fresh.advance()
    assert ("a", "failed") in {told[:2] for told in fresh.told}
    ends(fresh)
