"""The commands of the person who answers for a site's data, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.dp.ledger import Ledger
from fedtune.simulate import simulate
from fedtune.sites import sites_in
from tests.guarantee.world import lay_out, patients
from tests.test_cli import run


@pytest.fixture
def world(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    lay_out(tmp_path, tiny_base, patients(12))
    return tmp_path


def test_review_says_what_runs_what_leaves_and_the_cost_and_signs_one_plan(world: Path) -> None:
    site = world / "site-north.toml"
    site.write_text(site.read_text() + 'admission = "signed"\n')
    seen = run("review", "study.toml", "--site", site)
    assert seen.exit_code == 0, seen.output
    for words in ("What would run", "What would leave", "What it costs", "rank 4", "Never at all"):
        assert words in seen.output
    assert "sha256:" in seen.output and "signed by" not in seen.output
    signed = run("review", "study.toml", "--site", site, "--sign")
    assert "signed by" in signed.output
    body = simulate(world / "study.toml", sites_in(world), world / "run")
    assert body["sites"]["north"] == "admitted"


def test_review_and_plan_say_what_a_study_on_pairs_reads(world: Path, tiny_base: Path) -> None:
    lay_out(world, tiny_base, patients(12), objective="dpo")
    shown = [
        run("review", "study.toml", "--site", world / "site-north.toml"),
        run("plan", "study.toml", "--size", 20),
    ]
    for each in shown:
        words = " ".join(each.output.split())
        assert each.exit_code == 0, each.output
        assert "Objective dpo." in words and "a better and a worse answer" in words


def test_review_names_every_rule_that_says_no_and_does_not_sign(world: Path) -> None:
    site = world / "site-north.toml"
    site.write_text(site.read_text() + 'max_rank = 2\nmax_steps = 1\nmodules = ["q_proj"]\n')
    seen = run("review", "study.toml", "--site", site, "--sign")
    assert seen.exit_code == 3
    for rule in ("max_rank", "max_steps", "policy.modules does not list 'down_proj'"):
        assert rule in seen.output
    assert "signed by" not in seen.output


def test_the_ledger_shows_what_was_spent_by_whom_and_what_remains(world: Path) -> None:
    none = run("ledger", "site-north.toml")
    assert none.exit_code == 2 and "no ledger yet" in none.output
    assert not (world / "state-north").exists()
    simulate(world / "study.toml", sites_in(world), world / "run")
    seen = run("ledger", "site-north.toml", "--backup", world / "copy")
    assert seen.exit_code == 0, seen.output
    assert "inventory" in seen.output and "budget of records" in seen.output
    assert (world / "copy" / "ledger.db").exists()
    (world / "state-north" / "ledger.db").unlink()
    lost = run("ledger", "site-north.toml")
    assert lost.exit_code == 4 and "--restore" in lost.output
    back = run("ledger", "site-north.toml", "--restore", "--from", world / "copy")
    assert back.exit_code == 0, back.output
    spent = [charge.steps for charge in Ledger(world / "state-north").charges("records")]
    assert sum(spent) >= 3


def test_withdraw_asks_without_showing_and_says_what_cannot_be_undone(world: Path) -> None:
    from typer.testing import CliRunner

    from fedtune.cli import app

    simulate(world / "study.toml", sites_in(world), world / "run")
    seen = CliRunner().invoke(app, ["withdraw", "site-north.toml"], input="patient-3\nnobody\n")
    assert seen.exit_code == 0, seen.output
    assert "2 records are still in" in seen.output and "3 updates were sent" in seen.output
    assert "no study was ever prepared with this patient" in seen.output
    assert "patient-3" not in seen.output and "nobody" not in seen.output
    assert len(Ledger(world / "state-north").withdrawn()) == 2


def test_doctor_compares_counts_and_runs_the_self_test(world: Path) -> None:
    good = run("doctor", "site-north.toml", "--study", "study.toml")
    assert good.exit_code == 0, good.output
    for words in ("12 patients; declared_size = 20", "self-test: noise", "ε = "):
        assert words in good.output
    rows = (json.dumps(row) + "\n" for row in patients(3))
    (world / "north.jsonl").write_text("".join(rows))
    bad = run("doctor", "site-north.toml")
    assert bad.exit_code == 2 and "within a factor of two" in bad.output
