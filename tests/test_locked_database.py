"""A database of the run, or of a site, that another process keeps locked in mid-study: waited for,
then named; nothing is lost, and the study goes on once it is free."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.core.errors import InfrastructureError
from fedtune.core.ledger import chain
from fedtune.server import store
from tests.network.kit import OFF, PRIVATE
from tests.simulated import simulate
from tests.test_full_disk import World

LOCKS = [
    "BEGIN EXCLUSIVE",
    pytest.param("BEGIN IMMEDIATE", marks=pytest.mark.long),
    pytest.param("BEGIN; SELECT count(*) FROM sqlite_master", marks=pytest.mark.long),  # a reader
]


@contextmanager
def locked(path: Path, statements: str) -> Iterator[None]:
    """As a backup, a virus scanner or a person with the sqlite3 shell may hold it."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        for statement in statements.split("; "):
            other.execute(statement).fetchall()
        yield


def after_round_one(world: World, path: Path, lock: str, until: threading.Event) -> None:
    """Run the study; once its first round is kept the database at `path` is locked until then."""

    def hold() -> None:
        with locked(path, lock):
            held.set()
            until.wait(120)

    held, holder = threading.Event(), threading.Thread(target=hold, daemon=True)

    def on_event(event: str, data: dict[str, Any]) -> None:
        if event == "round" and data["round"] == 1:
            holder.start()
            held.wait(60)

    try:
        simulate(world.study, world.sites, world.run, on_event=on_event)
    finally:
        until.set()
        if holder.ident:
            holder.join()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_run_whose_database_stays_locked_says_so_and_is_resumed(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    monkeypatch.setattr(store, "BUSY", 0.2)
    whole = World(tmp_path / "whole", tiny_base, OFF)
    whole.simulate()
    world = World(tmp_path / "world", tiny_base, OFF)
    database = world.run / store.FOLDER / store.DATABASE
    with pytest.raises(InfrastructureError, match=r"cannot be written .database is locked") as said:
        after_round_one(world, database, lock, threading.Event())
    assert "stop the other process, then use --resume" in str(said.value)
    world.simulate(resume=True)
    world.check(private=False)
    assert all(np.array_equal(a, world.adapter()[n]) for n, a in whole.adapter().items())


@pytest.mark.parametrize("lock", LOCKS)
def test_a_ledger_that_stays_locked_charges_nothing_and_goes_on(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    monkeypatch.setattr(chain, "BUSY", 0.2)
    world = World(tmp_path / "world", tiny_base, PRIVATE)
    database = world.sites[0].parent / "state" / "ledger.db"
    with pytest.raises(InfrastructureError, match="north: failed"):
        after_round_one(world, database, lock, threading.Event())
    world.simulate(resume=True)
    world.check(private=True)


def test_a_lock_that_is_given_up_is_waited_for(tmp_path: Path, tiny_base: Path) -> None:
    """The twin: both databases are locked, in turn, for a moment; nobody notices."""
    for number, part in enumerate(("run/checkpoint/run.db", "north/state/ledger.db")):
        world, free = World(tmp_path / str(number), tiny_base, PRIVATE), threading.Event()
        path = world.study.parent / part
        threading.Timer(1.0, free.set).start()
        after_round_one(world, path, "BEGIN EXCLUSIVE", free)
        world.check(private=True)
