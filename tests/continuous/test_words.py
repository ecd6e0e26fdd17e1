"""What people read of a continuous study: review, ledger, status, report, and errors."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedtune.cli.ledger_view import ledger_view
from fedtune.cli.main import app
from fedtune.cli.status_view import view
from fedtune.core.config import load_site, load_study
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.files.reading import fingerprint
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry.rounding import rounded_up
from fedtune.evaluation.evaluator import Evaluator
from fedtune.observe.status import read_status
from fedtune.officer.review import read_plan, review
from fedtune.report.change_plan import judge
from fedtune.report.markdown import markdown
from fedtune.server.store import load
from tests.continuous.fakes import START, go, sites
from tests.continuous.world import DELTA, SIGMA, lay_out, run, write
from tests.guarantee.world import patients

ONE = rounded_up(epsilon([Steps(SIGMA, 1.0, 1)], DELTA))  # what a round costs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Two rounds; before the second three patients arrive, and the first have spent their lives."""
    folder = tmp_path_factory.mktemp("words")
    study = lay_out(folder, tiny_base, patients(12), "max_epsilon = 1.2")

    def on_round(number: int) -> None:
        write(folder / "north.jsonl", patients(15))

    run(study, 2, on_round)
    return folder


def shown(*parts: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(*parts)
    return " ".join(out.getvalue().split())


def test_the_ledger_shows_who_arrived_when_and_who_is_out(world: Path) -> None:
    site = load_site(world / "site-north.toml")
    said = shown(ledger_view(Ledger(site.site.state), "records", site.policy))
    assert "A patient paid for the rounds since the arrival alone: the next table." in said
    assert "patients by arrival" in said
    rows = said[said.index("patients by arrival") :]
    assert f"12 1 {ONE} spent: left out" in rows and f"3 1 {ONE}" in rows
    assert f"spent {ONE}" in said  # of whoever has spent most, not of all rounds together


def test_the_review_says_that_there_is_no_last_round(world: Path) -> None:
    site = load_site(world / "site-north.toml")
    found = review(read_plan(world / "run" / "plan.json", site), site, Ledger(site.site.state))
    text = " ".join(line for _, lines in found.sections for line in lines)
    assert "NO LAST ROUND: a round of 1 step every 1h" in text and "at most 5 rounds" in text
    assert "None rounds" not in text and "never because records arrived" in text
    assert f"ε = {ONE} at δ = 0.001 for a patient who takes part" in text
    assert "at most ε = 3, for all records of one patient" in text
    assert found.refusals == []
    tight = site.policy.model_copy(update={"max_epsilon": 1.0})
    refused = review(
        read_plan(world / "run" / "plan.json", site),
        site.model_copy(update={"policy": tight}),
        Ledger(site.site.state),
    )
    assert "policy.max_epsilon" in refused.refusals[0]


def test_the_public_comparison_is_paired_and_repeatable(world: Path) -> None:
    study = load_study(world / "study.toml")
    kept = load(world / "run", study)
    assert kept is not None
    evaluator = Evaluator(kept.study, kept.frozen)
    rng = np.random.default_rng(0)
    shapes = {name: array.shape for name, array in kept.adapter.items()}
    one = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    other = {name: rng.normal(0, 30, shape).astype(np.float32) for name, shape in shapes.items()}
    assert kept.study.schedule is not None
    compare = lambda a, b: judge(evaluator.look(a, b), kept.study.schedule)  # noqa: E731
    same = compare(one, one)
    assert same.p == 1.0 and same.before == same.after  # a tie is not better
    forth, back = compare(other, one), compare(one, other)
    assert forth.p == compare(other, one).p and max(forth.p, back.p) == 1.0
    assert forth.before == back.after != forth.after == back.before
    assert (forth.before > forth.after) == (back.p == 1.0)  # lower is better


def test_the_public_files_digest_follows_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "public.jsonl"
    path.write_text("one")
    first = fingerprint(path)
    path.write_text("one")
    assert fingerprint(path) == first and len(first) == 64
    path.write_text("two")
    assert fingerprint(path) != first
    assert fingerprint(tmp_path) != "" and fingerprint(tmp_path / "nothing") == ""


def test_the_status_shows_the_next_round_and_the_version_in_use(trial: Any) -> None:
    from fedtune.observe import observer

    fake = trial(*sites())
    out = fake.folder / "out"
    with observer("coordinator", out) as seen:
        from tests.continuous.fakes import continuous, parts

        fake.run(continuous(), resume=True, parts=parts(2), on_event=seen)
    said = shown(view(read_status(out)))
    assert "round 2, next at 2027-01-15T09:00:00Z" in said and "is released" in said
    assert START == 1.8e9


def test_the_report_says_what_epsilon_is_of(trial: Any) -> None:
    body = go(trial(*sites()), 2)
    text = markdown(body)
    assert "The study has no last round" in text and "## Continuous" in text
    fixed = {key: value for key, value in body.items() if key != "continuous"}
    assert "no last round" not in markdown(fixed)


def test_simulate_needs_an_end(world: Path) -> None:
    said = CliRunner().invoke(
        app, ["simulate", str(world / "study.toml"), "--out", str(world / "x")]
    )
    assert said.exit_code == 2 and "--rounds N" in said.output
