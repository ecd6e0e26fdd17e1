"""The command that lists all commands."""

from __future__ import annotations

import typer

from fedtune.cli.commands import DailyFirst


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    app.command(rich_help_panel=panel)(more)


def more(ctx: typer.Context) -> None:
    """List every command, also those that `fedtune --help` leaves out."""
    above = ctx.find_root()
    group = above.command
    assert isinstance(group, DailyFirst)
    rest = (group.commands.describe(name) for name in group.commands if name != ctx.info_name)
    epilog = "A study of your own: fedtune init → plan → simulate → server and client."
    group.list_these(rest, above, above.make_formatter(), epilog)
