"""The command line: every command parses, calls one function, and maps errors to exit codes.

Exit codes: 0 done · 2 bad input or configuration · 3 refused by a policy or a
budget · 4 infrastructure, or a fault of fedtune's · 130 stopped by Ctrl-C · 141 nobody reads the
output."""

from __future__ import annotations

from typing import Annotated

import typer

from fedtune.cli import log_lines
from fedtune.cli.commands import MARKUP, DailyFirst
from fedtune.cli.exit_codes import quiet_if_unread
from fedtune.core.boot import collect_rarely, hide_quantisation

app = typer.Typer(
    cls=DailyFirst,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=MARKUP,
    help="Fine-tune a language model across hospitals without moving a record.\n\n"
    "Start with **fedtune demo**: three invented hospitals, one adapter, a report.",
)


def _version(show: bool) -> None:
    if show:
        from fedtune import __version__

        typer.echo(f"fedtune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the `fedtune` command."""
    log_lines.use_one_style()
    collect_rarely()
    hide_quantisation()
    with quiet_if_unread():
        app(prog_name="fedtune")


if __name__ == "__main__":
    main()
