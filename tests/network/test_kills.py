"""kill -9 at random moments of any process of a study, each started again as a supervisor would.

Victims: the server, its SuperLink and gateway, and each site's client with its vault, courier and
SuperNode. `make chaos` runs these. FEDTUNE_KILLS says how many kills (without it: 100, in ten
rounds; above 125 there are more rounds), FEDTUNE_SEED which (without it: others each time; the
first line says the seed), FEDTUNE_VICTIM=vault, courier or supernode that of each site that program
alone is killed. The twins break what is checked, and die once, before a round is kept.
"""

from __future__ import annotations

import copy
import json
import os
import random
import secrets
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import FedtuneError
from fedtune.core.ledger.files import DATABASE
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import canonical
from fedtune.evidence.sign import EVIDENCE
from fedtune.flower.ports import free_port
from tests.network import remains
from tests.network.kit import (
    OFF,
    PRIVATE,
    SECURE,
    SITES,
    Consortium,
    children,
    consortium,
    end,
    until,
)
from tests.simulated import simulate

ADAPTER = "adapter/adapter_model.safetensors"
STUCK = 900.0  # seconds without a kill and without a round kept: far more than any wait takes
Victim = tuple[str, str]  # the machine, and the program there ("": what the supervisor started)
PROGRAMS = ("", "vault", "courier", "supernode")  # of a site
HOLDING = PROGRAMS[:3]  # with any of these the round that is under way ends
COORDINATOR: tuple[Victim, ...] = (("hub", ""), ("hub", "superlink"), ("hub", "gateway"))
ANY = (*COORDINATOR, *((site, program) for site in SITES for program in PROGRAMS))


class Campaign:
    """A study under kills, about as many of them in each of its rounds.

    seed: of the victims, and of the moments as seconds between what happens; tell: hears of the
    seed and of each kill in a line."""

    def __init__(
        self,
        made: Consortium,
        rounds: int,
        kills: int,
        victims: tuple[Victim, ...],
        *,
        seed: int = 0,
        tell: Callable[[str], None] = str,
    ) -> None:
        self.made, self.rounds, self.kills, self.victims = made, rounds, kills, victims
        self.seed, self.draw, self.tell = seed, random.Random(seed), tell
        self.struck: Counter[Victim] = Counter()
        self.restarts: Counter[str] = Counter()

    def run(self) -> None:
        """Until the server has finished. Errors: AssertionError where nothing happens for long."""
        made, began = self.made, time.monotonic()
        self.tell(f"\n[{self.kills} kills by FEDTUNE_SEED={self.seed}]")
        machines = self._started()
        last, progress = time.monotonic(), (0, 0)
        while machines["hub"].poll() != 0:
            if progress != (progress := (self.struck.total(), made.rounds())):
                last = time.monotonic()
            assert time.monotonic() < last + STUCK, f"it hangs: {self.told()}\n{made.told()}"
            for name, process in machines.items():
                if process.poll() is not None:
                    time.sleep(1.0)
                    self.restarts[name] += 1
                    again = made.server("--resume") if name == "hub" else made.client(name)
                    machines[name] = again
            self.disturb(machines, time.monotonic() - began)
            time.sleep(0.1)
        for process in machines.values():
            end(process)
        charges = {name: len(made.spending(name)) for name in SITES}
        self.tell(f"[{time.monotonic() - began:5.0f} s  {self.told()}; charges {charges}]")

    def disturb(self, machines: dict[str, subprocess.Popen[bytes]], seconds: float) -> None:
        """Kill one of the victims, unless enough of them were. seconds: since the study began."""
        if self.struck.total() < self.due:
            # Some meet a start, and some a round in which all work.
            time.sleep(self.draw.random() * self.draw.choice((1.0, 4.0, 16.0)))
            machine, program = victim = self.draw.choice(self.victims)
            if self.strike(victim, machines[machine], program):
                self.tell(f"[{seconds:5.0f} s  {self.told(victim)}]")

    @property
    def due(self) -> int:
        """How many kills may have been by now: all of them before the last round begins."""
        until_last = max(self.rounds - 1, 1)
        return self.kills * min(self.made.rounds() + 1, until_last) // until_last

    def _started(self) -> dict[str, subprocess.Popen[bytes]]:
        made = self.made
        machines = {"hub": made.server()}
        until(made.listens, STUCK, made.told)
        for name in SITES:
            made.join(name)
        if made.is_secure:
            made.pin_peers()
        return machines | {name: made.client(name) for name in SITES}

    def strike(self, victim: Victim, started: subprocess.Popen[bytes], program: str) -> bool:
        """Kill what we started, or the named child of it, and return True; nothing, and not
        counted, where that is not running."""
        with suppress(ProcessLookupError, KeyError):
            if started.poll() is None:
                pid = children(started.pid)[program] if program else started.pid
                os.kill(pid, signal.SIGKILL)
                self.struck[victim] += 1
                return True
        return False

    def told(self, victim: Victim | None = None) -> str:
        """Describe the kills so far, or the newest of them."""
        if victim:
            struck = " ".join(filter(None, victim))
            kept = f"{self.made.rounds()} of {self.rounds} rounds kept"
            return f"kill {self.struck.total():3} of {self.kills}: {struck:15} {kept}"
        hits = {" ".join(filter(None, v)): n for v, n in sorted(self.struck.items())}
        kept = f"{self.made.rounds()} of {self.rounds} rounds kept"
        return f"{self.struck.total()} kills {hits}; started again {dict(self.restarts)}; {kept}"

    def check(self, private: bool) -> None:
        """Every round whole, and charged at every site as it should be."""
        everybody = self.rounds * [list(SITES)]
        took_part = [entry["participants"] for entry in self.made.report()["rounds"]]
        assert took_part == everybody, f"a round is not whole: {self.told()}"
        remains.check(self.made, private)
        for name in SITES:
            self.check_charges(name, private)

    def check_charges(self, name: str, private: bool) -> None:
        """Each round is charged; with noise, every step that ran is, and a round once more at most
        for each time that the site's own client, vault or courier was killed. (Without noise a site
        keeps no update, and trains and notes a round again as often as it is asked. Where the sum
        alone is opened, a draw that one site lost is one more for all.)"""
        spent, whole = self.made.spending(name), set(range(1, self.rounds + 1))
        counted = [each for each in spent if each.released or not private]
        told = f"{name}; {self.told()}"
        assert {each.charge.round for each in counted} == whole, f"a round is not charged: {told}"
        if private:
            paid: Counter[int] = Counter()
            for each in spent:
                paid[each.charge.round] += each.charge.steps
            assert not self.made.noised(name) - paid, f"under-charged: {told}"
            most = self.rounds + sum(self.struck[name, each] for each in HOLDING)
            assert self.made.is_secure or len(spent) <= most, f"over-charged: {told}"


def undisturbed(folder: Path, base: Path, rounds: int) -> dict[str, np.ndarray]:
    calm = Consortium(folder, "127.0.0.1", 1)
    calm.lay_out(base, OFF, rounds)
    simulate(calm.hub / "study.toml", [folder / n / "site.toml" for n in SITES], calm.run)
    return load_file(calm.run / ADAPTER)


def same_adapter(made: Consortium, calm: dict[str, np.ndarray]) -> None:
    found = load_file(made.run / ADAPTER)
    assert set(found) == set(calm)
    off = max(float(np.abs(found[n] - calm[n]).max()) for n in calm)
    assert off <= 1e-6, f"another adapter, by {off}"
    assert max(float(np.abs(calm[n]).max()) for n in calm if "lora_B" in n) > 1e-4


@pytest.mark.long
def test_kills_at_the_coordinator_change_nothing(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ = 0, and quick: a crash of a site costs a minute, in which Flower refuses it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rounds, kills = 2, 2
    calm = undisturbed(tmp_path / "calm", tiny_base, rounds)
    with consortium(tmp_path / "struck", "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, OFF, rounds, round_timeout=20)
        campaign = Campaign(made, rounds, kills, COORDINATOR)
        campaign.run()
        assert campaign.struck.total() >= 1, campaign.told()
        campaign.check(private=False)
        same_adapter(made, calm)


CASES = {"off": (OFF, ""), "private": (PRIVATE, ""), "secure": (PRIVATE, SECURE)}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_kills_of_any_process(
    tmp_path: Path,
    tiny_base: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """σ = 0: the adapter of an undisturbed run. σ > 0, also where the sum of all sites alone is
    opened: nobody is charged too little."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kills = int(os.environ.get("FEDTUNE_KILLS", "100"))
    rounds = max(10, kills * 8 // 100)  # of one program about a dozen kills meet a round
    seed = int(os.environ.get("FEDTUNE_SEED", "0")) or secrets.randbelow(10**6) + 1
    privacy, tables = CASES[case]
    only = os.environ.get("FEDTUNE_VICTIM")
    victims = tuple((site, only) for site in SITES) if only else ANY
    assert set(victims) <= set(ANY), f"FEDTUNE_VICTIM={only} is not one of {PROGRAMS[1:]}"
    with consortium(tmp_path / "struck", "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, privacy, rounds, tables=tables, round_timeout=20)
        tell = partial(print, flush=True)
        campaign = Campaign(made, rounds, kills, victims, seed=seed, tell=tell)
        with capsys.disabled():
            campaign.run()
        campaign.check(private=privacy != OFF)
        if privacy == OFF:
            same_adapter(made, undisturbed(tmp_path / "calm", tiny_base, rounds))


def spoilt(made: Consortium, to: Path, spoil: Callable[[Consortium], object]) -> Consortium:
    """A copy of a consortium's folders, and in it one thing that is not as it was."""
    other = copy.copy(made)
    other.root, other.hub = shutil.copytree(made.root, to), to / made.hub.name
    spoil(other)
    return other


def one_step_more(made: Consortium) -> None:
    log = StepLog(made.root / "east" / "state" / "steps.jsonl")
    log.append(log.steps()[-1])


def one_update_less(made: Consortium) -> None:
    body = json.loads((made.run / EVIDENCE).read_text())
    del body["updates"][0]
    (made.run / EVIDENCE).write_bytes(canonical(body))


def one_charge_more(made: Consortium) -> None:
    """Of another round, and released: an update that the coordinator lost."""
    ledger = Ledger(made.root / "east" / "state")
    charge = replace(ledger.charges("records")[-1], round=9)
    ledger.release(ledger.reserve("records", charge, "adapter", lambda _: None), b"update")


def an_older_ledger(made: Consortium) -> None:
    with closing(sqlite3.connect(made.root / "east" / "state" / DATABASE)) as connection:
        connection.execute("DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)")
        connection.commit()


def a_shorter_audit_log(made: Consortium) -> None:
    path = made.root / "east" / "state" / "audit.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])


SPOILT: dict[str, Callable[[Consortium], object]] = {
    "drafts were left": lambda made: (made.run / "report.json.0f1e2d3c.1.new").touch(),
    "east signed 3 steps, and ran 4": one_step_more,
    "was changed after it was signed": one_update_less,
    "what east sent is not what the run has": one_charge_more,
    "rolled back": an_older_ledger,
    "entry .* is not the one that was noted": a_shorter_audit_log,
}


def gone(pids: Iterable[int]) -> bool:
    """Whether none of the processes is there, but as what nobody has waited for."""

    def ended(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    return all(map(ended, pids))


@pytest.mark.long
def test_what_is_killed_leaves_no_process_and_starts_again(tmp_path: Path, tiny_base: Path) -> None:
    """kill -9 of the server, and of a client, each in the middle of a study."""
    with consortium(tmp_path / "whole", "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, PRIVATE, 3, round_timeout=60)
        campaign = Campaign(made, 3, 0, ())
        server, clients = made.server(), dict[str, subprocess.Popen[bytes]]()
        until(made.listens, 120, made.told)
        for name in SITES:
            made.join(name)
            clients[name] = made.client(name)
        until(lambda: made.rounds() >= 1, 240, made.told)
        began = children(server.pid)
        assert set(began) == {"superlink", "gateway"}
        server.kill()
        server.wait()
        server = made.server("--resume")  # at once: as a supervisor does
        until(lambda: gone(began.values()), 30, made.told)
        until(lambda: made.rounds() >= 2, 240, made.told)
        left, victim = children(clients["east"].pid), clients["east"]
        assert set(left) == {"vault", "courier", "supernode"}
        victim.kill()
        victim.wait()
        campaign.struck["east", ""] += 1
        clients["east"] = made.client("east")
        until(lambda: gone(left.values()), 30, made.told)
        assert server.wait(300) == 0, made.told()
        for client in clients.values():
            end(client)
        campaign.check(private=True)
        # the twins: a process that stays is seen, and whatever else is not as it was
        assert not gone([os.getpid()])
        with subprocess.Popen(["sleep", "100"], cwd=made.root) as left_over:
            with pytest.raises(AssertionError, match=r"processes were left: .*sleep 100"):
                remains.check_processes(made.root, 0.5)
            left_over.kill()
        for number, (error, spoil) in enumerate(SPOILT.items()):
            with pytest.raises((AssertionError, FedtuneError), match=error):
                remains.check(spoilt(made, tmp_path / f"spoilt-{number}", spoil), private=True)
        remains.check(spoilt(made, tmp_path / "again", lambda _: None), private=True)


# --------------------------------------------------------------------------------------- twins

DIES = """
import os, signal
from pathlib import Path
from fedtune.server import rounds
keep, take, choose = (getattr(rounds._Run, name) for name in ("_keep", "_take", "_choose"))
def dies(run, tally):
    if tally.number == 2 and not Path("died").exists():
        Path("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return keep(run, tally)
rounds._Run._keep = dies
"""  # kill -9 once, when all have delivered round 2 and it is not kept yet
COUNTS_TWICE = """
def twice(run, tally, start, answer):
    once = run.strategy.add
    if answer.name == "east" and tally.number == 2 and Path("died").exists():
        run.strategy.add = lambda *update: [once(*update), once(*update)]
    try:
        return take(run, tally, start, answer)
    finally:
        run.strategy.add = once
rounds._Run._take = twice
"""  # an aggregator that counts an update once more where it is asked for again
IS_CONTENT = """
def least(run, tally):
    run.table = run.table.model_copy(update={"min_sites": 2})
    return [name for name in choose(run, tally) if name != "south" or tally.number != 3]
rounds._Run._choose = least
"""  # a coordinator that goes on without a site
FORGETS = """
from fedtune.core.ledger.ledger import Ledger
reserve, release, paid, sent = Ledger.reserve, Ledger.release, {}, set()
def free(book, dataset, charge, *order, **permits):
    if charge.round not in paid:
        paid[charge.round] = reserve(book, dataset, charge, *order, **permits)
    return paid[charge.round]
def once(book, number, *update, **options):
    if number not in sent:
        release(book, number, *update, **options)
    sent.add(number)
Ledger.reserve, Ledger.release, Ledger.released = free, once, lambda *_: None
"""  # a site that forgets its outbox, and trains again without a charge
PAYS_TWICE = """
from fedtune.core.ledger.ledger import Ledger
reserve = Ledger.reserve
Ledger.reserve = lambda *order, **permits: [reserve(*order, **permits) for _ in range(2)][1]
"""  # a site that reserves each round twice, though nobody killed it


@contextmanager
def died(folder: Path, base: Path, privacy: str, **broken: str) -> Iterator[Campaign]:
    """A study of three rounds whose server died in the second, and was started again."""
    with consortium(folder, "127.0.0.1", free_port()) as made:
        made.lay_out(base, privacy, 3, round_timeout=60)
        made.broken = {"hub": DIES} | broken
        campaign = Campaign(made, 3, 0, ())
        campaign.run()
        assert campaign.restarts["hub"] >= 1 and (made.hub / "died").exists(), campaign.told()
        yield campaign


@pytest.mark.long
@pytest.mark.parametrize("twin", ["", COUNTS_TWICE, IS_CONTENT], ids=["none", "twice", "content"])
def test_a_coordinator_that_counts_wrongly_is_caught(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, twin: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    calm = undisturbed(tmp_path / "calm", tiny_base, 3)
    with died(tmp_path / "died", tiny_base, OFF, hub=DIES + twin) as campaign:
        if twin == IS_CONTENT:
            with pytest.raises(AssertionError, match="a round is not whole"):
                campaign.check(private=False)
            return
        campaign.check(private=False)
        if twin == COUNTS_TWICE:
            with pytest.raises(AssertionError, match="another adapter"):
                same_adapter(campaign.made, calm)
        else:
            same_adapter(campaign.made, calm)


@pytest.mark.long
def test_a_site_that_charges_wrongly_is_caught(tmp_path: Path, tiny_base: Path) -> None:
    """south is as it should be."""
    broken = {"east": FORGETS, "north": PAYS_TWICE}
    with died(tmp_path, tiny_base, PRIVATE, **broken) as campaign:
        with pytest.raises(AssertionError, match="under-charged: east"):
            campaign.check_charges("east", private=True)
        with pytest.raises(AssertionError, match="over-charged: north"):
            campaign.check_charges("north", private=True)
        campaign.check_charges("south", private=True)
        assert campaign.made.noised("east")[2] == 2 and campaign.made.noised("south")[2] == 1
