"""The clean room's list of cases, without running them: `make clean-room` does, and takes minutes.

Each command has a case, and the command line takes each as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from fedtune.cli.main import app
from tests.clean_room import Room
from tests.clean_room_cases import PROMPTS, run_all
from tests.test_library import commands


class Listed(Room):
    """Notes what would be typed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.typed: list[tuple[str, ...]] = []

    def run(self, what: str, *words: object, **_: Any) -> str:
        self.typed.append(tuple(map(str, words)))
        return ""


def parse(words: tuple[str, ...]) -> None:
    """Let the command line read `words`. Errors: UsageError."""
    command: Any = typer.main.get_command(app)
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def test_every_command_has_a_case_that_the_command_line_takes(tmp_path: Path) -> None:
    (tmp_path / "admitted.json").write_text(json.dumps({"fingerprint": "0000 " * 5}))
    room = Listed(tmp_path)
    assert run_all(room, tmp_path) == set(commands(typer.main.get_command(app)))
    cases = [words for program, *words in room.typed if program == "fedtune"]
    assert len(cases) > 30
    for words in cases:
        parse(tuple(words))


@pytest.mark.parametrize(
    "words",
    [
        ("attack", "run", "--models", "4", "--out", "attacked"),
        ("distill", "run", *PROMPTS, "--student", "student"),
    ],
)
def test_a_case_that_the_command_line_refuses_is_seen(words: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError):
        parse(words)
