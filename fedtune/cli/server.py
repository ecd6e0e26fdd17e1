"""The coordinator's command: wait for sites, and train with them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.exit_codes import command
from fedtune.cli.study import (
    ANYWAY,
    METRICS,
    RESUME,
    SET,
    SHARE,
    TRACKER,
    load,
    shares_of,
    stopping,
)
from fedtune.core.errors import ConfigError

HOME = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of certificates and admitted sites, created at the first start. "
        "Default: the folder named coordinator beside STUDY.",
    ),
]
HOST = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="The address to listen on. With 127.0.0.1 only this machine can connect; 0.0.0.0 "
        "stands for all addresses of this machine.",
    ),
]
NAMES = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="A host name or an IP address by which sites reach this machine; may be "
        "repeated. Sites are told the first. Default: --host, unless that is 0.0.0.0.",
        show_default=False,
    ),
]
DAY = 86_400.0  # seconds
SIGN_WITHIN = Annotated[
    float,
    typer.Option(
        min=0,
        metavar="DAYS",
        help="How long to wait, while too few sites take part, for people at the sites to sign the "
        "plan. After that the study ends with exit code 3.",
    ),
]
OUT = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The run folder to create. For several studies: the folder in which each gets a "
        "run folder. Default: runs/NAME beside STUDY, by the study's name, or "
        "runs/NAME-2, … if it exists.",
    ),
]
STUDIES = Annotated[
    list[Path],
    typer.Argument(
        metavar="STUDY...",
        help="The public plan, study.toml. Give several to run studies of the same consortium "
        "together.",
        show_default=False,
    ),
]
AT_ONCE = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Run N of several studies side by side: they take turns, one round each. The others "
        "wait in the order given.",
    ),
]
DEADLINE = Annotated[
    list[str] | None,
    typer.Option(
        "--deadline",
        metavar="[STUDY=]TIME",
        help="End a study that is not finished at TIME, such as 2026-12-24T18:00Z, and keep "
        "its rounds. STUDY=TIME: only that study. May be repeated.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    told = "Ctrl-C is safe: the same command with --resume continues."
    command(app, panel=panel, epilog=told)(server)


def server(
    studies: STUDIES,
    home: HOME = None,
    host: HOST = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, metavar="N", help="The port to listen on.")
    ] = 8443,
    names: NAMES = None,
    out: OUT = None,
    resume: RESUME = False,
    metrics_port: METRICS = None,
    settings: SET = None,
    tracker: TRACKER = None,
    sign_within: SIGN_WITHIN = 7.0,
    at_once: AT_ONCE = 1,
    deadline: DEADLINE = None,
    anyway: ANYWAY = False,
    share: SHARE = None,
) -> dict[str, Any]:
    """Coordinate a study over mutual TLS with admitted sites; sites may also be admitted while it
    runs.

    Several studies share the port, the home and the sites. Each has its own run folder and is
    admitted by each site's own policy; one that fails does not affect the others.

    A study with a [schedule] has a round at each scheduled time, until this command is stopped. The
    server sends tensors and numbers, never code, and sees noised sums only. It opens one port,
    which takes only the calls that an admitted site makes."""
    from rich.console import Console

    from fedtune.cli.console import closing, warn_not_private
    from fedtune.cli.several import deadlines_of, format_deadline, run_several
    from fedtune.cli.watch import Watch
    from fedtune.flower.ports import address_of
    from fedtune.report.run_files import read_report
    from fedtune.runs.choice import already_done, beginning, finished_line, new_run

    console = Console()
    study, home = studies[0], home or studies[0].parent / "coordinator"
    plans = [load(path, settings) for path in studies]
    deadlines = deadlines_of(deadline or (), [plan.study.name for plan in plans])
    at: dict[str, Any] = {"host": host, "port": port, "names": names or [], "home": home}
    about = (sign_within * DAY, anyway, shares_of(share))
    if len(studies) > 1:
        from fedtune.launch.coordinator import Terms
        from fedtune.launch.side_by_side import check_together, serve_all

        if tracker or metrics_port:
            raise ConfigError(
                "--tracker or --metrics-port is given with several studies", "a single STUDY"
            )
        check_together(plans, at_once)
        folders = [out or path.parent / "runs" for path in studies]
        serve_here = partial(serve_all, at_once=at_once, terms=Terms(*about), **at)
        placed = list(zip(plans, folders, strict=True))
        return run_several(placed, home, deadlines, serve_here, resume=resume)
    loaded, ends = plans[0], deadlines[plans[0].study.name]
    if done := already_done(loaded, out, resume=resume, runs=study.parent / "runs"):
        typer.echo(finished_line(done))
        return read_report(done)
    folder = new_run(loaded, out, resume=resume, runs=study.parent / "runs")
    if line := beginning(loaded, folder, resume=resume, runs=study.parent / "runs"):
        typer.echo(line)
    if not loaded.private:
        warn_not_private(console)
    from fedtune.observe import observer
    from fedtune.observe.home_status import HomeStatus
    from fedtune.observe.trackers import build

    status = HomeStatus(home)
    row = status.study(loaded.study.name, format_deadline(ends))
    title = f"{loaded.study.name}: starting a coordinator at {address_of(host, port)}"
    with (
        stopping(folder),
        Watch(console, title) as watch,
        observer(
            *("coordinator", folder),
            then=watch,
            more=[row, status],
            metrics_port=metrics_port,
            trackers=build(tracker or ()),
        ) as events,
    ):
        from fedtune.launch.coordinator import Terms, serve

        report = serve(
            *(loaded, folder),
            resume=resume,
            on_event=events,
            terms=Terms(*about),
            deadline=ends,
            **at,
        )
    closing(console, folder, report)
    return report


def address(told: str) -> tuple[str, int]:
    """Parse the value of --serve, NAME or NAME:PORT. Return the name and the port, which is 8443 if
    none is given. Errors: ConfigError if it is no such address."""
    found = re.fullmatch(r"([A-Za-z0-9.-]{1,253})(?::([0-9]{1,5}))?", told)
    if not found or not 1 <= int(port := found[2] or "8443") <= 65535:
        raise ConfigError("--serve: no address", "NAME or NAME:PORT, as sites call this machine")
    return found[1], int(port)


def start(study: Path, name: str, port: int) -> dict[str, Any]:
    """Run the server of a new study for `init --serve`, and return what `server` returns. It first
    prints the command that continues the study after a stop.

    - study: the path of study.toml
    - name: the name by which sites reach this machine; "localhost" or 127.0.0.1 if they are on it
    - port: the port to listen on"""
    host = "127.0.0.1" if name in ("127.0.0.1", "localhost") else "0.0.0.0"
    words = f"--host {host} --port {port} --name {name}"
    typer.echo(f"\nafter a stop   fedtune server {study} {words} --resume\n")
    return server([study], host=host, port=port, names=[name])
