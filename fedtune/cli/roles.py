"""Let `fedtune --help` show only the commands of everyday use, grouped by who runs them.

`fedtune more` shows every command. A command's own --help does not depend on this."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import click
import typer
from typer.core import TyperGroup

DAILY = {
    "On one machine": ("demo", "init", "plan", "simulate", "evaluate", "predict", "export"),
    "Coordinate a consortium": ("server", "admit", "status", "verify", "release"),
    "Take part as a site": ("enroll", "client", "doctor", "review", "ledger", "accept"),
}


class DailyFirst(TyperGroup):
    """The group of all commands. Its --help lists only the commands of DAILY."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        daily = dict[str, click.Command]()
        for role, names in DAILY.items():
            for name in names:
                daily[name] = copy.copy(self.commands[name])
                daily[name].rich_help_panel = role  # type: ignore[attr-defined]
        self.list_these(daily, ctx, formatter, "**fedtune more** lists every command.")

    def list_these(
        self,
        commands: Mapping[str, click.Command],
        ctx: click.Context,
        formatter: click.HelpFormatter,
        epilog: str,
    ) -> None:
        """Print the group's help as if it had these commands alone, and this epilog."""
        shown = copy.copy(self)
        shown.commands, shown.epilog = {**commands}, epilog
        TyperGroup.format_help(shown, ctx, formatter)


def add_to(app: typer.Typer) -> None:
    app.command()(more)


def more(ctx: typer.Context) -> None:
    """List every command, also those that `fedtune --help` leaves out."""
    above = ctx.find_root()
    group = above.command
    assert isinstance(group, DailyFirst)
    rest = {name: command for name, command in group.commands.items() if name != ctx.info_name}
    epilog = "A study of your own: fedtune init → plan → simulate → server and client."
    group.list_these(rest, above, above.make_formatter(), epilog)
