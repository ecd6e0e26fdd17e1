"""Noised answers about held-out records: what leaves, its noise, what is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedtune.core.vault.answers
import fedtune.launch.in_one_process
from fedtune.core.config import Study, load_site, load_study
from fedtune.core.dp import noise, query
from fedtune.core.dp.accountant import epsilon
from fedtune.core.dp.plan import DpPlan
from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import ConfigError, PolicyRefused
from fedtune.core.vault.prepared import Unprepared, Update
from fedtune.core.vault.worker import SiteWorker
from fedtune.presets import templates
from fedtune.server import queries
from fedtune.server.admission import Outcome
from tests import chance
from tests.guarantee.test_wire_inventory import FROM_THE_PLAN, HEADER, shape
from tests.guarantee.world import Recorder, leaves, run
from tests.private_evaluation_kit import found, held_out, sums, world
from tests.query_rows import GivenRows
from tests.server.fakes import QUERY, FakeSite, Trial, make_study, trial

__all__ = ["trial"]  # the fixture

ALLOWED = {
    "metadata.message_type": "query.evaluate",
    "site.name": "str",
    "site.status": "str",
    "site.reason": "str",
    "site.events": "str",
    "site.header": "str",
    "site.signature": "str",
    "answer/values": "float32 (2,)",
}


def outside(grid: Recorder) -> list[str]:
    """Every field of the answers that the allow-list does not name."""
    strange = []
    for reply in grid.replies:
        if reply.metadata.message_type != "query.evaluate":
            continue
        strange += [f"{p}: {what}" for p, what in leaves(reply) if ALLOWED.get(p) != what]
        site = reply.content.config_records["site"]
        strange += [f"header.{key}" for key in set(json.loads(str(site["header"]))) ^ HEADER]
        for event in json.loads(str(site["events"])):
            strange += [f"events.{key}" for key in set(event) ^ FROM_THE_PLAN]
    return strange


def test_no_field_leaves_but_two_noised_numbers_and_what_the_plan_says(
    usual: tuple[Path, Recorder],
) -> None:
    _, grid = usual
    kinds = [reply.metadata.message_type for reply in grid.replies]
    assert kinds.count("query.evaluate") == 4 and kinds.count("train") == 6
    assert outside(grid) == []


def test_a_third_number_is_caught(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: an answer that also carries the number of units."""
    honest = SiteWorker.evaluate

    def more(*arguments: Any) -> Update:
        made = honest(*arguments)
        return Update({**made.delta, "units": np.ones(1, np.float32)}, made.events)

    monkeypatch.setattr(SiteWorker, "evaluate", more)
    grid = run(world(tmp_path, tiny_base, 3.0, every=3))
    assert "answer/units: float32 (1,)" in outside(grid)


BROKEN = [{"who": "p", "q": "", "a": "y"}, {"who": "p", "a": "y"}]
VARIANTS = {11: held_out(11), 1: held_out(1), 0: [], "broken": BROKEN}


@pytest.mark.parametrize("count", VARIANTS)
def test_the_wire_looks_the_same_whatever_was_held_out(
    usual: tuple[Path, Recorder], tmp_path: Path, tiny_base: Path, count: int | str
) -> None:
    grid = run(world(tmp_path, tiny_base, 3.0, VARIANTS[count]))  # type: ignore[index]
    assert shape(grid) == shape(usual[1])


def made_plan(sigma: float = 3.0) -> DpPlan:
    table = {"noise_multiplier": sigma}
    return query.query_plan(_with_queries(table))


def _with_queries(table: dict[str, Any], **strategy: Any) -> Study:
    body = make_study(**strategy).model_dump()
    return Study.model_validate({**body, "private_evaluation": table})


# An answer has two numbers; the smallest of the faults below is a quarter less.
SIGMA = 3.0
SPREAD = chance.spread_for(0.75)


def variance_is_right(folder: Path, plan: DpPlan) -> bool:
    """Whether answers of nobody are noise alone, σ · √2 in each number."""
    log, empty = StepLog(folder / "steps.jsonl"), torch.zeros(0, 2, dtype=torch.float64)
    calls = range(math.ceil(SPREAD.draws / 2))
    seen = torch.stack([query.answer(plan, GivenRows(empty), log, 1) for _ in calls]).double()
    found = float(seen.square().mean().sqrt()) / (SIGMA * math.sqrt(2))
    return chance.spread_of(seen.numel()).holds(found)


def test_an_answer_carries_the_noise_that_it_is_charged_for(tmp_path: Path) -> None:
    assert variance_is_right(tmp_path, made_plan())


@pytest.mark.parametrize("fault", ["no noise", "three quarters of σ", "a norm of 1"])
def test_other_noise_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The twins."""
    plan = made_plan()
    if fault == "no noise":
        nothing = lambda n, *_: torch.zeros(n, dtype=torch.int64)  # noqa: E731
        monkeypatch.setattr(noise, "gaussian_on_grid", nothing)
    elif fault == "a norm of 1":
        monkeypatch.setattr(Study, "query_norm", 1.0)
        plan = made_plan()
    else:
        plan = made_plan(0.75 * SIGMA)
    assert not variance_is_right(tmp_path, plan)


@pytest.mark.parametrize(
    "row", [(1.0, 1.0), (0.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (50.0, 1.0), (-3.0, 9.0)]
)
def test_one_unit_moves_the_sums_by_no_more_than_the_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: tuple[float, float]
) -> None:
    nothing = lambda n, *_: torch.zeros(n, dtype=torch.int64)  # noqa: E731
    monkeypatch.setattr(noise, "gaussian_on_grid", nothing)
    log, plan = StepLog(tmp_path / "steps.jsonl"), made_plan()
    others = torch.rand(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = torch.cat([others, torch.tensor([row], dtype=torch.float64)])
    without = query.answer(plan, GivenRows(others.clone()), log, 1).double()
    moved = query.answer(plan, GivenRows(both), log, 1).double() - without
    assert float(moved.norm()) <= math.sqrt(2) * (1 + 1e-5)  # fp32 in the sums
    assert not both.any()  # nothing un-noised is left in memory


STUDY = _with_queries({"noise_multiplier": 2.0, "every": 2}, min_sites=2)


def test_sites_are_asked_every_so_many_rounds_and_pooled(trial: Callable[..., Trial]) -> None:
    a, b = FakeSite("a", answers={1: sums(30.0, 40.0), 2: sums(90.0, 60.0)}), FakeSite("b")
    run = trial(a, b)
    body = run.run(STUDY)
    assert a.asked == b.asked == [2, 4] and a.calls == [1, 2, 3, 4]
    first, second = found(run)
    assert first["likelihood"] == pytest.approx((30 + 25) / 140)
    spread = math.sqrt(2 * 4 * 2 * (1 + (55 / 140) ** 2)) / 140
    assert first["noise_sd"] == pytest.approx(spread)
    assert second["likelihood"] == pytest.approx(115 / 160)
    steps = body["privacy"]["evaluation"]["sites"]["a"]["steps"]
    assert steps == 2 and body["privacy"]["steps"] == 4
    assert a.receipts[0] == "" and all(a.receipts[1:])  # each order carries the newest receipt


BAD = {
    "another shape": (sums(1.0, 2.0, 3.0), "dropped"),
    "not finite": (sums(math.nan, 2.0), "dropped"),
    "less noise than the plan's": (sums(sigma=1.0), "dropped"),
    "no new step": (sums(steps=0), "dropped"),
    "an error": (RuntimeError("patient 7"), "failed: the site's own log says why"),
    "a refusal": (PolicyRefused("rule"), "refused: rule"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_answer_is_listed_with_its_reason_and_the_run_goes_on(
    trial: Callable[..., Trial], how: str
) -> None:
    answer, reason = BAD[how]
    run = trial(FakeSite("a"), FakeSite("b", answers={1: answer}))
    run.run(STUDY)
    first, second = found(run)
    assert first["sites"] == ["a"] and first["missing"]["b"].startswith(reason)
    assert "patient" not in first["missing"]["b"]
    assert first["likelihood"] == pytest.approx(0.25)
    assert second["sites"] == ["a", "b"] and second["missing"] == {}


def name_another(update: Update) -> Update:
    return replace(update, said={"name": "a"})


@pytest.mark.parametrize(
    "answer, why", [(name_another, "names another site"), (sums(sigma=2.01, steps=2), "step log")]
)
def test_an_answer_that_the_run_could_not_prove_is_dropped(
    trial: Callable[..., Trial], answer: Any, why: str
) -> None:
    """It names another site, or changes the steps of an earlier answer that counted."""
    run = trial(FakeSite("a"), FakeSite("b", answers={2: answer}))
    run.run(STUDY)
    first, second = found(run)
    assert first["sites"] == ["a", "b"] and second["sites"] == ["a"]
    assert second["missing"]["b"].startswith("dropped: its ") and why in second["missing"]["b"]


@pytest.mark.parametrize("crash", ["before the answers are kept", "before anybody is asked"])
def test_a_resumed_run_asks_nobody_twice_for_what_is_known(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    class Killed(KeyboardInterrupt):
        pass

    a, b = FakeSite("a"), FakeSite("b")
    run = trial(a, b)
    honest = queries.Queries.ask

    def dying(self: queries.Queries) -> dict[str, Any]:
        if self.progress.round == 4:
            if crash == "before the answers are kept":
                honest(self)
            raise Killed
        return honest(self)

    monkeypatch.setattr(queries.Queries, "ask", dying)
    with pytest.raises(Killed):
        run.run(STUDY)
    monkeypatch.undo()
    monkeypatch.setattr(fedtune.core.vault.answers, "worker", lambda path: {"a": a, "b": b}[path])
    before = list(a.asked)
    assert before == ([2, 4] if crash == "before the answers are kept" else [2])
    for _ in range(2):  # once to finish, once more over a finished run
        run.run(STUDY, resume=True)
        assert a.asked == [*before, 4]  # a real site sends the same bytes again, unpaid
        assert a.calls == [1, 2, 3, 4] and len(found(run)) == 2


def test_a_site_that_forgot_the_plan_is_told_again(trial: Callable[..., Trial]) -> None:
    a = FakeSite("a")
    honest = a.evaluate

    def forgetful(*arguments: Any) -> Update:
        if a.prepared == 1:
            a.known = False
            raise Unprepared("forgot")
        return honest(*arguments)

    a.evaluate = forgetful  # type: ignore[method-assign]
    run = trial(a, FakeSite("b"))
    run.run(STUDY)
    assert a.prepared == 2 and found(run)[0]["sites"] == ["a", "b"]


def of(*sums: tuple[float, float]) -> list[Outcome]:
    arrays = [{"sums": np.array(pair, np.float32)} for pair in sums]
    return [Outcome("answered", "", update, [{**QUERY, "steps": 1}]) for update in arrays]


def test_a_value_that_is_lost_in_the_noise_is_not_shown() -> None:
    nothing = {"likelihood": None, "noise_sd": None}
    assert queries.pool_answers([]) == nothing
    assert queries.pool_answers(of((1.0, 4.0))) == nothing  # the count's own noise has sd 2.8
    assert queries.pool_answers(of((5.0, -100.0))) == nothing
    assert queries.pool_answers(of((-5.0, 100.0)))["likelihood"] == 0.0
    assert queries.pool_answers(of((120.0, 100.0)))["likelihood"] == 1.0


def test_the_stated_spread_is_that_of_the_noise() -> None:
    draw = np.random.default_rng(3)  # a seed: the same noise each time
    noised = draw.normal((30.0, 120.0), 2 * math.sqrt(2), (4000, 2))
    values = [queries.pool_answers(of((float(s), float(n))))["likelihood"] for s, n in noised]
    stated = queries.pool_answers(of((30.0, 120.0)))["noise_sd"]
    assert np.std(values) == pytest.approx(stated, rel=0.06)


def test_without_privacy_there_is_no_private_evaluation() -> None:
    body = make_study().model_dump() | {"privacy": "off"}
    with pytest.raises(ValueError, match="private_evaluation: not allowed with"):
        Study.model_validate({**body, "private_evaluation": {"noise_multiplier": 1.0}})


def test_the_templates_commented_tables_are_valid_when_switched_on(tmp_path: Path) -> None:
    texts = {"study.toml": templates.STUDY, "site.toml": templates.SITE}
    marks = {"study.toml": "# [private_evaluation]", "site.toml": "# [evaluation]"}
    for name, text in texts.items():
        at = text.index(marks[name])
        block, gap, rest = text[at:].partition("\n\n")
        lines = (line.removeprefix("# ") for line in block.splitlines())
        (tmp_path / name).write_text(text[:at] + "\n".join(lines) + gap + rest)
    study, site = load_study(tmp_path / "study.toml"), load_site(tmp_path / "site.toml")
    assert study.queries == (8,)
    plain = study.model_copy(update={"private_evaluation": None})
    assert plain.digest != study.digest  # what is asked is part of the plan that is signed
    costs = [epsilon(query.query_plan(study).events(n), 1e-4) for n in (1, 2)]
    assert costs[0] < 1.705 and costs[1] < 2.545  # as the comment says
    assert site.evaluation and site.evaluation.disjoint_from == ("records",)
    text = (tmp_path / "site.toml").read_text().replace('name = "held-out"', 'name = "records"')
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"evaluation\.name"):
        load_site(tmp_path / "site.toml")
