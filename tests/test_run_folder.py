"""A finished study is known again by its plan, whatever digests were pinned when it started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedtune.accounting.rounds import with_rounds
from fedtune.core.config import Study, load_study
from fedtune.core.errors import InputError
from fedtune.core.run_folder import FILED, PLACES, SIGNATURE, load_plan, write_plan
from fedtune.runs import choice
from fedtune.runs.choice import already_done, finished_line, folder_for, is_finished
from tests.server.fakes import make_study

DIGEST = "sha256:" + "5d" * 32


def finished(run: Path, plan: Study, rounds: int = 2) -> Path:
    run.mkdir(parents=True)
    (run / "plan.json").write_text(plan.model_dump_json())
    body = {"private": True, "study": "tiny", "privacy": {"epsilon": 7.98761}}
    (run / "report.json").write_text(json.dumps(body | {"rounds": [{}] * rounds}))
    (run / SIGNATURE).touch()
    return run


@pytest.mark.parametrize(
    "pinned",
    [
        {"base": {"digest": DIGEST}},
        {"base": {"digest": DIGEST}, "lora": {"a_digest": DIGEST}},
        {"base": {"digest": DIGEST}, "lora": {"preconditioner": {"digest": DIGEST}}},
    ],
)
def test_pinned_digests_make_no_other_study(study: Path, pinned: dict[str, object]) -> None:
    text = study.read_text()
    if "preconditioner" in str(pinned):
        text = text.replace("[objective]", "[lora.preconditioner]\nrank = 2\n[objective]")
        public = '[public]\nlicence = "own"\npath = "evaluation.jsonl"\n'
        text = text.replace("[clipping]", f"{public}[clipping]")
        text += '[public.columns]\nprompt = "prompt"\ncompletion = "completion"\n'
        study.write_text(text)
    mine = load_study(study)
    run = finished(Path("runs/tiny"), with_rounds(mine.changed(**pinned)))
    assert is_finished(run, mine)
    other = load_study(study, settings=["training.learning_rate=0.3"])
    assert not is_finished(run, other)
    pinned_otherwise = mine.changed(base={"digest": "sha256:" + "0" * 64})
    assert not is_finished(run, pinned_otherwise), "a base that a person pinned is another study"


def test_what_is_done_is_said_with_an_epsilon_that_is_rounded_up(study: Path) -> None:
    mine = load_study(study)
    run = finished(Path("runs/tiny"), with_rounds(mine))
    assert already_done(mine, None, resume=False) == run
    line = finished_line(run)
    assert line.startswith(f"finished: {run}, ε = 7.988, 20") and "--out OTHER" in line
    assert already_done(mine, None, resume=True) == already_done(mine, run, resume=False) == run
    assert already_done(mine, Path("runs/other"), resume=False) is None


def test_an_unfinished_run_is_not_done(study: Path) -> None:
    """Also one that a crash or a full disk ended after its report: only --resume signs it."""
    mine = load_study(study)
    run = finished(Path("runs/tiny"), with_rounds(mine))
    (run / SIGNATURE).unlink()
    assert already_done(mine, None, resume=False) is None
    assert already_done(mine, run, resume=True) is None


def test_a_plan_that_others_read_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    run, columns = tmp_path / "run", {"prompt": "q", "completion": "a"}
    files = {name: {"path": str(tmp_path / f"{name}.csv"), "columns": columns} for name in FILED}
    files["public"] |= {"licence": "CC0"}
    study = make_study().changed(**files, training={"rounds": 1})
    write_plan(run, study)
    assert str(tmp_path) not in (run / "plan.json").read_text()
    loaded = load_plan(run)
    assert loaded == study and loaded.digest == study.digest
    moved = run.rename(tmp_path / "moved")
    assert load_plan(moved) == study
    copy = Path(shutil.copytree(moved, tmp_path / "copy"))  # for somebody else, with the note
    for left in (copy / PLACES, None):
        elsewhere = load_plan(copy)  # no file of theirs is taken for it
        assert elsewhere.digest == study.digest
        assert elsewhere.public and elsewhere.public.path == copy / "public.csv"
        if left:
            left.unlink()


def test_a_run_that_was_handed_over_with_a_link_reads_no_file_behind_it(tmp_path: Path) -> None:
    run = tmp_path / "received"
    run.mkdir()
    (tmp_path / "records.csv").write_text("q,a\nMrs Smith,cough\n")
    (run / "records.csv").symlink_to(tmp_path / "records.csv")
    table = {"path": "records.csv", "columns": {"prompt": "q", "completion": "a"}, "metric": "loss"}
    study = make_study().changed(evaluation=table, training={"rounds": 1})
    (run / "plan.json").write_text(study.model_dump_json())
    with pytest.raises(InputError, match="a link"):
        load_plan(run)


@pytest.mark.parametrize("named", ["{}/records.csv", "../../records.csv", "records.csv"])
def test_a_plan_that_was_handed_over_makes_nobody_read_a_file_outside_the_run(
    tmp_path: Path, named: str
) -> None:
    """Of an absolute path and of one that leaves the run, the name alone counts."""
    run, columns = tmp_path / "received" / "run", {"prompt": "q", "completion": "a"}
    run.mkdir(parents=True)
    (tmp_path / "records.csv").write_text("q,a\nMrs Smith,cough\n")
    table = {"path": named.format(tmp_path), "columns": columns, "metric": "loss"}
    study = make_study().changed(evaluation=table, training={"rounds": 1})
    (run / "plan.json").write_text(study.model_dump_json())
    loaded = load_plan(run)
    assert loaded.evaluation and loaded.evaluation.path == run / "records.csv"


def begun(run: Path, name: str) -> Path:
    (run / "checkpoint").mkdir(parents=True)
    (run / "plan.json").write_text(make_study().changed(study={"name": name}).model_dump_json())
    return run


def _check_that_each_name_has_its_own(runs: Path) -> None:
    mine, theirs = begun(runs / "a", "a"), begun(runs / "a-2", "a-2")
    assert folder_for("a", resume=True, runs=runs) == mine
    assert folder_for("a", resume=False, runs=runs) == runs / "a-3"
    assert folder_for("a-2", resume=True, runs=runs) == theirs
    begun(runs / "a-3", "a")
    assert folder_for("a", resume=True, runs=runs) == runs / "a-3"


def test_a_name_that_ends_in_a_number_has_a_folder_of_its_own(tmp_path: Path) -> None:
    _check_that_each_name_has_its_own(tmp_path)


def test_without_a_look_at_the_plan_another_study_would_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_is_of_another", lambda run, name: False)
    with pytest.raises(AssertionError):
        _check_that_each_name_has_its_own(tmp_path)


def test_studies_of_one_command_choose_no_folder_twice(tmp_path: Path) -> None:
    """The first has chosen a folder, and written nothing to it yet."""
    begun(tmp_path / "a", "a")
    taken = [folder_for("a", resume=False, runs=tmp_path)]
    assert taken == [tmp_path / "a-2"]
    for resume in (True, False):
        chosen = folder_for("a-2", resume=resume, runs=tmp_path, taken=taken)
        assert chosen == tmp_path / "a-2-2"
    begun(tmp_path / "a-2", "a")
    assert folder_for("a", resume=True, runs=tmp_path) == tmp_path / "a-2"
    assert folder_for("a-2", resume=True, runs=tmp_path) == tmp_path / "a-2-2"
