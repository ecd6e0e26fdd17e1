"""A coordinator and three sites with addresses of their own, in network namespaces of the test's.

    hub (10.77.0.1), east, north, south (10.77.0.2 ...) ── veth ── bridge in a namespace `switch`

Nothing outside these namespaces is touched. Delay and loss by `tc netem`; a kernel that lacks it
gets a rate cap (`tbf`), and the test says so. Needs root and iproute2: without, it fails where the
variable CI is set, and is skipped with a reason elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedtune.core.errors import InfrastructureError
from tests.network.kit import PRIVATE, SITES, Consortium, consortium, end, until

MACHINES = ("hub", *SITES)
NETEM = ("netem", "delay", "20ms", "5ms", "loss", "1%")
TBF = ("tbf", "rate", "20mbit", "burst", "64kb", "latency", "400ms")
PORT = 8443


def ip(*words: str) -> None:
    found = subprocess.run(["ip", *words], capture_output=True, text=True)
    if found.returncode:
        raise OSError(f"ip {' '.join(words)}: {found.stderr.strip()}")


class Network:
    """One switch; every machine is a namespace with one cable to it."""

    def __init__(self) -> None:
        self.mark = f"fedtune{os.getpid()}"
        self.made: list[str] = []
        self.faults: dict[str, str] = {}  # machine -> the kind of queue on its cable

    def space(self, name: str) -> str:
        return f"{self.mark}-{name}"

    def build(self) -> None:
        """Errors: OSError where this machine may not or cannot."""
        for name in ("switch", *MACHINES):
            ip("netns", "add", self.space(name))
            self.made.append(name)
            ip("-n", self.space(name), "link", "set", "lo", "up")
        switch = self.space("switch")
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(MACHINES, start=1):
            own, there = self.space(name), ("peer", "name", "eth0", "netns", self.space(name))
            ip("-n", switch, "link", "add", name, "type", "veth", *there)
            ip("-n", switch, "link", "set", name, "master", "bridge", "up")
            ip("-n", own, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", own, "link", "set", "eth0", "up")

    def plug(self, name: str, state: str) -> None:
        """Pull the cable of one machine ("down"), or put it back ("up")."""
        ip("-n", self.space("switch"), "link", "set", name, state)

    def shape(self, name: str, *kinds: tuple[str, ...]) -> None:
        """Put the first queue that the kernel has on both ends of the machine's cable."""
        ends = ((self.space("switch"), name), (self.space(name), "eth0"))
        for kind in kinds:
            words = [
                ("tc", "-n", at, "qdisc", "replace", "dev", d, "root", *kind) for at, d in ends
            ]
            if all(subprocess.run(each, capture_output=True).returncode == 0 for each in words):
                self.faults[name] = " ".join(kind)
                return
        raise OSError("tc: the kernel has none of " + ", ".join(kind[0] for kind in kinds))

    def prefix(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", self.space(name)]

    def remove(self) -> None:
        for name in self.made:
            with suppress(OSError):
                ip("netns", "del", self.space(name))


@pytest.fixture()
def network() -> Iterator[Network]:
    made = Network()
    try:
        try:
            if shutil.which("ip") is None or shutil.which("tc") is None:
                raise OSError("ip and tc (iproute2) are not installed")
            made.build()
        except OSError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no network namespaces here: {error}")
        yield made
    finally:
        made.remove()


@pytest.fixture()
def spread(tmp_path: Path, network: Network) -> Iterator[Consortium]:
    """The consortium, with each of its parts on its machine."""
    with consortium(tmp_path, "10.77.0.1", PORT) as made:
        made.where = {name: network.prefix(name) for name in MACHINES}
        yield made


def all_join(made: Consortium) -> None:
    until(made.listens, 60, made.told)
    for name in SITES:
        made.join(name)
        made.client(name)


def failures(made: Consortium, name: str) -> list[str]:
    """Why the coordinator noted that a site did not deliver when it was asked."""
    lines = (made.run / "log.jsonl").read_text().splitlines()
    notes = [json.loads(line) for line in lines]
    return [str(e) for e in notes if name in e.values() and "failed" in e.values()]


def stopped(made: Consortium) -> None:
    """End what runs: a ledger is read when nobody writes to it."""
    for process in made.running:
        if process.poll() is None:
            process.terminate()
    for process in made.running:
        end(process, 30)


def everybody_paid_once(made: Consortium, rounds: int) -> None:
    for name in SITES:
        spent = made.spending(name)
        assert [each.charge.round for each in spent] == list(range(1, rounds + 1)), name
        assert all(each.released for each in spent), name


@pytest.mark.long  # by default: messages that are lost (tests/server/test_model.py), sent again
def test_a_site_that_is_cut_off_in_a_round_comes_back_and_pays_once(
    spread: Consortium, network: Network, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """min_sites = 3: the round is asked again until the third site has delivered."""
    rounds, cut = 3, 10.0
    for name in MACHINES:
        network.shape(name, NETEM, TBF)
    with capsys.disabled():
        print(f"\n[network namespaces: every cable has {network.faults['hub']}]")
    spread.lay_out(tiny_base, PRIVATE, rounds, round_timeout=8)
    server = spread.server()
    all_join(spread)
    until(lambda: spread.rounds() >= 1 or server.poll() is not None, 90, spread.told)
    at = spread.rounds() + 1
    network.plug("east", "down")
    time.sleep(cut)
    assert spread.rounds() < at, "a round was kept without one of its sites"
    network.plug("east", "up")
    assert server.wait(90) == 0, spread.told()
    body = spread.report()
    assert [entry["participants"] for entry in body["rounds"]] == rounds * [list(SITES)]
    assert body["rounds"][at - 1]["seconds"] >= cut - 1.0
    assert "east" in body["rounds"][at - 1]["late"]
    assert failures(spread, "east")
    stopped(spread)
    everybody_paid_once(spread, rounds)


@pytest.mark.long
def test_a_site_that_is_away_stops_the_study_and_never_makes_it_a_success(
    spread: Consortium, network: Network, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """min_sites = 3: the server ends with exit code 4 as often as it is started; once the cable is
    back the site connects by itself, and the study goes on. FEDTUNE_AWAY: seconds (600)."""
    rounds, away = 3, float(os.environ.get("FEDTUNE_AWAY", "600"))
    spread.lay_out(tiny_base, PRIVATE, rounds, round_timeout=8)
    server, ended = spread.server(), list[int]()
    all_join(spread)
    until(lambda: spread.rounds() >= 1 or server.poll() is not None, 90, spread.told)
    at = spread.rounds() + 1
    network.plug("east", "down")
    cut = time.monotonic()
    deadline = cut + away + 300
    while not ended or ended[-1] != 0:
        assert time.monotonic() < deadline, spread.told()
        if time.monotonic() - cut > away:
            network.plug("east", "up")
        else:
            assert spread.rounds() < at, "a round was kept without one of its sites"
        with suppress(subprocess.TimeoutExpired):
            ended.append(server.wait(1))
            if ended[-1] != 0:
                server = spread.server("--resume")
    assert set(ended) <= {0, InfrastructureError.exit_code}, spread.told()
    assert time.monotonic() - cut > away
    with capsys.disabled():
        print(
            f"\n[away {away:.0f} s; exit codes {ended}; done {time.monotonic() - cut:.0f} s after]"
        )
    body = spread.report()
    assert [entry["participants"] for entry in body["rounds"]] == rounds * [list(SITES)]
    stopped(spread)
    everybody_paid_once(spread, rounds)


@pytest.mark.long
def test_a_site_that_is_twenty_times_slower_is_waited_for_or_named(
    spread: Consortium, network: Network, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """min_sites = 2: whoever does not deliver within round_timeout is named in the report with a
    reason; nobody is left out in silence."""
    rounds = 3
    for name in MACHINES:
        network.shape(name, ("tbf", "rate", "512kbit", "burst", "16kb", "latency", "2s"))
    network.shape("east", ("tbf", "rate", "25kbit", "burst", "4kb", "latency", "10s"))
    spread.lay_out(tiny_base, PRIVATE, rounds, round_timeout=30, min_sites=2)
    server = spread.server()
    all_join(spread)
    assert server.wait(300) == 0, spread.told()
    body = spread.report()
    assert len(body["rounds"]) == rounds
    for entry in body["rounds"]:
        assert {*entry["participants"], *entry["missing"]} == set(SITES), entry
        assert {"north", "south"} <= set(entry["participants"])
    told = [(e["participants"], e["missing"], e["seconds"]) for e in body["rounds"]]
    with capsys.disabled():
        print(f"\n[slow site: {told}; absences {body['absences']}]")
    stopped(spread)
    counted = {e["round"] for e in body["rounds"] if "east" in e["participants"]}
    spent = {each.charge.round for each in spread.spending("east") if each.released}
    assert counted <= spent


@pytest.mark.long
def test_connections_that_are_slow_and_break_cost_no_update_and_no_second_charge(
    spread: Consortium, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Delay and loss by a proxy at every site, for kernels without `netem`: connections break
    after 4 s on average. The server is started again with --resume where it gives up."""
    rounds, ended = 5, list[int]()
    spread.lay_out(tiny_base, PRIVATE, rounds, round_timeout=15)
    server = spread.server()
    until(spread.listens, 60, spread.told)
    for name in SITES:
        spread.join(name)
        spread.faults(name, 3128, 4.0)
        spread.client(name)
    deadline = time.monotonic() + 400
    while not ended or ended[-1] != 0:
        assert time.monotonic() < deadline, spread.told()
        with suppress(subprocess.TimeoutExpired):
            ended.append(server.wait(1))
            if ended[-1] != 0:
                server = spread.server("--resume")
    body = spread.report()
    assert [entry["participants"] for entry in body["rounds"]] == rounds * [list(SITES)]
    cut = {name: spread.log(f"{name}-faults").read_text().count("cut") for name in SITES}
    asked = [len(failures(spread, name)) for name in SITES]
    with capsys.disabled():
        print(f"\n[broken connections {cut}; asked in vain {asked}; exit codes {ended}]")
    assert min(cut.values()) > 0
    stopped(spread)
    everybody_paid_once(spread, rounds)
