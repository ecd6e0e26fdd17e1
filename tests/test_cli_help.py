"""What `--help` shows: every word, whole lists of choices."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import click
import typer
from click.testing import CliRunner

from fedtune import presets
from fedtune.cli import commands
from fedtune.cli.main import app
from tests.cli_kit import tree


def _raw(help_: str | None) -> list[str]:
    """The words of a help text as they are written, without the marks of emphasis."""
    return (help_ or "").replace("**", "").replace("`", "").split()


def _holes(app_: typer.Typer, *path: str) -> list[str]:
    """Words of a command's help, or of an option's, that its screen does not show, in order."""
    found: list[str] = []
    command = tree(app_)
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    shown = CliRunner().invoke(tree(app_), [*path, "--help"], env={"COLUMNS": "400"}).output
    flat = " ".join(shown.replace("│", " ").split())
    texts = [command.help, getattr(command, "epilog", None)]
    texts += [getattr(each, "help", None) for each in command.params]
    found += [text for text in texts if " ".join(_raw(text)) not in flat]
    for name in getattr(command, "commands", {}):
        found += _holes(app_, *path, name)
    return [str(text) for text in found]


def test_no_help_has_a_hole() -> None:
    """Rich takes [word] for a style and drops it."""
    assert _holes(app) == []


def _broken(app_: typer.Typer, *path: str) -> list[str]:
    """Lists of choices that a terminal of 80 columns breaks in the middle of a name."""
    command, found = tree(app_), list[str]()
    for name in path:
        command = command.commands[name]  # type: ignore[attr-defined]
    shown = CliRunner().invoke(tree(app_), [*path, "--help"], env={"COLUMNS": "80"}).output
    context = click.Context(command)
    for each in command.params:
        listed = each.make_metavar(context)
        if "|" in listed and listed not in shown:
            found.append(" ".join([*path, each.name or ""]))
    for name in getattr(command, "commands", {}):
        found += _broken(app_, *path, name)
    return found


def test_the_choices_of_an_option_are_whole_at_80_columns() -> None:
    assert _broken(app) == []
    tasks = CliRunner().invoke(tree(app), ["init", "--help"], env={"COLUMNS": "80"}).output
    for task in presets.TASKS:  # each on a line of its own
        assert re.search(rf"^│ (--task +TASK)? +{task}: ", tasks, re.MULTILINE), tasks


def test_a_list_of_choices_that_is_broken_is_seen() -> None:
    made = typer.Typer(rich_markup_mode="markdown")

    @made.command()
    def one(
        kind: Annotated[Literal["something", "longer", "than", "its", "column"], typer.Option()],
    ) -> None:
        """A command."""

    @made.command()
    def two() -> None:
        """Another."""

    assert _broken(made) == ["one kind"]


def test_a_hole_in_a_help_is_seen() -> None:
    made = typer.Typer(rich_markup_mode="rich")

    @made.callback()
    def root() -> None: ...

    @made.command()
    def one() -> None:
        """A study with a [schedule], and more."""

    assert _holes(made) == ["A study with a [schedule], and more."]


def test_each_module_adds_the_commands_that_the_table_says() -> None:
    for panel, modules in commands.COMMANDS.items():
        for module, names in modules.items():
            built = commands.build(module, panel)
            assert tuple(built) == names, module
            assert {command.rich_help_panel for command in built.values()} == {panel}, module


def test_the_first_screen_lists_the_daily_path_and_more_lists_all() -> None:
    def listed(*words: str) -> set[str]:
        shown = CliRunner().invoke(tree(app), [*words], env={"COLUMNS": "200"}).output
        return set(re.findall(r"^│ ([a-z][a-z-]*) ", shown, re.MULTILINE))

    daily = {name for names in commands.DAILY.values() for name in names}
    every = {*tree(app).commands} - {"more"}  # type: ignore[attr-defined]
    assert listed("--help") == daily
    assert listed("more") == every > daily
