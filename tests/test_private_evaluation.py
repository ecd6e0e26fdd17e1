"""Held-out records at the sites: asked about with noise, paid for, and never otherwise seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from matplotlib.image import imread
from scipy.stats import chi2

import fedtune.client.app
from fedtune.client.site import SiteWorker, Unprepared, Update
from fedtune.config import EvaluationTable, Study, load_site, load_study, templates
from fedtune.data.records import unit_member
from fedtune.dp import noise, query
from fedtune.dp.accountant import epsilon
from fedtune.dp.plan import DpPlan
from fedtune.dp.steplog import StepLog, events
from fedtune.errors import BudgetExceeded, ConfigError, PolicyRefused
from fedtune.evaluation.evaluator import Evaluator
from fedtune.flower.arrays import to_record
from fedtune.flower.grid import InProcessGrid
from fedtune.ledger.ledger import Ledger
from fedtune.models.start import start
from fedtune.report.plot import png
from fedtune.server import queries, store
from fedtune.server.admission import Outcome
from fedtune.wire.codec import VALUES, encode
from fedtune.wire.keys import SigningKey
from fedtune.wire.seal import order
from tests.guarantee.test_wire_inventory import FROM_THE_PLAN, HEADER, shape
from tests.guarantee.world import NAMES, Recorder, lay_out, leaves, patients, run
from tests.server.fakes import QUERY, FakeSite, Trial, make_study, trial, zeros

__all__ = ["trial"]  # the fixture

WILLING = 'release = ["evaluation"]\n'
HELD_OUT = """[evaluation]
path = "held-{name}.jsonl"
columns = {{ prompt = "q", completion = "a", patient = "who" }}
"""
APART = 'disjoint_from = ["records"]\n'


def held_out(count: int, records: int = 2) -> list[dict[str, str]]:
    return [
        {"who": f"held-out-{p}", "q": f"a cough since {p * 5 + n} weeks", "a": "ny"[p % 2]}
        for p in range(count)
        for n in range(records + p % 2)
    ]


def world(
    folder: Path,
    base: Path,
    sigma: float,
    north: list[dict[str, str]] | None = None,
    *,
    every: int = 2,
    policy: str = WILLING,
    table: str = HELD_OUT + APART,
) -> Path:
    """The two hospitals with held-out records; `north` replaces the first one's. Queries after
    rounds 2 and 3."""
    study = lay_out(folder, base, patients(12))
    with study.open("a") as file:
        file.write(f"[private_evaluation]\nnoise_multiplier = {sigma}\nevery = {every}\n")
    for name in NAMES:
        rows = held_out(12) if north is None or name != "north" else north
        (folder / f"held-{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        with (folder / f"site-{name}.toml").open("a") as file:
            file.write(policy + table.format(name=name))
    return study


def report(study: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((study.parent / "run" / "report.json").read_text())
    return body


def log(study: Path, name: str) -> StepLog:
    return StepLog(study.parent / f"state-{name}" / "steps.jsonl")


def resolved(study: Path) -> Study:
    progress = store.load(study.parent / "run", load_study(study))
    assert progress is not None
    return progress.study


# ---------------------------------------------------------------------------------- the value


def exact(study: Path) -> float:
    """The pooled likelihood, computed by the coordinator's own evaluator, without noise."""
    progress = store.load(study.parent / "run", load_study(study))
    assert progress is not None
    units: dict[tuple[str, str], list[float]] = {}
    for name in NAMES:
        path = study.parent / f"held-{name}.jsonl"
        table = EvaluationTable.model_validate(
            {"path": path, "columns": {"prompt": "q", "completion": "a"}}
        )
        asked = progress.study.model_copy(update={"evaluation": table})
        scores = Evaluator(asked, progress.frozen).scores(progress.adapter)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row, loss in zip(rows, scores.loss, strict=True):
            units.setdefault((name, row["who"]), []).append(math.exp(-loss))
    return float(np.mean([np.mean(scores) for scores in units.values()]))


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run with next to no noise, at sites that allow it."""
    ceilings = "max_epsilon = 1e9\nmax_epsilon_per_study = 1e9\nmin_noise_multiplier = 0.0\n"
    folder = tmp_path_factory.mktemp("loud")
    study = world(folder, tiny_base, 1e-3, policy=WILLING + ceilings)
    run(study)
    return study


def test_with_little_noise_the_value_is_the_exact_one(loud: Path) -> None:
    measured = [r["private_quality"] for r in report(loud)["rounds"] if "private_quality" in r]
    assert [r["round"] for r in report(loud)["rounds"] if "private_quality" in r] == [2, 3]
    last = measured[-1]
    assert last["sites"] == ["north", "south"] and last["missing"] == {}
    assert last["noise_sd"] < 1e-3
    # 6 standard deviations: wrongly outside once in 5·10⁸
    assert last["likelihood"] == pytest.approx(exact(loud), abs=6 * last["noise_sd"])


def test_the_report_shows_value_spread_and_price(loud: Path) -> None:
    text = (loud.parent / "run" / "report.md").read_text()
    last = report(loud)["rounds"][-1]["private_quality"]
    assert "## Private evaluation" in text and f"{last['likelihood']:.4f}" in text
    assert f"± {2 * last['noise_sd']:.4f}" in text
    assert "held-out records have ε" in text
    picture = imread(loud.parent / "run" / "progress.png")  # two panels: likelihood and ε
    assert picture.shape[1] < 1.2 * 9 * 120
    body = report(loud)
    both = png(body | {"quality": {"metric": "loss", "before": 2.0, "by_round": []}})
    assert len(both) > 1000 and png(body) != both


# ---------------------------------------------------------------------------------- the price


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, Recorder]:
    study = world(tmp_path_factory.mktemp("usual"), tiny_base, 3.0)
    return study, run(study)


def test_epsilon_of_the_queries_is_the_accountants_of_the_step_log(
    usual: tuple[Path, Recorder],
) -> None:
    study, _ = usual
    plan, found = resolved(study), report(study)["privacy"]
    for name in NAMES:
        steps = log(study, name).steps(plan.queries_digest)
        assert [s.round for s in steps] == [2, 3]
        assert {(s.noise_multiplier, s.max_grad_norm) for s in steps} == {(3.0, math.sqrt(2))}
        site = found["evaluation"]["sites"][name]
        assert site["epsilon"] == pytest.approx(epsilon(events(steps), 1e-3))
        whole = events(log(study, name).steps(plan.digest)) + events(steps)
        assert site["with_training"] == pytest.approx(epsilon(whole, 1e-3))
    worst = found["evaluation"]
    assert (worst["delta"], worst["noise_multiplier"], worst["steps"]) == (1e-3, 3.0, 2)
    assert worst["unit"] == "patient" and worst["epsilon"] > 0
    assert found["steps"] == 3  # the training's own figures are untouched


def test_the_ledger_charges_the_held_out_records_and_not_those_apart_from_them(
    usual: tuple[Path, Recorder],
) -> None:
    study, _ = usual
    ledger, plan = Ledger(study.parent / "state-north"), resolved(study)
    charged = ledger.spending("held-out")
    assert [(s.charge.study, s.charge.round) for s in charged] == [
        (plan.queries_digest, 2),
        (plan.queries_digest, 3),
    ]
    assert {s.charge.name for s in charged} == {"inventory (evaluation)"}
    assert all(s.released for s in charged)
    assert {c.study for c in ledger.charges("records")} == {plan.digest}


def worker_of(study: Path, name: str = "north") -> SiteWorker:
    path = study.parent / f"site-{name}.toml"
    return SiteWorker(load_site(path), path)


def test_the_same_question_again_gets_the_same_bytes_for_nothing(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = world(tmp_path, tiny_base, 3.0)
    made = start(load_study(study))
    answers = []
    for _ in range(2):  # the second time as if the site had been restarted
        worker = worker_of(study)
        assert worker.prepare(made.study, made.frozen).admitted
        answers.append(worker.evaluate(made.study.digest, 2, made.adapter))
    assert np.array_equal(answers[0].delta[VALUES], answers[1].delta[VALUES])
    assert answers[0].events == answers[1].events
    assert len(worker.log.steps()) == len(worker.ledger.charges("held-out")) == 1
    other = {name: array + 1 for name, array in made.adapter.items()}
    worker.evaluate(made.study.digest, 2, other)  # about another adapter: another answer, paid
    assert len(worker.log.steps()) == len(worker.ledger.charges("held-out")) == 2
    with pytest.raises(PolicyRefused, match="after round 1 is not in the plan"):
        worker.evaluate(made.study.digest, 1, made.adapter)


def test_questions_stop_at_the_ceiling(tmp_path: Path, tiny_base: Path) -> None:
    study = world(tmp_path, tiny_base, 3.0, policy=WILLING + "max_epsilon = 5.5\n")
    made = start(load_study(study))
    worker = worker_of(study)
    assert worker.prepare(made.study, made.frozen).admitted
    with pytest.raises(BudgetExceeded, match=r"policy\.max_epsilon"):
        for number in range(1000):
            other = {name: array + number for name, array in made.adapter.items()}
            worker.evaluate(made.study.digest, 2, other)
    spent = [charge.event for charge in worker.ledger.charges("held-out")]
    assert 2 < len(spent) < 1000 and epsilon(spent, 1e-3) <= 5.5
    assert len(worker.log.steps()) == len(spent)


def test_queries_never_take_what_the_training_still_needs(tmp_path: Path, tiny_base: Path) -> None:
    """Where nobody says that the two files are apart, the training's whole ε is set aside."""
    ceilings = "max_epsilon_per_study = 5.2\n"
    study = world(tmp_path, tiny_base, 3.0, policy=WILLING + ceilings, table=HELD_OUT)
    run(study)
    body = report(study)
    assert [r["participants"] for r in body["rounds"]] == [["north", "south"]] * 3
    for found in (r["private_quality"] for r in body["rounds"] if "private_quality" in r):
        assert found["sites"] == [] and found["likelihood"] is None
        assert "policy.max_epsilon_per_study" in found["missing"]["north"]
    assert log(study, "north").steps(resolved(study).queries_digest) == []


def test_where_the_files_may_share_patients_each_pays_for_both(
    tmp_path: Path, tiny_base: Path
) -> None:
    ceilings = "max_epsilon = 50.0\nmax_epsilon_per_study = 20.0\n"
    study = world(tmp_path, tiny_base, 3.0, policy=WILLING + ceilings, table=HELD_OUT)
    run(study)
    last = report(study)["rounds"][-1]
    assert last["private_quality"]["sites"] == last["participants"] == ["north", "south"]
    plan, ledger = resolved(study), Ledger(tmp_path / "state-north")
    both = [plan.digest, plan.digest, plan.queries_digest, plan.digest, plan.queries_digest]
    assert [charge.study for charge in ledger.charges("records")] == both
    assert [charge.study for charge in ledger.charges("held-out")] == both


def test_who_withdraws_is_left_out_of_later_answers(tmp_path: Path, tiny_base: Path) -> None:
    ceilings = "max_epsilon = 1e9\nmax_epsilon_per_study = 1e9\nmin_noise_multiplier = 0.0\n"
    study = world(tmp_path, tiny_base, 1e-3, policy=WILLING + ceilings)
    made = start(load_study(study))
    worker = worker_of(study)
    assert worker.prepare(made.study, made.frozen).admitted
    for round_, count in ((2, 12), (3, 11)):
        sums = worker.evaluate(made.study.digest, round_, made.adapter).delta[VALUES]
        assert sums[1] == pytest.approx(count, abs=0.01)  # 7 standard deviations
        worker.ledger.withdraw(unit_member("held-out-3"))


# --------------------------------------------------------------------------------- who decides


def test_nothing_is_asked_that_the_plan_does_not_ask(tmp_path: Path, tiny_base: Path) -> None:
    study = world(tmp_path, tiny_base, 3.0)
    study.write_text(study.read_text().split("[private_evaluation]")[0])
    grid = run(study)
    assert {reply.metadata.message_type for reply in grid.replies} == {"query.prepare", "train"}
    assert not any(b"held" in body for body in grid.sent)
    assert "held-out" not in Ledger(tmp_path / "state-north").datasets
    assert "evaluation" not in report(study)["privacy"]


REFUSALS = [
    ("", HELD_OUT + APART, 3.0, 'policy.release does not list "evaluation"'),
    (WILLING, "", 3.0, "site.evaluation is not given"),
    (WILLING, HELD_OUT + APART, 0.2, "policy.min_noise_multiplier"),
]


@pytest.mark.parametrize("policy, table, sigma, rule", REFUSALS, ids=[r[3] for r in REFUSALS])
def test_a_site_that_does_not_release_refuses_by_name_of_the_rule(
    tmp_path: Path, tiny_base: Path, policy: str, table: str, sigma: float, rule: str
) -> None:
    study = world(tmp_path, tiny_base, sigma, policy=policy, table=table, every=3)
    run(study)
    rounds = report(study)["rounds"]
    assert [r["participants"] for r in rounds] == [["north", "south"]] * 3
    found = rounds[-1]["private_quality"]
    assert found["sites"] == [] and set(found["missing"]) == set(NAMES)
    assert all(why.startswith("refused: ") and rule in why for why in found["missing"].values())
    assert "held-out" not in Ledger(tmp_path / "state-north").datasets  # nothing was read
    assert len(log(study, "north").steps()) == 3
    assert rule.replace("_", "") in (tmp_path / "run" / "report.md").read_text().replace("_", "")


def asks(sent: dict[str, Any]) -> dict[str, Any]:
    content = RecordDict(
        {"order": ConfigRecord(sent), "adapter": to_record(encode(zeros(), "float32"))}
    )
    grid = InProcessGrid([Path("a")], fedtune.client.app.app)
    (reply,) = grid.send_and_receive([grid.create_message(content, "query.evaluate", 2, "1")])
    return dict(reply.content.config_records["site"])


def test_an_order_to_train_is_no_order_to_answer(trial: Callable[..., Trial]) -> None:
    """Who can only replay an order makes no site pay for another kind of work."""
    site, key = FakeSite("a"), SigningKey()
    trial(site)
    site.prepare(make_study(), {}, key.public)
    assert asks(order(key, "sha256:0:evaluation", 2, "", ""))["status"] == "answered"
    assert asks(order(key, "sha256:0", 2, "", ""))["reason"] == "SealError"
    renamed = order(key, "sha256:0", 2, "", "") | {"plan": "sha256:0:evaluation"}
    assert asks(renamed)["reason"] == "SealError"
    assert site.asked == [2]


# ------------------------------------------------------------------------------------ the wire

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


# ------------------------------------------------------------------------------------- the noise


def made_plan(sigma: float = 3.0) -> DpPlan:
    table = {"noise_multiplier": sigma}
    return query.query_plan(_with_queries(table))


def _with_queries(table: dict[str, Any], **strategy: Any) -> Study:
    body = make_study(**strategy).model_dump()
    return Study.model_validate({**body, "private_evaluation": table})


def variance_is_right(folder: Path, plan: DpPlan, sigma: float, calls: int = 800) -> bool:
    """Answers of nobody are noise alone: variance (σ · √2)² in each number. A right one is called
    wrong once in 10⁷."""
    log, empty = StepLog(folder / "steps.jsonl"), torch.zeros(0, 2, dtype=torch.float64)
    seen = torch.stack([query.answer(plan, empty, log, 1) for _ in range(calls)]).double()
    scaled = float((seen**2).sum()) / (sigma * math.sqrt(2)) ** 2
    low, high = chi2.ppf([5e-8, 1 - 5e-8], 2 * calls)
    return bool(low < scaled < high)


def test_an_answer_carries_the_noise_that_it_is_charged_for(tmp_path: Path) -> None:
    assert variance_is_right(tmp_path, made_plan(), 3.0)


@pytest.mark.parametrize("fault", ["no noise", "three quarters of σ", "a norm of 1"])
def test_other_noise_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The twins."""
    plan = made_plan()
    if fault == "no noise":
        nothing = lambda n, *_: torch.zeros(n, dtype=torch.int64)  # noqa: E731
        monkeypatch.setattr(noise, "gaussian_on_grid", nothing)
    elif fault == "a norm of 1":
        monkeypatch.setattr(query, "NORM", 1.0)
        plan = made_plan()
    else:
        plan = made_plan(0.75 * 3.0)
    assert not variance_is_right(tmp_path, plan, 3.0)


@pytest.mark.parametrize(
    "row", [(1.0, 1.0), (0.0, 1.0), (math.nan, 1.0), (math.inf, 1.0), (50.0, 1.0), (-3.0, 9.0)]
)
def test_one_unit_moves_the_sums_by_no_more_than_the_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: tuple[float, float]
) -> None:
    nothing = lambda n, *_: torch.zeros(n, dtype=torch.int64)  # noqa: E731
    monkeypatch.setattr(noise, "gaussian_on_grid", nothing)
    log, plan = StepLog(tmp_path / "steps.jsonl"), made_plan()
    others = torch.rand(20, 2, dtype=torch.float64)
    both = torch.cat([others, torch.tensor([row], dtype=torch.float64)])
    without = query.answer(plan, others.clone(), log, 1).double()
    moved = query.answer(plan, both, log, 1).double() - without
    assert float(moved.norm()) <= query.NORM * (1 + 1e-5)  # fp32 in the sums
    assert not both.any()  # nothing un-noised is left in memory


# ------------------------------------------------------------------------------- the coordinator

STUDY = _with_queries({"noise_multiplier": 2.0, "every": 2}, min_sites=2)


def found(run: Trial) -> list[dict[str, Any]]:
    lines = (run.folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [e["private_quality"] for e in map(json.loads, lines) if "private_quality" in e]


def sums(*values: float, **event: float) -> Callable[[Update], Update]:
    """An answer with other numbers, or another event."""

    def changed(update: Update) -> Update:
        delta = {VALUES: np.array(values, np.float32)} if values else update.delta
        return Update(delta, [{**each, **event} for each in update.events])

    return changed


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
    "an error": (RuntimeError("patient 7"), "failed: internal error"),
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


@pytest.mark.parametrize("crash", ["before the answers are kept", "before anybody is asked"])
def test_a_resumed_run_asks_nobody_twice_for_what_is_known(
    trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    class Killed(BaseException):
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
    monkeypatch.setattr(fedtune.client.app, "worker", lambda path: {"a": a, "b": b}[path])
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
    assert queries.pooled([]) == nothing
    assert queries.pooled(of((1.0, 4.0))) == nothing  # the count's own noise has sd 2.8
    assert queries.pooled(of((5.0, -100.0))) == nothing
    assert queries.pooled(of((-5.0, 100.0)))["likelihood"] == 0.0
    assert queries.pooled(of((120.0, 100.0)))["likelihood"] == 1.0


def test_the_stated_spread_is_that_of_the_noise() -> None:
    draw = np.random.default_rng(3)
    noised = draw.normal((30.0, 120.0), 2 * math.sqrt(2), (4000, 2))
    values = [queries.pooled(of((float(s), float(n))))["likelihood"] for s, n in noised]
    stated = queries.pooled(of((30.0, 120.0)))["noise_sd"]
    assert np.std(values) == pytest.approx(stated, rel=0.06)


# ------------------------------------------------------------------------------------ the files


def test_without_privacy_there_is_no_private_evaluation() -> None:
    body = make_study().model_dump() | {"privacy": "off"}
    with pytest.raises(ValueError, match="only in a private study"):
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
    assert study.queries == (4, 8)
    plain = study.model_copy(update={"private_evaluation": None})
    assert plain.digest != study.digest  # what is asked is part of the plan that is signed
    assert epsilon(query.query_plan(study).events(4), 1e-4) < 0.78  # as the comment says
    assert site.evaluation and site.evaluation.disjoint_from == ("records",)
    text = (tmp_path / "site.toml").read_text().replace('name = "held-out"', 'name = "records"')
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"evaluation\.name"):
        load_site(tmp_path / "site.toml")
