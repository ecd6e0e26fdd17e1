"""Held-out records at the sites: asked about with noise, paid for, and never otherwise seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from matplotlib.image import imread

import fedtune.launch.in_one_process
from fedtune.core.config import EvaluationTable, Site, Study, load_site, load_study, save
from fedtune.core.data.records import unit_member
from fedtune.core.dp.accountant import epsilon
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.dp.query import query_plan
from fedtune.core.dp.steplog import events
from fedtune.core.errors import BudgetExceeded, PolicyRefused
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.vault import budget
from fedtune.core.vault.budget import MOST_ATTEMPTS, Budget
from fedtune.core.vault.declared import declare
from fedtune.core.vault.evaluation import check_release
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.codec import VALUES, encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.requests import FAILED
from fedtune.core.wire.seal import digest_beside, order
from fedtune.evaluation.evaluator import Evaluator
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record
from fedtune.officer.review import review
from fedtune.public.start import start
from fedtune.report.plot import png
from fedtune.server import store
from tests import chance
from tests.client.site_kit import make_site
from tests.dp.conftest import study as make_plan
from tests.guarantee.world import NAMES, Recorder, run
from tests.private_evaluation_kit import APART, HELD_OUT, WILLING, log, world
from tests.server.fakes import FakeSite, Trial, make_study, trial, zeros

__all__ = ["trial"]  # the fixture


def report(study: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((study.parent / "run" / "report.json").read_text())
    return body


def resolved(study: Path) -> Study:
    progress = store.load(study.parent / "run", load_study(study))
    assert progress is not None
    return progress.study


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
    assert last["likelihood"] == pytest.approx(
        exact(loud), abs=chance.deviations() * last["noise_sd"]
    )


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
    worker.evaluate(
        made.study.digest, 2, made.adapter
    )  # of a study the newest answer alone is kept
    assert len(worker.log.steps()) == len(worker.ledger.charges("held-out")) == 3
    with pytest.raises(PolicyRefused, match="no query after round 1"):
        worker.evaluate(made.study.digest, 1, made.adapter)


def test_one_question_is_not_asked_about_as_many_adapters_as_a_coordinator_sends(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = world(tmp_path, tiny_base, 60.0)
    made = start(load_study(study))
    worker = worker_of(study)
    assert worker.prepare(made.study, made.frozen).admitted
    for number in range(budget.MOST_ATTEMPTS):
        other = {name: array + number for name, array in made.adapter.items()}
        worker.evaluate(made.study.digest, 2, other)
    with pytest.raises(BudgetExceeded, match=f"was paid for {budget.MOST_ATTEMPTS} times"):
        worker.evaluate(made.study.digest, 2, {n: -1 - a for n, a in made.adapter.items()})
    assert len(worker.ledger.charges("held-out")) == budget.MOST_ATTEMPTS


def test_records_that_became_private_in_mid_study_are_not_asked_about_for_nothing(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Declared data pays from a ledger of the run. A question is checked as a round is: what the
    site's file says since would be paid for there, and the ledger for life not know of it."""
    study = world(tmp_path, tiny_base, 3.0, policy=WILLING + "allow_declared_data = true\n")
    made, path = start(load_study(study)), tmp_path / "site-north.toml"
    private = load_site(path)
    open_to_all = {"declared": "public"}
    save(private.changed(data=open_to_all, evaluation=open_to_all), path)
    declare(load_site(path))
    worker = SiteWorker(load_site(path), path).begin_run(made.study.digest)
    assert worker.prepare(made.study, made.frozen).admitted
    worker.evaluate(made.study.digest, 2, made.adapter)
    assert len(worker.ledger.spending("held-out")) == 1
    forbidden = load_site(path).changed(policy={"allow_declared_data": False})
    other = {name: array + 1 for name, array in made.adapter.items()}
    for site, words in (
        (forbidden, "policy.allow_declared_data is not set"),
        (private, "data.declared was changed"),
    ):
        save(site, path)
        refused = ""
        try:
            worker.evaluate(made.study.digest, 2, other)
        except PolicyRefused as refusal:
            refused = str(refusal)
        assert words in refused
    assert len(worker.ledger.spending("held-out")) == 1 and worker.home.spending() == []


def test_a_question_that_is_refused_reads_no_record(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whichever count: of the ledger's rounds, or of this question's attempts."""
    read: list[str] = []
    honest = SiteWorker.data_in_study
    monkeypatch.setattr(
        SiteWorker, "data_in_study", lambda *given: read.append("records") or honest(*given)
    )
    study = world(tmp_path, tiny_base, 60.0, policy=WILLING + "max_rounds = 5\n")
    made = start(load_study(study))
    for attempts, match in ((8, r"policy\.max_rounds"), (3, "was paid for 3 times")):
        monkeypatch.setattr(budget, "MOST_ATTEMPTS", attempts)
        worker = worker_of(study, "north" if attempts == 8 else "south")
        assert worker.prepare(made.study, made.frozen).admitted
        with pytest.raises(BudgetExceeded, match=match):
            for number in range(6):
                other = {name: array + number for name, array in made.adapter.items()}
                worker.evaluate(made.study.digest, 2, other)
        paid = len(worker.ledger.charges("held-out"))
        assert paid == len(read) == min(5, attempts)
        read.clear()


def test_questions_stop_at_the_ceiling(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MOST_ATTEMPTS", 1000)  # which stops them sooner
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


@pytest.mark.parametrize("table", [HELD_OUT, HELD_OUT + APART])
def test_a_review_states_what_a_patient_of_both_files_pays(
    tmp_path: Path, tiny_base: Path, table: str
) -> None:
    """Twin: of held-out records that are declared apart, a patient pays for one of both."""
    ceilings = "max_epsilon = 50.0\nmax_epsilon_per_study = 20.0\n"
    study = world(tmp_path, tiny_base, 3.0, policy=WILLING + ceilings, table=table)
    site = load_site(tmp_path / "site-north.toml")
    said = _costs_in_review(load_study(study), site)
    run(study)
    charges = Ledger(tmp_path / "state-north").charges("records")
    assert len(charges) == (3 if "disjoint" in table else 5)
    plan = plan_for_site(resolved(study), site.site.declared_size)
    total = Budget(site.policy, plan, charges).total(ahead=0).epsilon
    of_study = epsilon([charge.event for charge in charges], 1e-3)
    both = f"in both files pays ε = {rounded_up(of_study)} for the study"
    assert (both in said) is (table == HELD_OUT)
    assert f"so far, {rounded_up(total)} with this study" in said
    after = _costs_in_review(resolved(study), site)
    assert f"ε = {rounded_up(total)} so far, {rounded_up(total)} with this study" in after
    often = [e._replace(steps=e.steps * MOST_ATTEMPTS) for e in (c.event for c in charges)]
    most = min(20.0, epsilon(often, 1e-3))
    assert most > of_study and f"this study at most up to ε = {rounded_up(most)}" in said


def _costs_in_review(study: Study, site: Site) -> str:
    told = review(study, site, Ledger(site.home), outline=True)
    return " ".join(dict(told.sections)["What it costs"])


def test_a_study_keeps_below_its_ceiling_in_whatever_order_it_asks(
    tmp_path: Path, tiny_base: Path
) -> None:
    """A coordinator may ask all questions first, then have each round trained again and again.

    Twin: of held-out records that are declared apart, training's charges alone count."""
    ceiling = 10.0  # the plan's own rounds and questions are 6.7
    ceilings = f"max_epsilon = 50.0\nmax_epsilon_per_study = {ceiling}\n"
    for table, least in ((HELD_OUT, 0.0), (HELD_OUT + APART, ceiling)):
        folder = tmp_path / str(least)
        folder.mkdir()
        study = world(folder, tiny_base, 1.2, policy=WILLING + ceilings, table=table)
        made = start(load_study(study))
        worker = worker_of(study)
        assert worker.prepare(made.study, made.frozen).admitted
        for round_ in made.study.queries:
            worker.evaluate(made.study.digest, round_, made.adapter)
        with pytest.raises(BudgetExceeded, match="max_epsilon_per_study"):
            for number in range(30):
                other = {name: array + number for name, array in made.adapter.items()}
                worker.train(made.study.digest, 1 + number % 3, other)
        charges = {
            (charge.study, charge.round, seq): charge.event
            for name in ("records", "held-out")
            for seq, charge in enumerate(worker.ledger.charges(name))
        }
        assert len(charges) > 2
        spent = epsilon(charges.values(), 1e-3)
        assert least <= spent and (spent <= ceiling) is (table == HELD_OUT)


def test_who_withdraws_is_left_out_of_later_answers(tmp_path: Path, tiny_base: Path) -> None:
    ceilings = "max_epsilon = 1e9\nmax_epsilon_per_study = 1e9\nmin_noise_multiplier = 0.0\n"
    study = world(tmp_path, tiny_base, 1e-3, policy=WILLING + ceilings)
    made = start(load_study(study))
    worker = worker_of(study)
    assert worker.prepare(made.study, made.frozen).admitted
    for round_, count in ((2, 12), (3, 11)):
        sums = worker.evaluate(made.study.digest, round_, made.adapter).delta[VALUES]
        room = chance.deviations(2) * 1e-3 * math.sqrt(2)  # one patient more is 1
        assert sums[1] == pytest.approx(count, abs=room)
        worker.ledger.withdraw(unit_member("held-out-3"))


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
    (WILLING, "", 3.0, "site.toml names no held-out records"),
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


@pytest.mark.parametrize("secure", [False, True])
def test_a_query_is_judged_by_its_own_figures_and_not_by_trainings(
    tmp_path: Path, secure: bool
) -> None:
    """It takes every unit, its C follows from how many numbers it has, and its noise is its own
    also where that of a round is shared. Twin: each rule that holds for it refuses by its name."""
    shared: dict[str, Any] = {"secure_aggregation": {}, "strategy": {"min_sites": 10}}
    training = {"rounds": 4, "sampling_rate": 0.1, "learning_rate": 0.1}
    made = make_plan(
        training=training,
        lora={"rank": 4, "modules": ["q_proj"], "a_digest": "sha256:" + "0" * 64},
        private_evaluation={"noise_multiplier": 2.0},
        privacy={"epsilon": 8.0, "delta": 1e-4, "unit": "patient"},
        **(shared if secure else {}),
    )
    queries, bounds = query_plan(made), {"max_sampling_rate": 0.1, "max_grad_norm": 1.0}
    assert queries.sampling_rate == 1.0 and queries.max_grad_norm > 1.0

    def refusal(unit: str = "patient", **policy: Any) -> str:
        keys = [f"{number:064x}" for number in range(9)]
        allowed = {"release": ["evaluation"], "peers": keys, "min_noise_multiplier": 2.0}
        site = make_site(tmp_path, allowed | bounds | policy, patient="who")
        held = site.data.model_dump(mode="json") | {"name": "held-out"}
        site = Site.model_validate(
            site.model_dump(mode="json") | {"evaluation": held}, strict=False
        )
        changed = made if unit == "patient" else made.changed(privacy={"unit": unit})
        try:
            check_release(changed, site, queries, "")
        except PolicyRefused as refused:
            return str(refused)
        return ""

    assert refusal() == ""
    assert "policy.min_noise_multiplier" in refusal(min_noise_multiplier=2.01)
    assert "policy.max_delta" in refusal(max_delta=1e-5)
    assert "policy.min_units" in refusal(min_units=13)
    assert "policy.coordinators" in refusal(coordinators=["0" * 64])
    assert "policy.objectives" in refusal(objectives=["classify"])
    assert "patient column" in refusal("record")


def asks(sent: dict[str, Any]) -> dict[str, Any]:
    content = RecordDict(
        {"order": ConfigRecord(sent), "adapter": to_record(encode(zeros(), "float32"))}
    )
    grid = InProcessGrid([Path("a")], fedtune.launch.in_one_process.app)
    (reply,) = grid.send_and_receive([grid.create_message(content, "query.evaluate", 2, "1")])
    return dict(reply.content.config_records["site"])


def test_an_order_to_train_is_no_order_to_answer(trial: Callable[..., Trial]) -> None:
    """Who can only replay an order makes no site pay for another kind of work."""
    site, key = FakeSite("a"), SigningKey()
    trial(site)
    site.prepare(make_study(), {}, key.public)
    beside = digest_beside(bodies(to_record(encode(zeros(), "float32"))))
    asked = partial(order, key, round_=2, nonce="", receipt="", beside=beside)
    assert asks(asked("sha256:0:evaluation"))["status"] == "answered"
    assert asks(asked("sha256:0"))["reason"] == FAILED
    renamed = asked("sha256:0") | {"plan": "sha256:0:evaluation"}
    assert asks(renamed)["reason"] == FAILED
    assert site.asked == [2]
