"""A hospital in several consortia, each with its own coordinator, over Flower on loopback.

FEDTUNE_CONSORTIA says how many take part (2), FEDTUNE_STUDIES how often it is done (1),
FEDTUNE_KILLS how many of the hospital's vaults and couriers are killed in each (4)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedtune.core.ledger.ledger import Ledger
from fedtune.flower.ports import free_port
from tests.network.kit import PRIVATE, Consortium, children, consortium, done, end, records, until

ROUNDS = 4
HOSPITAL = """
[hospital]
name = "north"
declared_size = 40
[policy]
max_epsilon = 50.0
max_fallback_epsilon = 100.0
[datasets.records]
path = "data.jsonl"
"""
OF_ONE = '[memberships.{name}]\nsite = "{site}"\n'


@dataclass
class Hospital:
    """Its home, and the consortia in which it is "north"."""

    home: Path
    consortia: dict[str, Consortium]

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.home)

    def charged(self, name: str) -> int:
        return sum(s.charge.membership == name for s in self.ledger.spending("records"))

    def logs(self) -> str:
        return "\n".join(made.told() for made in self.consortia.values())


@contextmanager
def hospital(root: Path, base: Path, number: int) -> Iterator[Hospital]:
    home, text = root / "home", HOSPITAL
    home.mkdir(parents=True)
    records(home / "data.jsonl", 1)
    with ExitStack() as stack:
        made: dict[str, Consortium] = {}
        for name in ("cardio", "derma", "onco")[:number]:
            one = stack.enter_context(consortium(root / name, "127.0.0.1", free_port()))
            one.lay_out(base, PRIVATE, ROUNDS, min_sites=1)
            site = one.root / "north" / "site.toml"
            settings = site.read_text().replace(
                '"data.jsonl"', json.dumps(str(home / "data.jsonl"))
            )
            site.write_text(f'{settings}[hospital]\nhome = "{home}"\nmembership = "{name}"\n')
            text += OF_ONE.format(name=name, site=site)
            made[name] = one
        (home / "hospital.toml").write_text(text)
        yield Hospital(home, made)


def run_studies(made: Hospital, kills: int, draw: random.Random) -> int:
    """Run every consortium's study to its end, at the same time; return how many were killed."""
    servers = {name: one.server() for name, one in made.consortia.items()}
    for one in made.consortia.values():
        until(one.listens, 120, one.told)
        one.join("north")
    clients = {name: one.client("north") for name, one in made.consortia.items()}
    killed, deadline = 0, time.monotonic() + 900
    while any(server.poll() is None for server in servers.values()):
        assert time.monotonic() < deadline, made.logs()
        time.sleep(draw.uniform(0.2, 2.0))
        name = draw.choice([*clients])
        if killed < kills and servers[name].poll() is None and made.charged(name):
            killed += kill_half(clients[name], draw)
        for name, client in clients.items():
            if client.poll() is not None and servers[name].poll() is None:
                clients[name] = made.consortia[name].client("north")
    for client in clients.values():
        end(client)
    for name, server in servers.items():
        assert server.wait() == 0, made.consortia[name].told()
    return killed


def kill_half(client: subprocess.Popen[bytes], draw: random.Random) -> bool:
    """Kill a membership's vault or courier, with SIGKILL; both are started again by its client."""
    found = children(client.pid)
    halves = [found[half] for half in ("vault", "courier") if half in found]
    if not halves:
        return False
    with suppress(ProcessLookupError):
        os.kill(draw.choice(halves), signal.SIGKILL)
        return True
    return False


def check(made: Hospital) -> None:
    made.ledger.verify()
    spent = made.ledger.spending("records")
    for name, one in made.consortia.items():
        rounds = {s.charge.round for s in spent if s.charge.membership == name}
        assert rounds == {*range(1, ROUNDS + 1)}, f"{name}: {rounds}\n{one.told()}"
        report = one.report()
        assert len(report["rounds"]) == ROUNDS
    keys = {
        (one.root / "north" / "state" / "site.key").read_bytes() for one in made.consortia.values()
    }
    assert len(keys) == len(made.consortia)
    for one in made.consortia.values():
        shown = done(one.root / "north", "ledger", "site.toml")
        for other in made.consortia:
            assert other in shown or "membership" not in shown


@pytest.mark.long
def test_two_coordinators_and_one_hospital(tmp_path: Path, tiny_base: Path) -> None:
    number = int(os.environ.get("FEDTUNE_CONSORTIA", "2"))
    times, kills = (
        int(os.environ.get("FEDTUNE_STUDIES", "1")),
        int(os.environ.get("FEDTUNE_KILLS", "4")),
    )
    killed, began = 0, time.monotonic()
    for n in range(times):
        with hospital(tmp_path / str(n), tiny_base, number) as made:
            killed += run_studies(made, kills, random.Random(n))
            check(made)
            charges = {name: made.charged(name) for name in made.consortia}
            print(f"{n}: {charges} charges for {ROUNDS} rounds each", flush=True)
    print(f"{times} times, {killed} kills, {time.monotonic() - began:.0f} s")
