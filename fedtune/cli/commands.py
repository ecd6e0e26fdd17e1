"""The table of all commands: under which heading each is listed, and which module has it.

A command's module is imported only when the command is called or described, so that `fedtune
status` does not wait for the modules of forty other commands. `fedtune --help` shows only the
commands of everyday use, by who runs them; `fedtune more` shows every command."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Iterator, Mapping
from inspect import getdoc
from typing import Any, Final

import click
import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_name, solve_typer_info_help

MARKUP: Final = "markdown"  # rich's own would take [schedule] for a style

DAILY = {
    "On one machine": ("demo", "init", "plan", "simulate", "evaluate", "predict", "export"),
    "Coordinate a consortium": ("server", "admit", "status", "verify", "release"),
    "Take part as a site": ("enroll", "client", "doctor", "review", "ledger", "accept"),
}
# heading -> module of fedtune.cli -> its commands; `fedtune more` lists them in this order
COMMANDS: dict[str, dict[str, tuple[str, ...]]] = {
    "Try it here": {
        "demo": ("demo",),
        "init": ("init",),
        "plan": ("plan",),
        "simulate": ("simulate",),
        "tune": ("tune",),
        "more": ("more",),
    },
    "Between machines": {
        "server": ("server",),
        "halves": ("client", "vault", "courier"),
        "network": ("enroll", "admit", "revoke", "leave"),
        "doctor": ("doctor",),
        "backup": ("backup", "restore"),
    },
    "Use a run": {
        "use_run": ("evaluate", "predict", "versions", "generate", "answers"),
        "verify": ("verify",),
        "release": ("release", "approve"),
        "models": ("models",),
        "status": ("status",),
        "dashboard": ("dashboard",),
        "log": ("log",),
        "attack": ("attack",),
    },
    "Answer for a site's data": {
        "accept": ("accept",),
        "memberships": ("memberships",),
        "personalise": ("personalise",),
        "incident": ("evidence",),
        "site": ("review", "let-go", "ledger", "withdraw", "purge", "audit"),
        "data": ("data",),
    },
    "Make more of models": {
        "derive": ("label", "improve", "distill", "merge", "export", "choose-base"),
    },
    "Write a plug-in": {"plugin": ("check-plugin",)},
}


class Commands(Mapping[str, click.Command]):
    """All commands by name, in the order of COMMANDS. Each is built when it is first looked up,
    with the others of its module."""

    def __init__(self) -> None:
        self._built: dict[str, click.Command] = {}
        self._places = {
            name: (module, panel)
            for panel, modules in COMMANDS.items()
            for module, names in modules.items()
            for name in names
        }

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._built:
            module, panel = self._places[name]
            self._built |= build(module, panel)
        return self._built[name]

    def describe(self, name: str, panel: str = "") -> click.Command:
        """Return a command as a list of commands shows it: name, first lines and heading. Its
        options are not built: to build them would make `fedtune --help` take a third longer. panel:
        the heading; default: the command's heading in COMMANDS."""
        module, own = self._places[name]
        part = _register(module, own)
        said = {
            info.name or get_command_name(info.callback.__name__): info.help
            or getdoc(info.callback)
            for info in part.registered_commands
            if info.callback
        }
        said |= {str(info.name): solve_typer_info_help(info) for info in part.registered_groups}
        return TyperCommand(
            name, help=said[name], rich_markup_mode=MARKUP, rich_help_panel=panel or own
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def build(module: str, panel: str) -> dict[str, click.Command]:
    """Import a module of fedtune.cli and build its commands: name -> command. panel: the heading
    under which they are listed."""
    return {**typer.main.get_group(_register(module, panel)).commands}


def _register(module: str, panel: str) -> typer.Typer:
    part = typer.Typer(rich_markup_mode=MARKUP)
    importlib.import_module(f"fedtune.cli.{module}").add_to(part, panel)
    return part


class DailyFirst(TyperGroup):
    """The group of all commands. Its --help lists only the commands of DAILY."""

    commands: Commands  # type: ignore[assignment]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Commands()

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        daily = [
            self.commands.describe(name, role) for role, names in DAILY.items() for name in names
        ]
        self.list_these(daily, ctx, formatter, "**fedtune more** lists every command.")

    def list_these(
        self,
        commands: Iterable[click.Command],
        ctx: click.Context,
        formatter: click.HelpFormatter,
        epilog: str,
    ) -> None:
        """Print the group's help as if the group had only these commands, with `epilog` below
        them."""
        shown: TyperGroup = copy.copy(self)
        shown.commands = {str(command.name): command for command in commands}
        shown.epilog = epilog
        TyperGroup.format_help(shown, ctx, formatter)
