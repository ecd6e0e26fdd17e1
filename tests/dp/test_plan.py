"""The step as a whole: what it logs, its variance, and what must stop it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.core.dp import accountant, clip, noise
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.plan import DpPlan, SitePlan, plan_for_site
from fedtune.core.dp.steplog import StepLog, events
from fedtune.core.errors import ConfigError, InfrastructureError
from tests import chance
from tests.dp.conftest import make_plan, study

SIGMA, C = 1.7, 0.5
TWO_PERCENT = chance.spread_for(0.98)
D = TWO_PERCENT.draws


def noise_is_right(out: torch.Tensor, plan: DpPlan, sigma: float) -> bool:
    """Whether the step's output, without a signal, is the noise of `sigma` over its divisor."""
    std = sigma * clip.sensitivity(plan.max_grad_norm, D, plan.grid) / plan.divisor
    return TWO_PERCENT.holds(float(out.double().square().mean().sqrt()) / std)


def rows(value: float, chunks: int = 1):  # type: ignore[no-untyped-def]
    def gradients(units: list[int]) -> Iterator[Chunk]:
        for some in torch.tensor(units).chunk(chunks):
            yield Chunk(some.tolist(), [torch.full((len(some), D), value)])

    return gradients


@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_noise_is_added_once_and_divided_by_the_plan(tmp_path: Path, chunks: int) -> None:
    """Trap 17: once per step whatever the number of chunks, on the sum, over the plan's divisor."""
    plan = make_plan(noise_multiplier=SIGMA, max_grad_norm=C, divisor=14.0)
    out = plan.step(14, D, rows(0.0, chunks), StepLog(tmp_path / "log"), 1)
    assert noise_is_right(out, plan, SIGMA)


def test_a_wrong_sigma_would_show(tmp_path: Path) -> None:
    plan = make_plan(noise_multiplier=SIGMA * 0.98, max_grad_norm=C, divisor=14.0)
    out = plan.step(14, D, rows(0.0), StepLog(tmp_path / "log"), 1)
    assert not noise_is_right(out, plan, SIGMA)


def test_signal_is_the_clipped_mean(tmp_path: Path) -> None:
    plan = make_plan(noise_multiplier=1e-3, divisor=10.0)
    out = plan.step(10, D, rows(5.0, 3), StepLog(tmp_path / "log"), 1)
    # Each number is 1/√D, and the mean's noise 10⁻⁴/√D: a fault of 10⁻³ is ten deviations away.
    assert float(out.double().mean()) == pytest.approx(
        1 / math.sqrt(D), rel=chance.deviations() * 1e-4
    )


def test_an_empty_sample_is_a_noise_only_step(tmp_path: Path) -> None:
    plan = make_plan(sampling_rate=1e-9)

    def never(units: list[int]) -> Iterator[Chunk]:
        raise AssertionError("an empty sample asks for no gradient")

    out = plan.step(5, D, never, StepLog(tmp_path / "log"), 1)
    assert noise_is_right(out, plan, 1.0)
    assert len(StepLog(tmp_path / "log").steps()) == 1


@pytest.mark.parametrize("given", [[0, 1, 2], [0, 1, 2, 3, 3], [0, 1, 2, 2], [1, 2, 3, 4]])
def test_a_missing_or_doubled_unit_releases_nothing(tmp_path: Path, given: list[int]) -> None:
    """One missed and one doubled too: a count alone would not see it."""

    def wrong(units: list[int]) -> Iterator[Chunk]:
        yield Chunk(given, [torch.zeros(len(given), D)])

    with pytest.raises(RuntimeError, match="each sampled row once"):
        make_plan().step(4, D, wrong, StepLog(tmp_path / "log"), 1)


@pytest.mark.parametrize("how", ["raises", "a row is missing"])
def test_a_sites_step_whose_rows_cannot_be_summed_is_noise_alone(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The twin is the plan itself, whose error would be an answer to the site's coordinator."""

    def gradients(rows: list[int]) -> Iterator[Chunk]:
        if how == "raises":
            raise ZeroDivisionError("Mrs Example")
        yield Chunk(rows[1:], [torch.ones(len(rows), D)])

    log, plan = StepLog(tmp_path / "log"), make_plan(noise_multiplier=1e-6, divisor=4.0)
    given = (4, D, gradients, log, 1)
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        plan.step(*given)
    assert log.steps() == []
    try:
        found = SitePlan(plan).step(*given)
    except (ZeroDivisionError, RuntimeError):
        pytest.fail("a row's error left the step")
    assert 0 < float(found.abs().max()) < 1e-5
    assert float(SitePlan(plan).noised_sum(*given).abs().max()) * plan.grid < 1e-4
    assert len(log.steps()) == 2
    assert "takes no part" in caplog.text and "Example" not in caplog.text


class Short:
    """Memory in which no more than `rows` rows are clipped at once, and none with `never` in it;
    what was added before it ran out stays in the sum that was begun."""

    def __init__(self, rows: int, never: float = math.inf) -> None:
        self.rows, self.never = rows, never
        self.freed = 0

    def add_clipped(self, total: torch.Tensor, chunk: Chunk, *rest: Any) -> None:
        fits = len(chunk.rows) <= self.rows and float(chunk.parts[0].max()) < self.never
        ADD(total, chunk, *rest)
        if not fits:
            raise MemoryError

    def free(self, error: BaseException) -> None:
        assert isinstance(error, MemoryError)
        self.freed += 1


ADD = clip.add_clipped


def values(rows: list[int]) -> Iterator[Chunk]:
    yield Chunk(rows, [torch.tensor(rows).float()[:, None].expand(-1, 8) / 10 + 0.01])


def together(plan: SitePlan, rows: list[int]) -> torch.Tensor:
    return plan.total(rows, 8, lambda some: plan.plan.clipped_sum(some, 8, values))


def zeros_for_all(plan: SitePlan, rows: list[int], dimension: int, honest: Any) -> torch.Tensor:
    try:
        return honest(rows)
    except MemoryError:
        return torch.zeros(dimension, dtype=torch.int64)


def test_rows_that_cannot_be_summed_together_are_summed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out with the seventh row, or with whatever that row is: the sum of the others is
    what it would be without it. Twin: one row decides about all."""
    plan = make_plan()
    whole, six = together(SitePlan(plan), [*range(7)]), together(SitePlan(plan), [*range(6)])
    for memory, expected in ((Short(6), whole), (Short(7, never=0.6), six)):
        with monkeypatch.context() as patch:
            patch.setattr(clip, "add_clipped", memory.add_clipped)
            site = SitePlan(plan, make_room=memory.free)
            assert torch.equal(together(site, [*range(7)]), expected) and memory.freed
            patch.setattr(SitePlan, "_together_or_alone", zeros_for_all)
            lost = (together(site, [*range(6)]) - together(site, [*range(7)])).double().norm()
            assert float(lost) * plan.grid > plan.max_grad_norm, "more than one row"


def test_rows_that_a_team_cannot_sum_are_summed_here() -> None:
    class Failing:
        def total(self, *_: object) -> torch.Tensor:
            raise InfrastructureError("a rank is gone")

    plan = make_plan()
    found = together(SitePlan(plan, Failing()), [*range(7)])
    assert torch.equal(found, together(SitePlan(plan), [*range(7)])) and found.any()


def test_gradients_are_wiped(tmp_path: Path) -> None:
    kept = [torch.ones(4, D - 10), torch.ones(4, 10)]
    make_plan().step(4, D, lambda units: iter([Chunk(units, kept)]), StepLog(tmp_path / "log"), 1)
    assert not any(part.any() for part in kept)


def test_the_log_line_comes_with_the_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is on disk before the noise is drawn: if what follows fails, it was charged."""
    log = StepLog(tmp_path / "log")
    plan = make_plan(noise_multiplier=1.25, sampling_rate=0.5, max_grad_norm=0.3)

    def explode(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(noise, "gaussian_on_grid", explode)
    with pytest.raises(KeyboardInterrupt):
        plan.step(4, D, rows(1.0), log, 3)
    (step,) = log.steps()
    assert (step.round, step.noise_multiplier, step.sampling_rate, step.max_grad_norm) == (
        3, 1.25, 0.5, 0.3,
    )  # fmt: skip


def test_no_log_no_step(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InfrastructureError, match="step log"):
        make_plan().step(4, D, rows(1.0), StepLog(blocked / "log"), 1)


def test_a_damaged_log_is_named_and_shows_no_content(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"study": "secret-word"\n')
    with pytest.raises(InfrastructureError, match="line 1") as caught:
        StepLog(path).steps()
    assert "secret-word" not in str(caught.value)


def test_epsilon_of_the_log_is_epsilon_of_the_plan(tmp_path: Path) -> None:
    log, plan = StepLog(tmp_path / "log"), make_plan(rounds=3, local_steps=2)
    for step in range(6):
        plan.step(2, 8, lambda u: iter([Chunk(u, [torch.ones(len(u), 8)])]), log, step // 2 + 1)
    assert accountant.epsilon(events(log.steps()), plan.delta) == plan.epsilon
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["round"], line.get("steps")) for line in lines] == [(1, 2), (2, 2), (3, 2)]


# ------------------------------------------------------------------ any two of ε, σ and rounds


def test_sigma_follows_from_epsilon_and_rounds() -> None:
    plan = plan_for_site(study(), declared_size=100)
    assert plan.epsilon <= 8.0
    assert plan.divisor == 100.0


def test_rounds_follow_from_epsilon_and_sigma() -> None:
    made = study(
        privacy={"epsilon": 8.0, "delta": 1e-4, "noise_multiplier": 1.6},
        training={"sampling_rate": 1.0, "learning_rate": 0.1, "local_steps": 2},
    )
    plan = plan_for_site(made, 100)
    assert plan.rounds == 4
    assert plan.epsilon <= 8.0


def test_epsilon_follows_from_sigma_and_rounds() -> None:
    made = study(privacy={"delta": 1e-4, "noise_multiplier": 3.46})
    assert plan_for_site(made, 100).epsilon == pytest.approx(2.05, abs=0.2)


def test_a_budget_for_no_round_says_so() -> None:
    made = study(
        privacy={"epsilon": 0.1, "delta": 1e-4, "noise_multiplier": 0.5},
        training={"sampling_rate": 1.0, "learning_rate": 0.1},
    )
    with pytest.raises(ConfigError, match="does not pay for one round"):
        plan_for_site(made, 100)


def test_expected_batch_over_the_declared_size_is_the_rate() -> None:
    made = study(
        training={"rounds": 4, "expected_batch": 50, "learning_rate": 0.1},
        privacy={"noise_multiplier": 1.6, "delta": 1e-4},
    )
    assert plan_for_site(made, 200).sampling_rate == 0.25
    small = plan_for_site(made, 30)
    assert (small.sampling_rate, small.divisor) == (1.0, 30.0)
