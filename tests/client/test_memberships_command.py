"""`fedtune memberships`: a hospital's consortia side by side."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Site, load_site, load_study
from fedtune.core.config.load import load_hospital
from fedtune.core.errors import ConfigError
from fedtune.core.files.locks import hold_if_free
from fedtune.core.files.writing import replace as replace_file
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.processes import alone
from fedtune.core.vault import studies
from fedtune.observe.status import StatusFile
from fedtune.officer import adopt, hospital_file, memberships
from fedtune.officer.review import review
from tests.cli_kit import run
from tests.client.adoption_kit import CHARGE, exact_epsilon, make_site, spend, write_notes


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with two memberships, made by the command alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_notes(tmp_path / "notes.jsonl", ["a", "b", "c"])
    made = run("memberships", "home", "--add", "cardio", "--site", "cardio", "--max-epsilon", 3,
               "--data", "notes.jsonl", "--declared-size", 40, "--name", "st-mary",
               "--patient", "who")  # fmt: skip
    assert made.exit_code == 0, made.output
    file = tmp_path / "cardio" / "site.toml"
    text = file.read_text().replace('prompt = "prompt" ', 'prompt = "note" ', 1)
    file.write_text(text.replace('completion = "completion"', 'completion = "answer"', 1))
    assert run("memberships", "home", "--add", "onco", "--site", "onco").exit_code == 0
    return tmp_path


def pay(world: Path, name: str, rounds: int) -> None:
    site = load_site(world / name / "site.toml")
    book = Ledger(site.home)
    book.declare("records", [])
    for round_ in range(rounds):
        charge = replace(CHARGE, study=f"sha256:{name}", round=round_, membership=name)
        book.reserve("records", charge, "a", lambda charges: None)


def listed(*options: object) -> dict[str, object]:
    said = run("memberships", "home", *options, "--json")
    assert said.exit_code == 0, said.output
    return dict(json.loads(said.stdout))


def test_a_home_and_two_memberships_are_made_whole(world: Path) -> None:
    hospital = load_hospital(world / "home")
    assert hospital.hospital.declared_size == 40 and [*hospital.memberships] == ["cardio", "onco"]
    for name, share in (("cardio", 3.0), ("onco", 8.0)):
        file = world / name / "site.toml"
        assert file.stat().st_mode & 0o777 == 0o600
        site = load_site(file)
        assert site.policy.membership == name and site.policy.max_epsilon == share
        assert site.home == world / "home" and site.site.state == world / name / "state"
        assert site.data.columns.patient == "who"  # onco reads them as cardio does
    assert (world / "home" / "hospital.toml").stat().st_mode & 0o777 == 0o600


def test_a_name_for_which_a_person_signed_is_not_given_again(world: Path) -> None:
    """The signature would admit the plan for the next consortium."""
    Ledger(world / "home").admit("sha256:plan", "ada", "onco")
    assert run("memberships", "home", "--end", "onco", "--yes").exit_code == 0
    again = run("memberships", "home", "--add", "onco", "--site", "again")
    assert again.exit_code != 0 and "no membership ever had" in again.output


def test_both_are_listed_with_what_each_spent_against_the_hospitals_ceiling(world: Path) -> None:
    run("enroll", "cardio/site.toml")
    pay(world, "cardio", 2)
    pay(world, "onco", 3)
    state = world / "onco" / "state"
    state.mkdir(exist_ok=True)
    status = StatusFile(state, role="site")
    status.write()
    (state / studies.FOLDER).mkdir()
    note = {"plan": "sha256:ab", "study": "gait", "since": "2026-01-01T00:00:00Z"}
    (state / studies.FOLDER / "ab.json").write_text(json.dumps(note))
    facts = listed()
    status.close()
    cardio, onco = facts["memberships"]  # type: ignore[misc]
    assert (cardio["runs"], onco["runs"]) == (False, True)
    assert onco["studies"] == {"sha256:ab": "gait"} and cardio["consortium"] is None
    (total,) = facts["datasets"]  # type: ignore[misc]
    charges = Ledger(world / "home").charges("records")
    assert total["epsilon"] >= exact_epsilon(charges, 2e-3) > cardio["share"]["records"]["epsilon"]
    assert [line["membership"] for line in total["memberships"]] == ["cardio", "onco"]
    assert [line["charged"] for line in total["memberships"]] == [2, 3]
    shown = run("memberships", "home").output
    assert "the hospital's policy.max_epsilon" in shown and "under way: gait" in shown


def test_the_ledger_says_who_spent_what_and_what_is_left_of_the_share(world: Path) -> None:
    run("enroll", "cardio/site.toml")
    pay(world, "cardio", 2)
    pay(world, "onco", 3)
    shown = run("ledger", "cardio/site.toml").output
    assert "who spent it" in shown and "share 3:" in shown and "all memberships" in shown
    facts = json.loads(run("ledger", "cardio/site.toml", "--json").stdout)
    assert facts["share"]["ceiling"] == 3.0 and facts["budget"]["ceiling"] == 8.0
    assert {line["membership"] for line in facts["memberships"]} == {"cardio", "onco"}
    assert facts["share"]["epsilon"] < facts["budget"]["epsilon"]


def test_a_review_says_the_share_beside_the_hospitals_ceiling(study: Path) -> None:
    write_notes(study.parent / "notes.jsonl", ["a", "b", "c"])
    made = run("memberships", "home", "--add", "cardio", "--site", "cardio", "--max-epsilon", 3,
               "--data", "notes.jsonl", "--declared-size", 12)  # fmt: skip
    assert made.exit_code == 0, made.output
    site = load_site(study.parent / "cardio" / "site.toml")
    told = review(load_study(study), site, Ledger(site.home))
    costs = " ".join(line for _, lines in told.sections for line in lines)
    assert "all the hospital's memberships together" in costs and "at most 3" in costs


def test_status_and_doctor_of_a_membership_work(world: Path) -> None:
    run("enroll", "cardio/site.toml")
    pay(world, "cardio", 1)
    status = StatusFile(world / "cardio" / "state", role="site")
    status.write()
    assert run("status", "cardio/site.toml", "--once").exit_code == 0
    status.close()
    os.chmod(world / "home" / "hospital.toml", 0o664)
    os.unlink(world / "onco" / "site.toml")
    said = " ".join(run("doctor", "cardio/site.toml").output.split())
    assert "hospital.toml: other users can change it" in said
    assert "onco" in said and "no such file" in said


# -------------------------------------------------------------------------------------- refusals


def test_options_that_do_not_belong_together_are_refused(world: Path) -> None:
    for options, expected in (
        (("--add", "x", "--end", "y"), "only one of the two"),
        (("--site", "x"), "--site is given without --add"),
        (("--add", "x"), "--add is given without --site"),
        (("--adopt", "cardio/site.toml"), "--adopt is given without --name"),
        (("--add", "cardio", "--site", "other"), "has a membership 'cardio' already"),
        (("--add", "third", "--site", "cardio"), "exists"),
        (("--add", "third", "--site", "third", "--dataset", "scans"), "no dataset 'scans'"),
        (("--add", "third", "--site", "third", "--data", "notes.jsonl"), "exists"),
        (("--add", "a b", "--site", "third"), "memberships.a b"),
    ):
        said = run("memberships", "home", *options)
        assert said.exit_code == 2 and expected in " ".join(said.output.split()), said.output
    assert not (world / "third").exists()
    assert [*load_hospital(world / "home").memberships] == ["cardio", "onco"]
    nowhere = run("memberships", "nowhere", "--add", "a", "--site", "a")
    assert nowhere.exit_code == 2 and "--declared-size" in nowhere.output


def test_an_add_that_was_killed_between_its_files_is_finished(world: Path) -> None:
    (world / "onco" / "site.toml").unlink()
    facts = listed()
    assert "no such file" in facts["memberships"][1]["problem"]  # type: ignore[index]
    assert run("memberships", "home", "--add", "onco", "--site", "onco").exit_code == 0
    assert load_site(world / "onco" / "site.toml").policy.membership == "onco"


# ------------------------------------------------------------------------------------------- end


def test_an_ended_membership_keeps_what_it_spent_and_loses_its_way_in(world: Path) -> None:
    run("enroll", "onco/site.toml")
    pay(world, "onco", 3)
    hospital = world / "home" / "hospital.toml"
    hospital.write_text(hospital.read_text() + "# a person's last word\n")
    keys = world / "onco" / "state" / "keys"
    assert (keys / "tls.key").exists()
    said = run("memberships", "home", "--end", "onco", "--yes")
    assert said.exit_code == 0, said.output
    assert "stays for good" in said.output and "1 studies, ε = " in said.output
    assert not keys.exists() and (world / "onco" / "state" / "site.key").exists()
    assert [*load_hospital(world / "home").memberships] == ["cardio"]
    assert list((world / "home").glob("hospital.toml.before-*"))
    book = Ledger(world / "home")
    assert len(book.charges("records")) == 3
    events = [e["event"] for e in audit_log.verify(book.folder, book.key.public).entries]
    assert events[-2:] == ["leave", "purge"]
    with pytest.raises(ConfigError, match="has no membership 'onco'"):
        load_site(world / "onco" / "site.toml")
    (total,) = listed()["datasets"]  # type: ignore[misc]
    assert [line["membership"] for line in total["memberships"]] == ["onco"]


def test_a_change_of_the_hospitals_file_while_a_membership_ends_stays(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are deleted for seconds, while a person lowers a ceiling and adds a membership."""
    run("enroll", "onco/site.toml")
    file, delete = world / "home" / "hospital.toml", memberships.delete_keys

    def meanwhile(site: Site) -> None:
        delete(site)
        file.write_text(file.read_text().replace("max_epsilon = 8.0", "max_epsilon = 2.0", 1))
        assert run("memberships", "home", "--add", "neuro", "--site", "neuro").exit_code == 0

    monkeypatch.setattr(memberships, "delete_keys", meanwhile)
    assert run("memberships", "home", "--end", "onco", "--yes").exit_code == 0
    hospital = load_hospital(world / "home")
    assert [*hospital.memberships] == ["cardio", "neuro"] and hospital.policy.max_epsilon == 2.0


def test_hospital_toml_is_replaced_under_its_lock_alone(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin of the lock: of two commands at once, none reads what the other one is replacing."""
    file, seen = world / "home" / "hospital.toml", list[bool]()

    def looks(path: Path, *content: Any, **options: Any) -> Path:
        if path.resolve() == file:
            with hold_if_free(file.with_name(memberships.EDIT_LOCK)) as free:
                seen.append(free)
        return replace_file(path, *content, **options)

    for module in (memberships, adopt):
        monkeypatch.setattr(module, "replace", looks)
    assert run("memberships", "home", "--add", "neuro", "--site", "neuro").exit_code == 0
    assert run("memberships", "home", "--end", "neuro", "--yes").exit_code == 0
    write_notes(world / "gait.jsonl", ["x", "y", "z"])
    spend(make_site(world, "gait", path="gait.jsonl", dataset="gait"), 1)
    assert run("memberships", "home", "--adopt", "gait.toml", "--name", "gait").exit_code == 0
    assert seen == [False, False, False]


def test_an_end_is_refused_while_its_client_runs_or_a_study_is_under_way(world: Path) -> None:
    run("enroll", "onco/site.toml")
    state = world / "onco" / "state"
    with alone(state / "flower", "fedtune client"):
        said = run("memberships", "home", "--end", "onco", "--yes", "--anyway")
        assert said.exit_code == 4 and "runs" in said.output
    (state / studies.FOLDER).mkdir()
    note = {"plan": "sha256:ab", "study": "gait", "since": "2026-01-01T00:00:00Z"}
    (state / studies.FOLDER / "ab.json").write_text(json.dumps(note))
    said = run("memberships", "home", "--end", "onco", "--yes")
    assert said.exit_code == 2 and "under way: gait" in said.output
    assert "onco" in load_hospital(world / "home").memberships
    assert run("memberships", "home", "--end", "onco", "--yes", "--anyway").exit_code == 0


def test_nothing_ends_without_a_yes(world: Path) -> None:
    assert run("memberships", "home", "--end", "onco").exit_code != 0
    assert "onco" in load_hospital(world / "home").memberships


# ------------------------------------------------------------------------------------------ files


def test_edits_leave_a_persons_comments_and_other_tables_alone() -> None:
    text = (
        "# first\n[memberships.a]\nsite = 'a' # of a\n\n# of b\n[memberships.\"b.c\"]\n"
        "site = 'b'\nlist = [\n  'x',\n]\n[other]\nname = 1\n"
    )
    assert hospital_file.without_table(text, "memberships", "a") == (
        "# first\n\n# of b\n[memberships.\"b.c\"]\nsite = 'b'\nlist = [\n  'x',\n]\n"
        "[other]\nname = 1\n"
    )
    assert "# of b\n[other]" in hospital_file.without_table(text, "memberships", "b.c")
    assert hospital_file.with_key(text, "other", "name", "n") == text.replace(
        "name = 1", 'name = "n"'
    )
    shorter = "[data]\npath = 'x'\nlist = [\n  'x',\n]\n"
    assert hospital_file.with_key(shorter, "data", "list", None) == "[data]\npath = 'x'\n"
    assert hospital_file.with_key(shorter, "data", "name", "n").startswith('[data]\nname = "n"\n')
    with pytest.raises(ConfigError, match="not written as a table"):
        hospital_file.without_table("memberships = { a = { site = 'a' } }\n", "memberships", "a")
