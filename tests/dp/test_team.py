"""Two real processes over gloo add up a step: the same integers, noise once, or nothing at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.dp import sampling, selftest
from fedtune.dp.plan import DpPlan
from fedtune.dp.steplog import StepLog
from fedtune.dp.team import AddUp, Group, meeting, summed
from fedtune.errors import InfrastructureError
from tests.dp.conftest import make_plan, study
from tests.dp.team_rank import SIZES, engine, synthetic, zeros

D = 400_000
ROOT = Path(__file__).resolve().parents[2]


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
        place = self._folder / f"store-{self._starts}"
        command = [sys.executable, "-m", "tests.dp.team_rank", str(place)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment)
        store = meeting(place, 2)
        store.get("here")  # a process needs a while to import torch
        return Group(0, 2, 15.0, store)

    def end(self) -> None:
        if self.group is not None:
            self._process.kill()
            self._process.wait()
            self.group.close()
            self.group = None


class _Team:
    def __init__(self, group: Group, header: dict[str, Any]) -> None:
        self.group, self.header = group, header

    def total(self, sampled: list[int], dimension: int, own: AddUp) -> torch.Tensor:
        rows = torch.tensor(sampled, dtype=torch.int64)
        self.group.send({**self.header, "dimension": dimension}, [rows])
        return summed(self.group, sampled, dimension, own)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("team"))
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


def test_the_shipped_engine_gives_the_same_integers_in_equal_micro_batches(
    pair: Pair, tiny_base: Path
) -> None:
    plan, rows = make_plan(), list(range(len(SIZES)))
    ours = engine(str(tiny_base), each_alone=True)
    alone = plan.clipped_sum(rows, ours.dimension, ours)
    team = pair.team(plan, "engine, each alone", base=str(tiny_base))
    found = team.total(rows, ours.dimension, lambda r: plan.clipped_sum(r, ours.dimension, ours))
    assert torch.equal(found, alone)


def test_the_shipped_engine_gives_the_same_sum_whatever_the_micro_batches(
    pair: Pair, tiny_base: Path
) -> None:
    plan, rows = make_plan(noise_multiplier=1e-4), list(range(len(SIZES)))  # a fine grid
    ours = engine(str(tiny_base), each_alone=False)
    alone = plan.clipped_sum(rows, ours.dimension, ours).double()
    team = pair.team(plan, "engine", base=str(tiny_base))
    found = team.total(rows, ours.dimension, lambda r: plan.clipped_sum(r, ours.dimension, ours))
    assert float((found - alone).norm() / alone.norm()) < 1e-6


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
    for step in range(40):
        out = plan.step(8, 50, gradients, StepLog(tmp_path / "log"), 1, team)
        assert len(drawn) == step + 1
        expected = plan.clipped_sum(drawn[-1], 50, gradients).double() * plan.grid
        assert float((out.double() - expected).abs().max()) < 1e-4
    assert {0, 1} < {len(batch) for batch in drawn}


# ------------------------------------------------------------------------------------- the noise


def spread(plan: DpPlan, team: _Team | None, tmp_path: Path) -> float:
    """σ̂/σ of a step without signal."""
    out = plan.step(14, D, zeros(D), StepLog(tmp_path / "log"), 1, team).double()
    return float(out.std()) * plan.divisor / (plan.noise_multiplier * plan.max_grad_norm)


def quiet_plan() -> DpPlan:
    return make_plan(noise_multiplier=1.7, divisor=14.0)


def test_noise_is_added_once_whatever_the_number_of_ranks(pair: Pair, tmp_path: Path) -> None:
    plan = quiet_plan()
    assert spread(plan, None, tmp_path) == pytest.approx(1, abs=0.006)
    assert spread(plan, pair.team(plan, "zeros"), tmp_path) == pytest.approx(1, abs=0.006)
    assert len(StepLog(tmp_path / "log").steps()) == 2


def test_noise_on_every_rank_is_seen(pair: Pair, tmp_path: Path) -> None:
    """Twin: rank 1 adds noise of its own."""
    plan = quiet_plan()
    found = spread(plan, pair.team(plan, "zeros", "adds noise"), tmp_path)
    assert found == pytest.approx(2**0.5, abs=0.02)


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

        def total(self, sampled: list[int], dimension: int, own: AddUp) -> torch.Tensor:
            nonlocal shared
            theirs, matrix = sampled[1::2], torch.zeros(len(sampled[1::2]), dimension)
            for chunk in self.gradients(theirs):
                matrix[[theirs.index(row) for row in chunk.rows]] = chunk.flat()
            rows = torch.tensor(sampled, dtype=torch.int64)
            self.group.send({**self.header, "dimension": dimension}, [rows, matrix])
            shared += 1
            return summed(self.group, sampled, dimension, own)

    def step(self: DpPlan, n: int, d: int, gradients: Any, log: StepLog, round_: int) -> Any:
        return alone(self, n, d, gradients, log, round_, Sends(self, gradients))

    monkeypatch.setattr(DpPlan, "step", step)
    body = {"base": {"model": str(tiny_base), "dtype": "float32"}}
    results = selftest.run(study(**body))
    assert [r.name for r in results] == ["parity", "isolation", "sensitivity", "noise"]
    assert all(r.passed for r in results), results
    assert shared > 10


# ------------------------------------------------------------------------- a rank that is broken


@pytest.mark.parametrize(
    "how, says",
    [
        ("dies", "is gone or does not answer"),
        ("hangs", "is gone or does not answer"),
        ("raises", "did not add up its rows"),
        ("takes rank 0's rows", "did not add up its rows"),
    ],
)
def test_a_broken_rank_stops_the_step_before_anything_is_released(
    pair: Pair, tmp_path: Path, how: str, says: str
) -> None:
    plan, log = make_plan(), StepLog(tmp_path / "log")
    team = pair.team(plan, "synthetic", how)
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
