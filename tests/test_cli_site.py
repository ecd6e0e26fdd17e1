"""The commands of the person who answers for a site's data, as they are typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.core.config import Study, load_site
from fedtune.core.config.patient_columns import patient_columns
from fedtune.core.data.records import unit_member
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.training import selftest
from fedtune.officer.site_files import sites_in
from tests.cli_kit import at_a_terminal
from tests.guarantee.world import lay_out, patients
from tests.simulated import simulate
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
    assert "sha256:" not in seen.output and "signed by" not in seen.output
    signed = run("review", "study.toml", "--site", site, "--sign")
    assert "sha256:" in signed.output and "signed by" in signed.output
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


FOUND: dict[str, list[selftest.Result]] = {}


@pytest.fixture
def tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test of a study runs once, whoever asks for it; that `doctor` runs it is tested
    below."""
    honest = selftest.run

    def run(study: Study, *rest: Any) -> list[selftest.Result]:
        key = f"{study.model_dump_json()} {rest[1:]}"
        if key not in FOUND:
            FOUND[key] = honest(study, *rest)
        return FOUND[key]

    monkeypatch.setattr(selftest, "run", run)


@pytest.mark.usefixtures("tested_once")
def test_doctor_says_no_where_review_says_no(world: Path) -> None:
    """The same question: rules, ceilings with what was spent before, and the signature."""
    site, plan = world / "site-north.toml", ("--study", "study.toml")
    rules = site.read_text()
    site.write_text(rules + "max_epsilon = 5.0\n")
    assert run("doctor", site, *plan).exit_code == 0
    simulate(world / "study.toml", sites_in(world), world / "run")
    study = world / "study.toml"
    study.write_text(study.read_text().replace("learning_rate = 0.5", "learning_rate = 0.4"))
    refused = run("review", "study.toml", "--site", site)
    assert "This site refuses it" in refused.output and "policy.max_epsilon" in refused.output
    seen = run("doctor", site, *plan)
    assert seen.exit_code == 2 and "BAD  plan: the study would take this dataset" in seen.output
    site.write_text(rules + 'max_epsilon = 40.0\nadmission = "signed"\n')
    waits = run("doctor", site, *plan)
    assert waits.exit_code == 2 and "nobody has signed this plan" in waits.output
    review = run("review", "study.toml", "--site", site, "--sign")
    assert "as soon as somebody signs" in review.output and "signed by" in review.output
    assert run("doctor", site, *plan).exit_code == 0


@pytest.mark.usefixtures("tested_once")
def test_doctor_begins_no_ledger(world: Path) -> None:
    assert run("doctor", "site-north.toml", "--study", "study.toml").exit_code == 0
    assert not (world / "state-north").exists()


def test_review_counts_a_study_once_and_says_when_every_round_is_paid_for(world: Path) -> None:
    before = run("review", "study.toml", "--site", "site-north.toml")
    assert "This site would take part" in before.output
    simulate(world / "study.toml", sites_in(world), world / "run")
    after = run("review", "study.toml", "--site", "site-north.toml")
    said = " ".join(after.output.split())
    assert "Every round of this study is paid for here" in said
    assert "a round that the coordinator orders on another adapter is trained and paid" in said
    (line,) = [line for line in after.output.splitlines() if "so far" in line]
    so_far, with_it = re.findall(r"([\d.]+) (?:so far|with this study)", line)
    assert so_far == with_it


def test_review_signs_what_is_refused_only_where_told(world: Path) -> None:
    site = world / "site-north.toml"
    site.write_text(site.read_text() + "max_rank = 2\n")
    asked = ("review", "study.toml", "--site", site, "--sign")
    assert run(*asked).exit_code == 3 and not Ledger(world / "state-north")._account.admitted
    signed = run(*asked, "--anyway")
    assert signed.exit_code == 0 and "This site refuses it" in signed.output
    assert Ledger(world / "state-north")._account.admitted


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
    asked = at_a_terminal("ledger", "site-north.toml", "--restore", typed="n\n")
    assert asked.exit_code == 2 and "perhaps all that is left of the budget" in asked.output
    assert not (world / "state-north" / "ledger.db").exists()
    back = run("ledger", "site-north.toml", "--restore", "--from", world / "copy")
    assert back.exit_code == 0, back.output
    spent = [charge.steps for charge in Ledger(world / "state-north").charges("records")]
    assert sum(spent) >= 3


def withdraw(keys: str, *more: str) -> Result:
    return CliRunner().invoke(app, ["withdraw", "site-north.toml", *more], input=keys)


def test_withdraw_asks_without_showing_and_says_what_cannot_be_undone(world: Path) -> None:
    simulate(world / "study.toml", sites_in(world), world / "run")
    seen = withdraw("patient-3\n")
    assert seen.exit_code == 0, seen.output
    assert "2 records are still in" in seen.output and "3 updates were sent" in seen.output
    assert "patient-3" not in seen.output
    assert len(Ledger(world / "state-north").withdrawn()) == 1


def test_withdraw_of_a_key_that_nothing_here_has_is_an_error(world: Path) -> None:
    """A typing error must not pass for a withdrawal: the patient would stay in."""
    seen = withdraw("patient-03\npatient-3\n")
    assert seen.exit_code == 2, seen.output
    assert "patient 1: NOT KNOWN HERE" in seen.output and "patient 2: left out" in seen.output
    assert "1 of 2 keys is not known" in seen.stderr
    assert "patient-" not in seen.output
    state = world / "state-north"
    assert len(Ledger(state).withdrawn()) == 1
    later = withdraw("patient-03\n", "--unseen")
    assert later.exit_code == 0 and len(Ledger(state).withdrawn()) == 2, later.output
    assert "no study was ever prepared with this patient" in later.output


def test_withdraw_of_a_patient_who_was_trained_on_and_is_in_no_file(world: Path) -> None:
    """The ledger knows members by salted hash, also of records that are gone or unreadable."""
    simulate(world / "study.toml", sites_in(world), world / "run")
    (world / "north.jsonl").unlink()
    seen = withdraw("patient-3\n")
    assert seen.exit_code == 0 and "cannot be read" in seen.output, seen.output
    lost = withdraw("patient-03\n")
    assert lost.exit_code == 2 and "no such file" in lost.output, lost.output


@pytest.mark.parametrize("keys", ["", "\n \n"])
def test_withdraw_of_nobody_is_an_error(world: Path, keys: str) -> None:
    seen = withdraw(keys)
    assert seen.exit_code == 2 and "nobody was left out" in seen.stderr, seen.output


def test_doctor_compares_counts_and_runs_the_self_test(world: Path) -> None:
    good = run("doctor", "site-north.toml", "--study", "study.toml")
    assert good.exit_code == 0, good.output
    for words in ("12 patients; declared_size = 20", "self-test: noise", "ε = "):
        assert words in good.output
    rows = (json.dumps(row) + "\n" for row in patients(3))
    (world / "north.jsonl").write_text("".join(rows))
    bad = run("doctor", "site-north.toml")
    assert bad.exit_code == 2 and "within a factor of two" in bad.output


def test_a_cost_that_nobody_knows_is_accepted_by_name_and_only_where_there_is_one(
    world: Path,
) -> None:
    book = Ledger(world / "state-north")
    book.declare("records", [])
    one = Charge("sha256:" + "5" * 64, "old", 1, 2.0, 0.1, 1, 1, 1.0, "patient", "first", rules=1)
    book.reserve("records", one, "adapter", lambda charges: None)
    shown = run("ledger", "site-north.toml")
    assert "charged by an earlier release" in " ".join(shown.output.split())
    reviewed = run("review", "study.toml", "--site", "site-north.toml")
    assert "for one patient: an earlier release charged them" in " ".join(reviewed.output.split())
    accept = ("ledger", "site-north.toml", "--accept", "records", "--reason", "generated data")
    done = run(*accept)
    assert done.exit_code == 0 and "generated data" in " ".join(done.output.split())
    columns = patient_columns(load_site(world / "site-north.toml"))
    assert Ledger(world / "state-north").unknown("records", "patient", columns) == []
    assert run(*accept).exit_code == 2


def test_doctor_shows_what_only_a_person_can_judge(world: Path) -> None:
    note = "no acute findings; discharged home in good health"
    rows = [{"who": f"p{n}", "q": note, "a": "y"} for n in range(12)]
    lay_out(world, world / "base", rows)
    book = Ledger(world / "state-north")
    members = [unit_member("p0"), b"text\0" + note.encode()]
    book.declare("records", ["scans"], "sha256:0", members)
    book.declare("scans", [], "sha256:1", members[1:])
    said = " ".join(run("doctor", "site-north.toml").output.split())
    assert "records and scans are declared disjoint and share 1 patients" in said
    assert "11 of 11 new patients have a text of 40 characters or more" in said
    assert note not in said
