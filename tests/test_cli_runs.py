"""A study from `init` to `generate`, and what is shown meanwhile."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.cli import watch as watch_module
from fedtune.cli.watch import Watch
from fedtune.core import progress
from fedtune.core.config import load_study
from fedtune.core.errors import ConfigError
from fedtune.core.registry import process_cache
from fedtune.demo import run as demo
from fedtune.launch import simulate
from fedtune.runs.choice import beginning
from tests.cli_kit import SITE, STUDY, run


def test_a_study_from_simulate_to_generate(study: Path) -> None:
    found = run("simulate", study)
    assert found.exit_code == 0, found.output + found.stderr
    folder = Path("runs/tiny")
    assert "2/2" in found.output and "ε = " in found.output and "NOT PRIVATE" not in found.output
    assert str(folder / "report.md") in found.output and "next" in found.output
    body = json.loads((folder / "report.json").read_text())
    assert body["adapter"]["engine"] == "one-pass"
    assert body["private"] and body["privacy"]["epsilon"] <= 8
    assert {len(row["epsilon"]) for row in body["rounds"]} == {2}
    again = run("simulate", study, "--out", folder)
    assert again.exit_code == 0 and "finished: runs/tiny" in again.stdout
    other = run("simulate", study, "--out", folder, "--set", "training.rounds=3")
    assert other.exit_code == 2 and "a run is already there" in other.stderr

    measured = run("evaluate", folder, "--data", "evaluation.jsonl", "--metric", "loss")
    assert measured.exit_code == 0 and "12 records" in measured.output
    wrong = run("evaluate", folder, "--data", "evaluation.jsonl", "--column", "prompts=prompt")
    assert wrong.exit_code == 2 and "no such part of a record" in wrong.stderr
    wrote = run("generate", folder, "--prompt", "Record 3: is it so?", "--max-new-tokens", 4)
    assert wrote.exit_code == 0 and "with the adapter" in wrote.output


def test_sites_that_refuse_are_exit_code_3(study: Path) -> None:
    for name in ("north", "south"):
        (study.parent / name / "site.toml").write_text(SITE.format(name=name, most=1, off="false"))
    found = run("simulate", study)
    assert found.exit_code == 3 and "max_epsilon" in found.stderr


def test_a_refused_run_leaves_no_folder_and_says_why_once(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (study.parent / "north" / "site.toml").write_text(
        SITE.format(name="north", most=1, off="false")
    )
    study.write_text(study.read_text() + "[strategy]\nmin_sites = 2\n")
    found = run("simulate", study, "--out", "refused")
    assert found.exit_code == 3, found.output
    assert not Path("refused").exists() and not Path("runs").exists()
    why = "the study would take this dataset past policy.max_epsilon"
    said = " ".join((found.stdout + found.stderr + caplog.text).split())
    assert said.count(why) == 1, said
    line, *notes = found.stderr.splitlines()
    assert why in line and all(note.startswith("  ") for note in notes)


def test_what_became_of_a_sites_rows_is_said_once(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (study.parent / "north" / "data.jsonl").open("a") as file:
        file.write('\n{"prompt": "Is it so?"}')
    found = run("simulate", study)
    said = " ".join((found.stdout + found.stderr + caplog.text).split())
    assert found.exit_code == 0 and said.count("12 of 13 rows train") == 1, said


def test_a_run_that_is_not_finished_is_named_where_another_begins(study: Path) -> None:
    (Path("runs/tiny") / "checkpoint").mkdir(parents=True)  # as Ctrl-C leaves it
    found = run("simulate", study)
    assert found.stdout.startswith("runs/tiny is not finished: --resume goes on with it."), found
    assert "another run, in runs/tiny-2" in found.stdout and Path("runs/tiny-2").is_dir()
    told = beginning(load_study(study), Path("runs/tiny-2"), resume=True)
    assert told == "going on with runs/tiny-2"
    assert beginning(load_study(study), Path("runs/tiny-3"), resume=False) == ""  # tiny-2 is done


def test_a_study_that_is_finished_is_not_run_again_by_the_same_command(study: Path) -> None:
    """What it would meet is the ceiling that the first run came up to."""
    assert run("simulate", study).exit_code == 0
    spent = (study.parent / "north" / "state" / "ledger.head").read_bytes()
    again = run("simulate", study)
    assert again.exit_code == 0 and again.stdout.startswith("finished: runs/tiny, ε = ")
    assert "--resume has nothing left to do" in again.stdout
    assert "ceiling" not in again.output and not Path("runs/tiny-2").exists()
    assert run("server", study.name).output == again.output
    for more in (("--resume",), ("--out", "runs/tiny"), ("--out", "runs/tiny", "--resume")):
        assert run("simulate", study, *more).output == again.output
    assert (study.parent / "north" / "state" / "ledger.head").read_bytes() == spent
    process_cache.clear("workers")  # as another process would begin
    named = run("simulate", study, "--out", "again")
    assert named.exit_code == 0, named.stderr  # what was sent is sent again
    study.write_text(study.read_text().replace("learning_rate = 0.1", "learning_rate = 0.2"))
    process_cache.clear("workers")
    other = run("simulate", study)
    assert other.exit_code == 3 and "is finished" not in other.stderr, other.output


def test_the_demo_can_be_watched_and_says_what_it_does_in_a_pipe(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other hospitals, of two rounds: the demo's own fetch a base and take minutes."""
    states: list[str] = []

    def write(folder: Path, seed: int = 0) -> Path:
        states.append(run("status", "runs/demo", "--once").output)
        for name in ("north", "south", "west"):
            home = folder / "sites" / name
            home.mkdir(parents=True)
            (home / "site.toml").write_text(SITE.format(name=name, most=8, off="false"))
            (home / "data.jsonl").write_bytes((study.parent / "north/data.jsonl").read_bytes())
        (folder / "evaluation.jsonl").write_bytes((study.parent / "evaluation.jsonl").read_bytes())
        path = folder / "study.toml"
        path.write_text(study.read_text() + "[strategy]\nmin_sites = 3\n")
        return path

    def alone(*given: Any) -> float:
        states.append(run("status", "runs/demo", "--once").output)
        return one(*given)

    one = demo._run_alone
    monkeypatch.setattr(demo, "write", write)
    monkeypatch.setattr(demo, "_run_alone", alone)
    found = run("demo")
    assert found.exit_code == 0, found.output
    lines = found.stdout.splitlines()
    assert lines[:2] == ["preparing", "inventing three hospitals"]
    assert any("north alone, for comparison" in line for line in lines)
    before, *during = (state.split("\n")[0] for state in states)
    assert "waiting" in before and len(during) == 3
    assert all("running" in state and "round 2/2" in state for state in during)
    after = run("status", "runs/demo", "--once").output
    assert after.startswith("tiny  done  round 2/2"), after
    assert len(Path("runs/demo/log.jsonl").read_text().splitlines()) > 3


def test_privacy_off_is_said_in_red_before_and_after(study: Path, tiny_base: Path) -> None:
    text = STUDY.format(base=tiny_base, privacy="", privacy_off='privacy = "off"')
    study.write_text(text)
    assert run("simulate", study, "--out", "refused").exit_code == 3
    willing: list[object] = []
    for name in ("north", "south"):
        path = study.parent / name / "willing.toml"
        path.write_text(SITE.format(name=name, most=8, off="true"))
        willing.append(path)
    found = run("simulate", study, "--sites", *willing)  # as a shell fills in */willing.toml
    assert found.exit_code == 0, found.stderr
    assert found.output.count("NOT PRIVATE") == 2
    assert "NOT PRIVATE" in run("plan", study).output


@pytest.fixture
def watched() -> tuple[Watch, Callable[[], str]]:
    from rich.console import Console

    console = Console(record=True, width=100, file=io.StringIO())
    return Watch(console, "x"), console.export_text


def test_events_from_sites_are_shown_as_plain_text(
    watched: tuple[Watch, Callable[[], str]],
) -> None:
    watch, text = watched
    with watch:
        watch("start", {"rounds": 3})
        watch("cache", {"text": "reading [red]x[/red]", "done": 3, "total": 9})
        watch("site", {"name": "a[b]", "status": "refused", "reason": "no\n[/red] more"})
        watch("site", {"name": "c", "status": "trained", "reason": ""})
        spent = {"a": 1.2341, "b": 0.5}
        quality = {"loss": float("nan")}
        watch("round", {"round": 1, "rounds": 3, "quality": quality, "epsilon": spent,
                        "participants": ["a", "b"], "bytes": 1_500_000})  # fmt: skip
        watch("round", {"round": 2, "rounds": 3})
        watch("done", {})
    shown = text()
    assert "a[b]: refused: no [/red] more" in shown
    assert "1.235" in shown and "1.5 MB" in shown and "nan" in shown


def test_each_figure_of_a_round_stands_under_its_name(
    watched: tuple[Watch, Callable[[], str]],
) -> None:
    """Also where every second round is measured, and where there are more than fit a line."""
    watch, text = watched
    with watch:
        for number in (1, 2, 3):
            quality = (
                {"preference": 0.5, "loss": 0.7, "margin": 1.0, "kl": 2.0} if number == 2 else {}
            )
            watch(
                "round", {"round": number, "rounds": 3, "quality": quality, "epsilon": {"a": 1.5}}
            )
    lines = [line for line in text().splitlines() if "/3" in line or "round" in line]
    first, _, second, measured, after = lines
    assert "loss" not in first and second.split()[:4] == ["round", "preference", "loss", "ε"]
    for name, value in (("preference", "0.5"), ("loss", "0.7"), ("ε", "1.5")):
        end = second.index(name) + len(name)
        assert measured[:end].endswith(value), name
    assert after.split()[1:4] == ["–", "–", "1.5"] and max(map(len, lines)) <= 80


def test_a_pipe_gets_each_step_as_a_line_once(
    watched: tuple[Watch, Callable[[], str]],
) -> None:
    watch, text = watched
    with watch:
        for done in range(3):
            watch("step", {"text": "reading [b]records", "done": done, "total": 9})
        watch("waiting", {"text": "waiting for the coordinator"})
    lines = [line for line in text().split("\n") if line]
    assert lines == ["x", "reading [b]records 0%", "waiting for the coordinator"]


def test_a_server_says_what_it_waits_for_and_when_it_will_be_done(
    watched: tuple[Watch, Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, text = watched
    now = 1000.0
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now)
    ended = {"rounds": 5, "epsilon": {"a": 0.5}, "participants": ["a"]}
    with watch:
        watch("listening", {"text": "coordinator  at [b]h:1[/b]\nconsortium   ab"})
        watch("start", {"rounds": 5, "done": 1})
        watch("connected", {"name": "a", "text": "a: connected"})
        watch("planned", {"study": "s", "rounds": 5, "participants": ["a"], "planned": {"a": 1.5}})
        now += 900  # the base is measured, which no round does again
        watch("begin", {"round": 2})
        watch("site", {"name": "a", "status": "trained", "round": 2})
        watch("site", {"name": "a", "status": "trained", "round": 2})  # soon after another line
        now += 30
        watch("site", {"name": "b", "status": "trained", "round": 2})
        watch("round", {"round": 2, **ended})
        for number in (3, 4):  # which have no records to read through the frozen layers
            watch("begin", {"round": number})
            now += 5
            watch("round", {"round": number, **ended})
    said = [" ".join(line.split()) for line in text().splitlines() if line.strip()]
    assert said == [
        "x", "coordinator at [b]h:1[/b]", "consortium ab", "a: connected",
        "s: a take part; round 2 of 5 is next; planned: ε = 1.5",
        "round 2: a: trained", "round 2: b: trained",
        "round ε planned trained sent left", "2/5 0.5 1.5 1 0 B",
        "3/5 0.5 1.5 1 0 B 10 s", "4/5 0.5 1.5 1 0 B 5 s",
    ]  # fmt: skip


def test_a_long_step_says_what_it_is_part_of_and_when_it_ends(
    watched: tuple[Watch, Callable[[], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe where no line came for a while, so that rounds of seconds have their rows alone."""
    watch, text = watched
    now = 1000.0
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now)
    with watch:
        with progress.stage("site 1 of 3"), progress.stage("north, round 1"):
            for done in range(1, 21):
                progress.report("training", 5 * done, 100)
                now += 6
        progress.report("measuring", 1, 2)
    assert [line for line in text().splitlines() if line.strip()] == [
        "x",
        "site 1 of 3, north, round 1: training 15%, 2 min left",
        "site 1 of 3, north, round 1: training 40%, 72 s left",
        "site 1 of 3, north, round 1: training 65%, 42 s left",
        "site 1 of 3, north, round 1: training 90%, 12 s left",
        "measuring 50%",
    ]


def test_the_demo_has_a_status_while_it_runs_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def demo(out: Path, on_event: Callable[..., None], quick: bool) -> Any:
        on_event("step", {"text": "inventing three hospitals"})
        shown.append(run("status", out).output)
        on_event("start", {"study": "demo", "rounds": 3, "done": 0})
        shown.append(run("status", out).output)
        on_event("done", {"out": str(out)})
        made = {"private": True, "privacy": {"epsilon": 1.0}, "alone": {"harbour": 0.4}}
        return SimpleNamespace(report=made)

    monkeypatch.setattr("fedtune.demo.run_demo", demo)
    found = run("demo", "--out", tmp_path / "demo")
    assert found.exit_code == 0, found.output
    assert found.output.startswith("preparing\ninventing three hospitals\n")
    shown.append(run("status", tmp_path / "demo").output)
    states = ("waiting", "running  round 0/3", "done  round 0/3")
    assert [words in said for said, words in zip(shown, states, strict=True)] == 3 * [True]
    assert (tmp_path / "demo" / "log.jsonl").is_file()


def test_what_a_site_did_is_a_line_that_stays_on_a_terminal_too() -> None:
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    with Watch(console, "connecting") as watch:
        watch("joined", {"text": "connected; waiting for work"})
        watch("answered", {"text": "tiny: round 1 of 2 trained", "status": "trained"})
        watch("answered", {"text": "tiny: round 2 of 2 REFUSED: [x]", "status": "refused"})
    shown = file.getvalue()
    assert "tiny: round 1 of 2 trained\n" in shown
    assert "tiny: round 2 of 2 REFUSED: [x]\n" in shown


def test_the_version_is_one() -> None:
    import tomllib

    import fedtune

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["version"] == fedtune.__version__


@pytest.mark.parametrize(
    "words",
    [
        ("init", "n" * 300),
        ("revoke", "\udc80"),
        ("merge", "a", "b", "--density", "nan", "--out", "c"),
    ],
)
def test_what_no_command_can_use_is_refused_before_it_runs(words: tuple[str, ...]) -> None:
    found = run(*words)
    assert found.exit_code == 2 and found.stderr.startswith("fedtune: "), found.stderr
    assert "; expected " in found.stderr and "internal error" not in found.stderr


def test_no_error_moves_the_terminal(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConfigError("a\x1b[31m\x07\u202eb")

    monkeypatch.setattr(simulate, "simulate", fails)
    assert run("simulate", study).stderr == "fedtune: a?[31m??b\n"
