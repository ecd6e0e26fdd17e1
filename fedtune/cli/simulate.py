"""The command that runs a whole study on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from fedtune.cli.exit_codes import command
from fedtune.cli.study import (
    ANYWAY,
    MORE,
    RESUME,
    SET,
    SHARE,
    SITES,
    STUDY,
    TRACKER,
    load,
    say_what_to_expect,
    say_what_was_paid,
    shares_of,
    sites_of,
    stopping,
)

OUT = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The run folder to create. Default: runs/NAME, by the study's name, or "
        "runs/NAME-2, … if it exists.",
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    told = "Ctrl-C is safe: the same command with --resume continues."
    command(app, panel=panel, epilog=told)(simulate)


def simulate(
    study: STUDY,
    more: MORE = None,
    sites: SITES = None,
    out: OUT = None,
    resume: RESUME = False,
    engine: Annotated[
        Literal["in-process", "ray"],
        typer.Option(
            help="Where the sites run. in-process: on this machine, without a network. ray: in "
            "processes on the nodes of a Ray cluster."
        ),
    ] = "in-process",
    address: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="With --engine ray: join the Ray cluster at ADDRESS (auto or HOST:PORT). "
            "Default: start Ray on this machine, and end it afterwards.",
            show_default=False,
        ),
    ] = "",
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Let N sites train at the same time, in processes that share the base's memory.",
        ),
    ] = 1,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Stop after round N. A study with a [schedule] needs this option, and no other "
            "study takes it. Rounds follow at once, not at their scheduled times.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes",
            help="Do not ask before records pay ε a second time for the same study.",
        ),
    ] = False,
    anyway: ANYWAY = False,
    share: SHARE = None,
    settings: SET = None,
    tracker: TRACKER = None,
) -> dict[str, Any]:
    """Run a whole study on this machine: every site and every round, with the code of a real study.

    Each site reads its own site.toml, applies its own policy and pays from its own privacy budget.
    """
    from fedtune.cli.console import closing, warn_not_private
    from fedtune.cli.watch import Watch
    from fedtune.report.run_files import read_report
    from fedtune.runs.choice import already_done, beginning, check_vacant, finished_line, new_run

    loaded, console = load(study, settings), Console()
    if rounds is None and (done := already_done(loaded, out, resume=resume)):
        typer.echo(finished_line(done))
        return read_report(done)
    loaded_sites, folder = sites_of(study, sites, more), new_run(loaded, out, resume=resume)
    if line := beginning(loaded, folder, resume=resume):
        typer.echo(line)
    if not loaded.private:
        warn_not_private(console)
    from fedtune.launch.simulate import check_budgets

    if not resume:
        check_vacant(folder)
    paid = check_budgets(loaded, loaded_sites, folder)
    if not resume:
        sizes = [site.site.declared_size for site in loaded_sites]
        say_what_to_expect(console, loaded, sizes)
        say_what_was_paid(paid, ask=not yes)
    from fedtune.observe import observer
    from fedtune.observe.trackers import build

    with (
        stopping(folder),
        Watch(console, "preparing", hold=True) as watch,
        observer("coordinator", folder, then=watch, trackers=build(tracker or ())) as events,
    ):
        from fedtune.launch.simulate import simulate as run

        finished = run(
            loaded, loaded_sites, folder,
            resume=resume, on_event=events, engine=engine, address=address, processes=processes,
            rounds=rounds, anyway=anyway, shares=shares_of(share),
        )  # fmt: skip
    closing(console, folder, finished.report)
    return finished.report
