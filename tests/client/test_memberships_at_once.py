"""Vaults of one hospital that work at the same time, and are killed at any moment.

FEDTUNE_INTERLEAVINGS says how many stories the long form tells (without it: 200), with two
memberships and with three in turn, FEDTUNE_SEED with which it begins."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest

from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault import budget, worker
from tests.client.hospital_kit import make_hospital, study_of
from tests.client.hospital_vaults import Story, Vault, warm

CEILING, DELTA = 5.0, 1e-4
# A vault would run the self-test again after each kill, in more time than all of its rounds.
pytestmark = pytest.mark.usefixtures("without_self_test")

SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextmanager
def vaults(home: Path, base: Path, **given: object) -> Iterator[dict[str, Vault]]:
    files = make_hospital(home, ceiling=CEILING, **given)  # type: ignore[arg-type]
    made = {name: Vault(path, study_of(name, base)) for name, path in files.items()}
    warm(made)
    try:
        yield made
    finally:
        for vault in made.values():
            vault.kill()


@pytest.fixture
def home() -> Iterator[Path]:
    """A home in memory where there is such a folder: no disk waits for each reservation."""
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        yield Path(folder) / "home"


def tell_story(home: Path, base: Path, seed: int, memberships: int = 2, **how: float) -> int:
    with vaults(home, base, shares=[8.0] * memberships) as made:
        story = Story(home, made, seed, **how)  # type: ignore[arg-type]
        story.live()
        story.check(CEILING, DELTA)
        return sum(vault.kills for vault in made.values())


def test_kills_and_interleavings(home: Path, tiny_base: Path) -> None:
    assert tell_story(home, tiny_base, 1, memberships=3, killing=0.3)


@pytest.mark.long
def test_many_interleavings(home: Path, tiny_base: Path) -> None:
    first = int(os.environ.get("FEDTUNE_SEED", "0"))
    number, kills, began = int(os.environ.get("FEDTUNE_INTERLEAVINGS", "200")), 0, time.monotonic()
    for seed in range(first, first + number):
        kills += tell_story(home, tiny_base, seed, memberships=2 + seed % 2)
        shutil.rmtree(home)
    print(f"{number} stories from {first}, {kills} kills, {time.monotonic() - began:.0f} s")


def test_a_membership_that_reads_its_own_balance_alone_is_caught(
    home: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget.Budget, "_exceeds_ceiling", lambda *_: False)
    with pytest.raises(AssertionError, match="charges"):
        tell_story(home, tiny_base, 0, killing=0.0)


def test_a_round_waits_for_no_round_of_another_consortium(home: Path, tiny_base: Path) -> None:
    """The one stands still in the midst of its training while the other takes whole rounds."""
    with vaults(home, tiny_base) as made:
        slow, quick = made["onco"], made["cardio"]
        reached, says = Pipe()
        goes_on, go_on = Pipe()

        def stand_still() -> None:
            train = worker.local_round

            def local_round(*given: object) -> object:
                says.send_bytes(b"here")
                goes_on.recv_bytes()
                return train(*given)

            worker.local_round = local_round

        slow.before = stand_still
        slow.start()
        quick.start()
        slow.ask(1)
        assert reached.poll(60)
        quick.ask(1)
        answer = quick.wait(60)
        assert answer is not None and answer.status == "trained"
        assert len(Ledger(home).charges("records")) == 2
        go_on.send_bytes(b"on")
        answer = slow.wait(60)
        assert answer is not None and answer.status == "trained"
