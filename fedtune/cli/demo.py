"""`fedtune demo`: a whole study on generated records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.exit_codes import command


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(demo)


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The run folder to create. Default: runs/demo, or runs/demo-2, …",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Run a smaller demo (fewer classes, patients and rounds), to check that an "
            "installation works.",
        ),
    ] = False,
) -> dict[str, Any]:
    """Run a whole study in a few minutes: three invented hospitals train one private adapter.

    The notes are generated, the base is SmolLM2-135M, and nothing leaves this machine. At the end
    the demo shows the quality before and after, the ε that was spent, and a report to read."""
    from rich.console import Console

    from fedtune.cli.console import closing
    from fedtune.cli.watch import Watch
    from fedtune.observe import observer
    from fedtune.runs.choice import folder_for

    folder, console = out or folder_for("demo", resume=False), Console()
    with (
        Watch(console, "preparing") as watch,
        observer("coordinator", folder, then=watch, early=True) as events,
    ):
        from fedtune.demo import run_demo

        done = run_demo(folder, events, quick=quick)
    closing(console, folder, done.report)
    return done.report
