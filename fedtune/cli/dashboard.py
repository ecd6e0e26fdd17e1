"""`fedtune dashboard`: pages in a browser on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.exit_codes import command


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(dashboard)


def dashboard(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="What to show: a run, a folder of runs, a coordinator's home, a site.toml, or "
            "a dossier.",
            show_default=False,
        ),
    ],
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="N", help="Port on 127.0.0.1. Default: any free port."
        ),
    ] = 0,
    trust: Annotated[
        str,
        typer.Option(
            metavar="FINGERPRINT",
            help="Verify runs and dossiers against this fingerprint of the consortium, as its "
            "coordinator read it out.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Show the progress of a study in a browser: rounds, quality, ε, sites, budget and dossier.

    The dashboard reads files and writes none, sends no request, and answers only on this machine,
    to anybody who has the address that it prints. It runs until Ctrl-C."""
    from fedtune.dashboard.kinds import page_of
    from fedtune.dashboard.server import serve

    page = page_of(path, trust)
    typer.echo(f"{page.kind} {page.title}; read-only, on this machine alone; Ctrl-C ends")
    serve(page, port, typer.echo)
