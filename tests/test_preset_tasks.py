"""`fedtune init --task` of every task: its files load, and a tiny run of them trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.console import uses_of
from fedtune.cli.main import app
from fedtune.core.config import load_site, load_study
from fedtune.core.dp.accountant import epsilon
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.errors import ConfigError, DataError
from fedtune.evaluation.selection import check_apart
from fedtune.officer.site_files import load_sites
from fedtune.presets import TASKS, Records, write
from fedtune.presets._sites import EPSILON
from tests import media
from tests.depth import long_but
from tests.simulated import simulate

ADAPTED = [task for task in TASKS if task != "classify"]
WORDS = ("yes", "no")


def row(task: str, n: int, folder: Path) -> dict[str, Any]:
    """A record of patient n, with an answer in two lines or one of a few words."""
    said = {"patient": f"p{n}"}
    if task == "vision":
        made = media.image(folder / f"{n}.png", n)
        return said | {"image": made, "question": f"Is it {n}?", "answer": WORDS[n % 2]}
    if task == "speech":
        return said | {"audio": media.recording(folder / f"{n}.wav", n), "text": WORDS[n % 2]}
    names = [name for _, name in TASKS[task].COLUMNS.values()]
    return said | {name: f"{name} {n},\nand {n % 7}" for name in names}


def table(task: str, path: Path, first: int, rows: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [row(task, n, path.parent) for n in range(first, first + rows)]
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return path


def records(task: str, folder: Path, **changes: object) -> Records:
    given = {
        "patient": "patient",
        "data": (
            table(task, folder / "north" / "n.jsonl", 0, 10),
            table(task, folder / "south" / "s.jsonl", 10, 10),
        ),
        "evaluation": table(task, folder / "open" / "public.jsonl", 20, 44),
        "size": 10,
    }
    return Records(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [10, 50, 200, 1000])
@pytest.mark.parametrize("task", ["answer", "classify"])
def test_a_budget_has_room_for_the_study_twice(tmp_path: Path, task: str, size: int) -> None:
    """For a round that a crash repeats, or for a second study. Twin: three times do not fit."""
    study = load_study(write(tmp_path / "own", task, records(task, tmp_path, size=size))[0])
    policy, plan = load_sites(tmp_path / "own" / "sites")[0].policy, plan_for_site(study, size)
    costs = [epsilon(plan.events(plan.steps) * times, plan.delta) for times in (1, 2, 3)]
    assert costs[0] <= EPSILON and costs[1] <= policy.max_epsilon < costs[2]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A tiny base of the kind that a task needs."""
    made = {"vision": media.idefics3, "speech": media.whisper}

    def of(task: str) -> Path:
        return made[task](tmp_path / "base") if task in made else tiny_base

    return of


TRAINED = [task for task in ADAPTED if task != "answer"]


# Images: by default a whole study on them is one of tests/test_media_runs.py.
@pytest.mark.parametrize("task", long_but({*TRAINED} - {"vision", "speech"}, TRAINED))
def test_a_tiny_run_of_it_trains(
    task: str, base: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = records(task, tmp_path, base=str(base(task)))
    paths = write(tmp_path / "own", task, own)
    study = load_study(paths[0])
    check_apart(study)
    monkeypatch.chdir(tmp_path)
    report = simulate(paths[0], [p for p in paths if p.name == "site.toml"], tmp_path / "run")
    assert report["privacy"]["epsilon"] <= EPSILON
    assert len(report["rounds"]) == 1 and report["quality"]["selection"]
    # What is offered next works for such a run.
    offered = [line.split()[1] for line, _ in uses_of(tmp_path / "run")]
    assert study.evaluation
    text = ["predict" if study.evaluation.choices else "generate", "evaluate"]
    assert offered == (text if task in ("vision", "speech") else [*text, "export"])


@pytest.mark.parametrize("task", ADAPTED)
def test_it_loads_without_an_edit(task: str, tmp_path: Path) -> None:
    study = load_study(write(tmp_path / "own", task, records(task, tmp_path, size=200))[0])
    assert study.lora and study.lora.a_init == "public" and study.start and study.start.steps
    assert study.base.model.startswith("pypi:")
    sites = load_sites(tmp_path / "own" / "sites")
    assert [site.data.columns.patient for site in sites] == ["patient", "patient"]
    # The base and the modules are those that a site of this release allows.
    assert {*study.lora.modules} <= {*sites[0].policy.modules}
    # A round that a crash repeats fits under the ceiling; a third does not.
    assert study.privacy.epsilon <= 7 < sites[0].policy.max_epsilon
    assert plan_for_site(study, 200).noise_multiplier > sites[0].policy.min_noise_multiplier


@pytest.mark.parametrize("task", ["vision", "speech"])
def test_images_and_recordings_come_with_their_records(task: str, tmp_path: Path) -> None:
    study = load_study(write(tmp_path / "own", task, records(task, tmp_path))[0])
    assert study.evaluation and study.evaluation.metric == "accuracy"
    assert {choice.strip() for choice in study.evaluation.choices} == {*WORDS}
    column = TASKS[task].COLUMNS["media"][1]
    for part in (study.public, study.selection, study.evaluation):
        assert part
        for line in part.path.read_text().splitlines():
            name = json.loads(line)[column]
            original = tmp_path / "open" / Path(name).name
            assert (part.path.parent / name).read_bytes() == original.read_bytes()


def test_what_is_said_in_many_ways_is_judged_by_the_loss(tmp_path: Path) -> None:
    """Twin of the accuracy above: no list of choices is made of texts that do not come again."""
    own = records("speech", tmp_path)
    lines = [json.loads(line) for line in own.evaluation.read_text().splitlines()]  # type: ignore
    texts = [line | {"text": f"text {n}"} for n, line in enumerate(lines)]
    own.evaluation.write_text("".join(json.dumps(line) + "\n" for line in texts))  # type: ignore
    study = load_study(write(tmp_path / "own", "speech", own)[0])
    assert study.evaluation and study.evaluation.metric == "loss"


@pytest.mark.parametrize("name", ["../north/0.png", "nowhere.png", "x/../20.png"])
def test_a_file_outside_the_folder_is_not_copied(name: str, tmp_path: Path) -> None:
    own = records("vision", tmp_path)
    with own.evaluation.open("a") as file:  # type: ignore[union-attr]
        file.write(json.dumps({"image": name, "question": "q", "answer": "no"}) + "\n")
    with pytest.raises(DataError, match="does not lie in its folder"):
        write(tmp_path / "own", "vision", own)
    assert not (tmp_path / "own").exists()


def test_a_column_that_a_task_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rejected"):
        write(tmp_path / "own", "answer", Records(rejected="worse"))


def cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def init(folder: Path, own: Records, *words: object, task: str = "instruct") -> Result:
    files = [f"--data={path}" for path in own.data]
    return cli("init", folder, "--task", task, *files, "--evaluation", own.evaluation, *words)


def test_whom_a_study_protects_is_said(tmp_path: Path) -> None:
    own = records("instruct", tmp_path)
    done = init(tmp_path / "a", own)
    assert done.exit_code == 0, done.output
    assert "protected: a record" in done.output and '--patient "patient"' in done.output
    assert "δ: the power of ten at or below 1 / (10 · 200 units)" in done.output
    said = "ε may not hold with at most 1 chance in 10,000 for each record, 1 in 50 for any of 200"
    assert said in done.output
    done = init(tmp_path / "b", own, "--patient", "patient")
    assert done.exit_code == 0 and "protected: a patient" in done.output
    assert "looks like" not in done.output


def test_a_column_that_is_read_is_nobodys_key(tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text('{"dialogue": "a", "label": "x"}\n' * 10)
    words = ("--task", "classify", "--text", "dialogue", "--label", "x", "--label", "y")
    done = cli("init", tmp_path / "a", *words, f"--data={path}")
    assert done.exit_code == 0 and "looks like" not in done.output, done.output


@pytest.mark.parametrize("option", ["--patient", "--text", "--target"])
def test_a_wrong_column_of_a_sites_file_is_an_error_that_lists_them(
    option: str, tmp_path: Path
) -> None:
    own = records("instruct", tmp_path)
    done = init(tmp_path / "a", own, option, "nobody")
    assert done.exit_code == 2 and "'nobody'" in done.stderr and option in done.stderr
    assert all(name in done.stderr for name in ("patient", "instruction", "response"))
    assert not (tmp_path / "a").exists()


def test_a_rehearsal_declares_its_data(tmp_path: Path) -> None:
    own = records("instruct", tmp_path)
    for folder, task in (("a", ("--task", "instruct", "--evaluation", own.evaluation)), ("b", ())):
        files = [f"--data={path}" for path in own.data[:1]]
        words = (*task, *files, "--declared", "generated")
        done = cli("init", tmp_path / folder, *words)
        assert done.exit_code == 0, done.output
        paths = [*(tmp_path / folder).rglob("site.toml")]
        assert [load_site(path).data.declared for path in paths] == ["generated"]


def test_without_a_recipe_a_files_ledger_lies_beside_it_too(tmp_path: Path) -> None:
    own = records("instruct", tmp_path)
    for name in ("a", "b"):
        done = cli("init", tmp_path / name, "--data", own.data[0], "--patient", "patient")
        assert done.exit_code == 0, done.output
    a, b = (load_site(tmp_path / name / "site.toml") for name in ("a", "b"))
    assert a.site.state == b.site.state and own.data[0].parent in a.site.state.parents
    preset = write(tmp_path / "c", "instruct", own)
    assert a.site.state in {load_site(p).site.state for p in preset if p.name == "site.toml"}
    assert a.data.columns.patient == "patient"
    assert load_study(tmp_path / "a" / "study.toml").unit == "patient"


@pytest.mark.parametrize("words", [("--size", "40"), ("--label", "a"), ("--text", "x")])
def test_an_option_of_a_recipe_needs_one(words: tuple[str, ...], tmp_path: Path) -> None:
    done = cli("init", tmp_path / "a", *words)
    assert done.exit_code == 2 and f"{words[0]} without --task" in done.stderr
    assert not (tmp_path / "a").exists()


def test_where_labels_are_named_the_next_step_names_the_column(tmp_path: Path) -> None:
    words = ("--task", "classify", "--label", "a", "--label", "b", "--text", "note")
    done = cli("init", tmp_path / "a", *words)
    assert done.exit_code == 0 and '--column text="note"' in done.output
