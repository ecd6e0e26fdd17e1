"""Two processes add up a step: the same integers, noise once, or nothing at all."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom

from fedtune.core.dp import sampling
from fedtune.core.dp.clip import sensitivity
from fedtune.core.dp.plan import ClippedSum, DpPlan
from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import InfrastructureError
from fedtune.core.training import data_parallel as team_module
from fedtune.core.training import selftest
from fedtune.core.training.data_parallel import Group, sum_over_workers
from tests import chance
from tests.dp import team_rank
from tests.dp.conftest import make_plan, study
from tests.dp.team_rank import SIZES, engine, synthetic, zeros
from tests.forks import Fork

# The noise once, not once a rank, nor shared among the ranks.
ONCE = chance.spread_for(0.98, 1.02, 2**0.5, 0.5**0.5, figures=2)
D = ONCE.draws


class Pair:
    """Rank 0, here, of a team of two; the other process is started when it is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._starts = folder, 0
        self.group: Group | None = None

    def team(self, plan: DpPlan, rows: str, how: str = "honest", **more: object) -> _Team:
        """rows: what rank 1 computes; how: which way it is broken."""
        self.group = self.group or self._started()
        header = {"plan": asdict(plan), "rows": rows, "how": how}
        return _Team(self.group, header | more)

    def _started(self) -> Group:
        self._starts += 1
        place = self._folder / f"team-{self._starts}"
        self._process = Fork(lambda: team_rank.main(str(place)))
        group = Group(0, 2, 120.0, place)
        for end in group._peers:
            end.settimeout(15.0)
        return group

    def wait_shortly(self) -> None:
        """Wait a second for a rank that will never answer."""
        assert self.group is not None
        for end in self.group._peers:
            end.settimeout(1.0)

    def end(self) -> None:
        if self.group is not None:
            self._process.kill()
            self._process.wait()
            self.group.close()
            self.group = None


class _Team:
    def __init__(self, group: Group, header: dict[str, Any]) -> None:
        self.group, self.header = group, header

    def total(self, sampled: list[int], dimension: int, own: ClippedSum) -> torch.Tensor:
        rows = torch.tensor(sampled, dtype=torch.int64)
        self.group.send({**self.header, "dimension": dimension}, [rows])
        return sum_over_workers(self.group, sampled, dimension, own)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As rank 1 has, so that its sums are added up in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="fedtune-") as folder:  # a socket's path is short
        made = Pair(Path(folder))
        yield made
        made.end()


# ------------------------------------------------------------------------------------- the sum


@pytest.mark.parametrize("sampled", [[], [3], [0, 1], [5, 2, 9], list(range(17))])
def test_the_sum_is_that_of_one_process_bit_for_bit(pair: Pair, sampled: list[int]) -> None:
    """Empty batches and empty shares too: everybody takes part."""
    plan, gradients = make_plan(), synthetic(1000)
    alone = plan.clipped_sum(sampled, 1000, gradients)
    team = pair.team(plan, "synthetic")
    for _ in range(3):
        found = team.total(sampled, 1000, lambda rows: plan.clipped_sum(rows, 1000, gradients))
        assert found.dtype == torch.int64 and torch.equal(found, alone)


def test_the_shipped_engine_gives_the_same_integers_whatever_the_micro_batches(
    pair: Pair, tiny_base: Path
) -> None:
    plan, rows = make_plan(noise_multiplier=1e-4), list(range(len(SIZES)))  # a fine grid
    ours = engine(str(tiny_base))
    alone = plan.clipped_sum(rows, ours.dimension, ours).double()
    team = pair.team(plan, "engine", base=str(tiny_base))
    found = team.total(rows, ours.dimension, lambda r: plan.clipped_sum(r, ours.dimension, ours))
    assert torch.equal(found, alone) and bool(found.any())


def test_one_draw_serves_all_ranks(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poisson at rank 0 alone, dealt out afterwards; batches are often empty, a share more often.
    Only the first draw of every step is made, and the step is the one of that draw."""
    drawn: list[list[int]] = []
    honest = sampling.poisson

    def spy(n_rows: int, rate: float) -> list[int]:
        drawn.append(honest(n_rows, rate))
        return drawn[-1]

    monkeypatch.setattr(sampling, "poisson", spy)
    plan = make_plan(sampling_rate=0.15, noise_multiplier=1e-6, divisor=1.0)
    team, gradients = pair.team(plan, "synthetic"), synthetic(50)
    likely = [float(binom.pmf(size, 8, 0.15)) for size in (0, 1, 2)]
    for step in range(chance.tries(min(likely), figures=len(likely))):
        out = plan.step(8, 50, gradients, StepLog(tmp_path / "log"), 1, team)
        assert len(drawn) == step + 1
        expected = plan.clipped_sum(drawn[-1], 50, gradients).double() * plan.grid
        assert float((out.double() - expected).abs().max()) < 1e-4
    assert {0, 1, 2} <= {len(batch) for batch in drawn}


# ------------------------------------------------------------------------------------- the noise


def spread(plan: DpPlan, team: _Team | None, tmp_path: Path) -> float:
    """σ̂/σ of a step without signal."""
    out = plan.step(14, D, zeros(D), StepLog(tmp_path / "log"), 1, team).double()
    std = plan.noise_multiplier * sensitivity(plan.max_grad_norm, D, plan.grid)
    return float(out.square().mean().sqrt()) * plan.divisor / std


def quiet_plan() -> DpPlan:
    return make_plan(noise_multiplier=1.7, divisor=14.0)


def test_noise_is_added_once_whatever_the_number_of_ranks(pair: Pair, tmp_path: Path) -> None:
    plan = quiet_plan()
    assert ONCE.holds(spread(plan, None, tmp_path))
    assert ONCE.holds(spread(plan, pair.team(plan, "zeros"), tmp_path))
    assert len(StepLog(tmp_path / "log").steps()) == 2


def test_noise_on_every_rank_is_seen(pair: Pair, tmp_path: Path) -> None:
    """Twin: rank 1 adds noise of its own."""
    plan = quiet_plan()
    found = spread(plan, pair.team(plan, "zeros", "adds noise"), tmp_path)
    assert not ONCE.holds(found) and ONCE.holds(found / 2**0.5)


def test_the_oracles_hold_for_two_ranks(
    pair: Pair, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site's own self-test, each of its steps shared with a second process."""
    alone, shared = DpPlan.step, 0

    class Sends(_Team):
        """Rank 1 is given the gradients of its share, since the records are edited here."""

        def __init__(self, plan: DpPlan, gradients: Any) -> None:
            honest = pair.team(plan, "given")
            super().__init__(honest.group, honest.header)
            self.gradients = gradients

        def total(self, sampled: list[int], dimension: int, own: ClippedSum) -> torch.Tensor:
            nonlocal shared
            theirs, matrix = sampled[1::2], torch.zeros(len(sampled[1::2]), dimension)
            for chunk in self.gradients(theirs):
                matrix[[theirs.index(row) for row in chunk.rows]] = chunk.flat()
            rows = torch.tensor(sampled, dtype=torch.int64)
            self.group.send({**self.header, "dimension": dimension}, [rows, matrix])
            shared += 1
            return sum_over_workers(self.group, sampled, dimension, own)

    def step(self: DpPlan, n: int, d: int, gradients: Any, log: StepLog, round_: int) -> Any:
        return alone(self, n, d, gradients, log, round_, Sends(self, gradients))

    monkeypatch.setattr(DpPlan, "step", step)
    body = {"base": {"model": str(tiny_base), "dtype": "float32"}}
    results = selftest.run(study(**body))
    assert [r.name for r in results] == ["parity", "isolation", "sensitivity", "noise"]
    assert all(r.passed for r in results), results
    assert shared > 10


# ------------------------------------------------------------------------------- who may join


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fedtune-") as folder:
        yield Path(folder, "team")


def joins(place: Path, *first: bytes) -> threading.Thread:
    """Somebody who says each of `first` on a connection of his own, then a rank that adds 1."""

    def work() -> None:
        while not place.exists():
            time.sleep(0.01)
        for said in first:
            with socket.socket(socket.AF_UNIX) as end:
                while True:  # the socket is there before anybody listens at it
                    with suppress(ConnectionRefusedError):
                        end.connect(str(place))
                        break
                    time.sleep(0.01)
                with suppress(ConnectionError):  # turned away before it spoke, or while it listens
                    end.sendall(said)
                    assert end.recv(1) == b"", "it was not turned away"
        with suppress(InfrastructureError):
            group = Group(1, 2, 10.0, place)
            group.reduce_sum(torch.ones(3, dtype=torch.int64))
            group.close()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [0, 2, 2**63])
def test_who_is_no_rank_is_turned_away(place: Path, number: int) -> None:
    thread = joins(place, struct.pack("!Q", number))
    group = Group(0, 2, 20.0, place)
    assert group.reduce_sum(torch.ones(3, dtype=torch.int64)).tolist() == [2, 2, 2]
    thread.join(20)
    group.close()


def test_another_users_process_is_turned_away(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says who is at the other end, also where somebody opened the folder."""
    monkeypatch.setattr(team_module, "_peer_user", lambda peer: os.getuid() + 1)
    thread = joins(place, struct.pack("!Q", 1))  # it says the right thing
    with pytest.raises(InfrastructureError):
        Group(0, 2, 1.0, place)
    thread.join(20)
    assert not place.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("opened", [False, True])
def test_an_account_of_this_machine_cannot_join_nor_read(place: Path, opened: bool) -> None:
    waits, tells = os.pipe()
    stranger = os.fork()
    if stranger == 0:
        os._exit(attempt(place, waits))

    def work() -> None:
        while not place.exists():
            time.sleep(0.01)
        if opened:
            place.parent.chmod(0o755)
            place.chmod(0o777)
        os.write(tells, b".")
        found.append(os.waitstatus_to_exitcode(os.waitpid(stranger, 0)[1]))
        Group(1, 2, 10.0, place).close()

    found: list[int] = []
    thread = threading.Thread(target=work)
    thread.start()
    Group(0, 2, 60.0, place).close()
    thread.join(20)
    assert found == [TURNED_AWAY if opened else KEPT_OUT]


KEPT_OUT, TURNED_AWAY, LET_IN = range(3)


def attempt(place: Path, waits: int) -> int:
    """Another user's try to be rank 1 and to hear what rank 0 says."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    os.read(waits, 1)
    with socket.socket(socket.AF_UNIX) as end:
        try:
            end.connect(str(place))
            end.sendall(struct.pack("!Q", 1))
            return LET_IN if end.recv(1) else TURNED_AWAY
        except PermissionError:
            return KEPT_OUT
        except OSError:
            return TURNED_AWAY


# ------------------------------------------------------------------------- a rank that is broken


@pytest.mark.parametrize(
    "how, says",
    [
        ("dies", "is gone or does not answer"),
        ("hangs", "is gone or does not answer"),
        ("raises", "did not sum its rows"),
        ("takes rank 0's rows", "did not sum its rows"),
    ],
)
def test_a_broken_rank_stops_the_step_before_anything_is_released(
    pair: Pair, tmp_path: Path, how: str, says: str
) -> None:
    plan, log = make_plan(), StepLog(tmp_path / "log")
    team = pair.team(plan, "synthetic", how)
    if how == "hangs":
        pair.wait_shortly()
    with pytest.raises(InfrastructureError, match=says) as caught:
        plan.step(4, 1000, synthetic(1000), log, 1, team)
    assert log.steps() == []
    assert "Example" not in str(caught.value)
    if how in ("dies", "hangs"):
        pair.end()


def test_a_rank_that_leaves_out_empty_shares_is_waited_for_in_vain(
    pair: Pair, tmp_path: Path
) -> None:
    """Twin of the empty batch: who skips the collective is missed, and nobody waits for ever."""
    plan = make_plan()
    team = pair.team(plan, "synthetic", "skips an empty share")
    plan.step(2, 100, synthetic(100), StepLog(tmp_path / "log"), 1, team)
    pair.wait_shortly()
    with pytest.raises(InfrastructureError, match="does not answer"):
        plan.step(1, 100, synthetic(100), StepLog(tmp_path / "log"), 1, team)
    pair.end()


def test_what_fails_here_fails_by_its_own_name_and_the_team_goes_on(
    pair: Pair, tmp_path: Path
) -> None:
    plan, log = make_plan(), StepLog(tmp_path / "log")
    team = pair.team(plan, "synthetic")

    def broken(rows: list[int]) -> Iterator[Any]:
        raise ZeroDivisionError
        yield

    with pytest.raises(ZeroDivisionError):
        plan.step(4, 100, broken, log, 1, team)
    assert log.steps() == []
    plan.step(4, 100, synthetic(100), log, 1, team)
    assert len(log.steps()) == 1
