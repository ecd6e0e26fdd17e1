"""`fedtune dashboard`: pages in a browser on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.exit_codes import command


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`."""
    command(app, panel=panel)(dashboard)


def dashboard(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A run, a folder of runs, a coordinator's home, a site.toml, or a dossier.",
            show_default=False,
        ),
    ],
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="N", help="Port on 127.0.0.1. Without it: any free one."
        ),
    ] = 0,
    trust: Annotated[
        str,
        typer.Option(
            metavar="FINGERPRINT",
            help="The consortium's, as its coordinator reads it out: runs and dossiers are "
            "verified against it.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Show how a study is doing in a browser, live: progress, quality, ε, sites, budget, dossier.

    Reads files and writes none, asks nobody, and answers on this machine alone, to whoever has the
    address that it prints. Runs until Ctrl-C."""
    from fedtune.dashboard.kinds import page_of
    from fedtune.dashboard.server import serve

    page = page_of(path, trust)
    typer.echo(f"{page.kind} {page.title}; read-only, on this machine alone; Ctrl-C ends")
    serve(page, port, typer.echo)
