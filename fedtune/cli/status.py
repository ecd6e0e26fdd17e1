"""`fedtune status`: the progress of a run, a coordinator or a site."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from fedtune.cli.exit_codes import command, wants_json

NOTHING: dict[str, Any] = {}
EVERY = 0.5  # seconds between two looks


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(status)


def status(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="What to show: a run's folder, a coordinator's home, or a site.toml.",
            show_default=False,
        ),
    ],
    once: Annotated[bool, typer.Option("--once", help="Print the status once and exit.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="For a health check: print ok; or exit with code 4 if the process has gone or "
            "was stopped, or a site's last request failed.",
        ),
    ] = False,
    metrics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the rounds so far to a .csv or .parquet file, one row per round.",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Show the progress of a run, a coordinator or a site until it ends. The command reads files
    and sends no request."""
    from fedtune.core.errors import FedtuneError, InfrastructureError

    if metrics:
        from fedtune.runs.run import Run

        typer.echo(f"wrote {Run(path).write_metrics(metrics)}")
        once = True
    from fedtune.observe.status import folder_of, read_status

    folder = folder_of(path)
    snapshot = read_status(folder)
    if check:
        if snapshot.state in ("gone", "stopped"):
            raise InfrastructureError(
                f"{folder}: {snapshot.state}", "a process that runs", "start it"
            )
        if snapshot.failed:
            raise InfrastructureError(
                f"{folder}: the last request failed here ({snapshot.failed})",
                "a site that answers",
                "read its client's log; `fedtune ledger SITE` says whether the ledger is whole",
            )
        typer.echo("ok")
        return {"state": snapshot.state, **snapshot.status}
    from fedtune.cli.status_view import BudgetView, view
    from fedtune.evidence.told import read_told
    from fedtune.report.held_out import write_shown
    from fedtune.report.run_files import read_report

    site = path if path.suffix == ".toml" else None
    told, report = read_told(folder), NOTHING
    with suppress(FedtuneError):
        report = read_report(folder)
    held_out = write_shown(report)
    budget = BudgetView(site) if site else None
    console = Console()
    if once or wants_json() or not console.is_terminal:
        console.print(view(snapshot, budget() if budget else None, site, told, held_out))
        said: dict[str, Any] = {"told": [asdict(one) for one in told]} if told else {}
        said |= {"held_out": report["held_out"]} if held_out else {}
        return {"state": snapshot.state, **snapshot.status, **said}
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            drawn = view(snapshot, budget() if budget else None, site, told, held_out)
            live.update(drawn, refresh=True)
            if snapshot.over:
                break
            time.sleep(EVERY)
            snapshot = read_status(folder)
    return {"state": snapshot.state, **snapshot.status}
