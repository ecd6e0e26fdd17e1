"""The command line: every command parses, calls one function, and maps errors to exit codes.

Exit codes: 0 done · 2 bad input or configuration · 3 refused by a policy or a
budget · 4 infrastructure, or a fault of fedtune's · 130 stopped by Ctrl-C · 141 nobody reads the
output."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedtune.cli import (
    accept,
    attack,
    backup,
    dashboard,
    data,
    demo,
    derive,
    doctor,
    incident,
    log_lines,
    memberships,
    models,
    network,
    personalise,
    plugin,
    roles,
    server,
    tune,
    use_run,
)
from fedtune.cli import halves as cli_halves
from fedtune.cli import init as cli_init
from fedtune.cli import log as cli_log
from fedtune.cli import site as cli_site
from fedtune.cli import status as cli_observe
from fedtune.cli import verify as cli_verify
from fedtune.cli.exit_codes import command, quiet_if_unread
from fedtune.cli.study import (
    ANYWAY,
    RESUME,
    SET,
    SHARE,
    STUDY,
    TRACKER,
    load,
    say_expected_gain,
    say_looks,
    say_what_to_expect,
    say_what_was_paid,
    shares_of,
    stopping,
)
from fedtune.core.boot import collect_rarely, hide_quantisation
from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fedtune.core.config import Site

app = typer.Typer(
    cls=roles.DailyFirst,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # rich's own would take [schedule] for a style
    help="Fine-tune a language model across hospitals without moving a record.\n\n"
    "Start with **fedtune demo**: three invented hospitals, one adapter, a report.",
)
TRY = "Try it here"
RUN = "Between machines"
USE = "Use a run"


SITES = Annotated[
    list[Path] | None,
    typer.Option(
        "--sites",
        metavar="PATH",
        help="A site.toml, or a folder of them; may be repeated. Default: the study's folder.",
    ),
]
MORE = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[SITE…]",
        help="The same as --sites, so that a shell can expand sites/*/site.toml.",
        show_default=False,
    ),
]
OUT = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The run folder to create. Default: runs/NAME, by the study's name, or "
        "runs/NAME-2, … if it exists.",
    ),
]


def _version(show: bool) -> None:
    if show:
        from fedtune import __version__

        typer.echo(f"fedtune {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the `fedtune` command."""
    log_lines.use_one_style()
    collect_rarely()
    hide_quantisation()
    with quiet_if_unread():
        app(prog_name="fedtune")


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


demo.add_to(app, TRY)
cli_init.add_to(app, TRY)


@command(app, panel=TRY)
def plan(
    study: STUDY,
    more: MORE = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--size",
            min=1,
            metavar="N",
            help="Compute the cost for a site of this declared size; may be repeated. Site files "
            "are then read only if --sites names them.",
        ),
    ] = None,
    sites: SITES = None,
    share: SHARE = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Do not predict the gain, for which the base model has to be loaded."
        ),
    ] = False,
    settings: SET = None,
) -> dict[str, Any]:
    """Show what a study costs before it runs (σ, ε and rounds for sites of given sizes), and what
    it is expected to gain over public records alone.

    This reads no record of a site: it needs the public plan and the sizes that the sites declare,
    and for the expected gain also the base and the plan's public files."""
    from fedtune.cli.console import plan_table, warn_not_private

    loaded = load(study, settings)
    if not loaded.private:
        warn_not_private(_console())
        return {"study": loaded.study.name, "private": False}
    asked: list[Site | int] = [*(sizes or [])]
    if sites or more or not asked:
        try:
            asked += _sites(study, sites, more)
        except ConfigError as error:
            if not (sites or more):
                error.add_note("Without any: --size N, a site's patients or records, prices it.")
            raise
    from fedtune.accounting.costs import plan as compute_costs
    from fedtune.accounting.costs import query_lines, shared_lines

    costs = compute_costs(loaded, asked)
    _console().print(plan_table(loaded, costs))
    shared = shared_lines(loaded, [site.declared_size for site in costs.sites])
    for line in (costs.objective, *query_lines(loaded, len(asked)), *shared):
        _console().print(line, highlight=False, markup=False)
    declared = [site.declared_size for site in costs.sites]
    say_what_to_expect(_console(), loaded, declared, every=not sizes)
    say_looks(_console(), loaded)
    shares = shares_of(share)
    gain = None if quick else say_expected_gain(_console(), loaded, declared, shares)
    return {"private": True, **asdict(costs), "expected": gain}


@command(app, panel=TRY, epilog="Ctrl-C is safe: the same command with --resume goes on.")
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
            help="Only for a study with a [schedule], which needs it: stop after round N. Rounds "
            "follow at once, not at their scheduled times.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Pay again, without asking, for a study that was paid for before."
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

    loaded = load(study, settings)
    if rounds is None and (done := already_done(loaded, out, resume=resume)):
        typer.echo(finished_line(done))
        return read_report(done)
    loaded_sites, folder = _sites(study, sites, more), new_run(loaded, out, resume=resume)
    if line := beginning(loaded, folder, resume=resume):
        typer.echo(line)
    if not loaded.private:
        warn_not_private(_console())
    from fedtune.launch.simulate import check_budgets

    if not resume:
        check_vacant(folder)
    paid = check_budgets(loaded, loaded_sites, folder)
    if not resume:
        sizes = [site.site.declared_size for site in loaded_sites]
        say_what_to_expect(_console(), loaded, sizes)
        say_what_was_paid(paid, ask=not yes)
    from fedtune.observe import observer
    from fedtune.observe.trackers import build

    with (
        stopping(folder),
        Watch(_console(), "preparing", hold=True) as watch,
        observer("coordinator", folder, then=watch, trackers=build(tracker or ())) as events,
    ):
        from fedtune.launch.simulate import simulate as run

        finished = run(
            loaded, loaded_sites, folder,
            resume=resume, on_event=events, engine=engine, address=address, processes=processes,
            rounds=rounds, anyway=anyway, shares=shares_of(share),
        )  # fmt: skip
    closing(_console(), folder, finished.report)
    return finished.report


tune.add_to(app, TRY)
server.add_to(app, RUN)
cli_halves.add_to(app, RUN)


use_run.add_to(app, USE)
accept.add_to(app, cli_site.PANEL)
memberships.add_to(app, cli_site.PANEL)
personalise.add_to(app, cli_site.PANEL)
incident.add_to(app, cli_site.PANEL)
cli_verify.add_to(app, USE)
models.add_to(app, USE)
network.add_to(app)
doctor.add_to(app, RUN)
backup.add_to(app)
cli_site.add_to(app)
data.add_to(app)
derive.add_to(app)
plugin.add_to(app)
for part in (cli_observe, dashboard, cli_log, attack):
    part.add_to(app, USE)
roles.add_to(app)


@functools.cache
def _console() -> Console:
    from rich.console import Console

    return Console()


def _sites(study: Path, *groups: list[Path] | None) -> list[Site]:
    from fedtune.officer.site_files import load_sites

    return load_sites([path for paths in groups for path in paths or ()] or study.parent)
