"""Two releases in one consortium, as decision 0013 states: of three versions of the protocol the
six pairs that differ are refused, at the start of a study and in the middle of it; the same release
goes on. A ledger of a newer release is refused whole, in the middle of a study too.

Both ends are the real ones, with their own messages; each takes the number from its own copy of
fedtune.core.wire.protocol."""

from __future__ import annotations

import importlib.util
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedtune.core.errors import Refused
from fedtune.core.ledger import chain
from fedtune.core.ledger.files import NewerLedger
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.vault import answers
from fedtune.core.wire import protocol
from fedtune.core.wire.protocol import PROTOCOL
from fedtune.server import admission
from tests.simulated import simulate
from tests.test_end_to_end import NAMES, lay_out

VERSIONS = (PROTOCOL - 1, PROTOCOL, PROTOCOL + 1)
PAIRS = tuple(permutations(VERSIONS, 2))
PRIVATE = '{ noise_multiplier = 2.0, delta = 1e-3, unit = "patient" }'
ROUNDS = 3


class World:
    """A study and its two sites, whose ends can be of any release."""

    def __init__(self, folder: Path, base: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.study = lay_out(folder, base, PRIVATE)
        self.sites = [folder / f"site-{name}.toml" for name in NAMES]

    def releases(self, site: int, coordinator: int) -> None:
        """From here on the sites and the coordinator speak these versions."""
        self.sites_speak(site)
        speak(self.patch, admission, coordinator)

    def sites_speak(self, version: int) -> None:
        process_cache.clear("workers")  # a site that was stopped and started again
        speak(self.patch, answers, version)

    def run(self, *, until: int = ROUNDS, then: Any = None) -> None:
        """Start the study, or go on with it, up to the end of round `until`. then: is called at the
        end of each round."""

        def on_event(kind: str, facts: dict[str, Any]) -> None:
            if kind == "round" and then is not None:
                then()
            if kind == "round" and facts["round"] == until < ROUNDS:
                raise KeyboardInterrupt

        out = self.folder / "run"
        options: dict[str, Any] = {"on_event": on_event, "resume": (out / "checkpoint").is_dir()}
        if until == ROUNDS:
            simulate(self.study, self.sites, out, **options)
            return
        with pytest.raises(KeyboardInterrupt):
            simulate(self.study, self.sites, out, **options)

    def spent(self) -> list[tuple[str, int, bool]]:
        """(site, round, whether it left the site) of every charge."""
        states = [(name, self.folder / f"state-{name}") for name in NAMES]
        return [
            (name, spent.charge.round, spent.released)
            for name, state in states
            if (state / "ledger.db").exists()
            for spent in Ledger(state).spending("records")
        ]

    def kept(self) -> dict[Path, bytes]:
        """What a refusal must leave as it is: the ledgers, the step logs, the checkpoint."""
        wanted = ("ledger.*", "steps.jsonl", "checkpoint/*")
        folders = [self.folder / "run", *(self.folder / f"state-{name}" for name in NAMES)]
        found = [path for folder in folders for one in wanted for path in folder.glob(one)]
        return {path: path.read_bytes() for path in found if path.is_file()}


def speak(patch: pytest.MonkeyPatch, end: ModuleType, version: int) -> None:
    """Give one end the protocol's module as a release with another number has it."""
    spec = importlib.util.spec_from_file_location("other_protocol", str(protocol.__file__))
    assert spec is not None and spec.loader is not None
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    other.PROTOCOL = version
    for name in ("check_peer", "version_fields", "OtherProtocol"):
        if hasattr(end, name):
            patch.setattr(end, name, getattr(other, name))


@pytest.fixture
def world(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, tiny_base, monkeypatch)


def once_each(last: int) -> list[tuple[str, int, bool]]:
    return [(name, number, True) for name in NAMES for number in range(1, last + 1)]


def check_said(refusal: BaseException, site: int, coordinator: int) -> None:
    """The refusal names both numbers, both ends and what to do."""
    said = str(refusal)
    assert f"protocol {site} " in said and f"protocol {coordinator} " in said, said
    assert (
        "coordinator" in said
        and "site" in said
        and "a release with the other end's protocol" in said
    ), said


def test_the_six_pairs_are_refused_as_a_study_starts(world: World) -> None:
    """Not a record is read and nothing is charged; the same release then runs the study."""
    assert len(PAIRS) == 6
    for site, coordinator in PAIRS:
        world.releases(site, coordinator)
        with pytest.raises(Refused) as refusal:
            world.run()
        check_said(refusal.value, site, coordinator)
        assert world.spent() == [] and not list(world.folder.glob("state-*/ledger*"))
    world.releases(PROTOCOL + 1, PROTOCOL + 1)
    world.run()
    assert world.spent() == once_each(ROUNDS)


def test_the_six_pairs_are_refused_in_the_middle_of_a_study(world: World) -> None:
    """After a round either end comes back as another release: what was spent stays, byte by byte,
    and the release that began goes on."""
    world.run(until=1)
    before = world.kept()
    for site, coordinator in PAIRS:
        world.releases(site, coordinator)
        with pytest.raises(Refused) as refusal:
            world.run()
        check_said(refusal.value, site, coordinator)
        assert world.kept() == before, (site, coordinator)
    world.releases(PROTOCOL, PROTOCOL)
    world.run()
    assert world.spent() == once_each(ROUNDS)


def test_without_the_check_a_pair_trains(world: World) -> None:
    """The twin of both."""
    world.run(until=1)
    world.releases(PROTOCOL + 1, PROTOCOL)
    for end in (answers, admission):
        world.patch.setattr(end, "check_peer", lambda *_: None)
    world.run(until=2)
    assert world.spent() == once_each(2)


@pytest.mark.parametrize("version", [PROTOCOL - 1, PROTOCOL + 1])
def test_a_site_that_comes_back_as_another_release_gets_no_further_round(
    world: World, version: int
) -> None:
    """While the coordinator runs: its next order finds no plan there, and the plan is refused."""
    with pytest.raises(Refused) as refusal:
        world.run(then=lambda: world.sites_speak(version))
    check_said(refusal.value, version, PROTOCOL)
    assert world.spent() == once_each(1)
    world.sites_speak(PROTOCOL)
    world.run()
    assert world.spent() == once_each(ROUNDS)


def test_ledgers_are_upgraded_in_the_middle_of_a_study_and_not_downgraded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, older = chain.FORMAT + 1, chain.FORMAT
    world.run(until=1)
    world.sites_speak(PROTOCOL)
    monkeypatch.setattr(chain, "FORMAT", newer)
    world.run(until=2)
    assert world.spent() == once_each(2)
    before = world.kept()
    world.sites_speak(PROTOCOL)
    monkeypatch.setattr(chain, "FORMAT", older)
    with pytest.raises(NewerLedger, match=f"format {newer}.*format {older} at most.*upgrade"):
        world.run()
    assert world.kept() == before
    monkeypatch.setattr(chain, "FORMAT", newer)
    world.sites_speak(PROTOCOL)
    world.run()
    assert world.spent() == once_each(ROUNDS)
