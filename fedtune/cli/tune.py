"""`fedtune tune`: search a study's settings on declared data, before a private run."""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtune.cli.exit_codes import command
from fedtune.cli.study import STUDY
from fedtune.cli.tables import Figures
from fedtune.core.registry.rounding import rounded_up
from fedtune.report.figures import format_short

if TYPE_CHECKING:
    from fedtune.launch.tune import Search, Trial

SITES = Annotated[
    list[Path] | None,
    typer.Option(
        "--sites",
        metavar="PATH",
        help="A site.toml, or a folder of them; may be repeated. Each must declare its "
        "data public or generated. Default: the study's folder.",
    ),
]
TRIALS = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1000,
        metavar="N",
        help="Maximum number of trials. If --set gives more combinations, N of them are drawn at "
        "random. Default: every combination of --set, or 5 learning rates without --set.",
        show_default=False,
    ),
]
SETTINGS = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=A,B,…",
        help="Try each of these values of a key of study.toml, such as "
        "training.learning_rate=1e-4,1e-3. May be repeated: all combinations are tried. "
        "If no key has several values, learning rates around the plan's are tried.",
        show_default=False,
    ),
]
RECORDS = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Required for a study without [selection]: a file of public records, with the "
        "columns of [evaluation], by which trials are compared. The records of "
        "[evaluation] never serve for this.",
        show_default=False,
    ),
]
OUT = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder for the trials. Default: runs/NAME-tune, by the study's name.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel, epilog="Ctrl-C is safe: the same command continues the search.")(tune)


def tune(
    study: STUDY,
    sites: SITES = None,
    trials: TRIALS = None,
    settings: SETTINGS = None,
    records: RECORDS = None,
    out: OUT = None,
) -> dict[str, Any]:
    """Search settings on public or generated data, where a trial costs no hospital's budget.

    Each trial is an ordinary run in DIR/trial-NN; finished trials are read, not run again."""
    from fedtune.core.config import load_study
    from fedtune.launch.tune import _values
    from fedtune.launch.tune import tune as search
    from fedtune.officer.site_files import load_sites
    from fedtune.runs.choice import RUNS

    began = time.monotonic()
    fixed = [setting for setting in settings or () if len(_values(setting)) < 2]
    folder = out or RUNS / f"{load_study(study, settings=fixed).study.name}-tune"

    def tell(number: int, of: int, trial: Trial) -> None:
        nonlocal began
        seconds, began = time.monotonic() - began, time.monotonic()
        result = f"FAILED: {trial.error}" if trial.value is None else format_short(trial.value)
        line = f"trial {number}/{of}  {' '.join(trial.settings)}  {result}  ({seconds:.0f} s)"
        typer.echo(line)

    done = search(
        study, load_sites(sites or study.parent), folder, settings or (), trials, records, tell
    )
    console = Console()
    console.print(trials_table(done))
    if done.best:
        words = " ".join(f"--set {shlex.quote(setting)}" for setting in done.best.settings)
        console.print(
            f"use  {words}\nIt was chosen on {done.records}, in one run each: [evaluation] records "
            "chose nothing and still judge the result.\nNo claim about patients: every trial ran "
            f"on data declared public or generated. The trials are in {folder}.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return asdict(done) | {"best": asdict(done.best) if done.best else None}


def trials_table(search: Search) -> Table:
    """Build the table of a search's trials, best first."""
    table = Figures(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("settings", overflow="fold")
    table.add_column(search.metric, justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("ε", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for trial in search.trials:
        settings = escape("\n".join(trial.settings))
        figures = (format_short(trial.value), format_short(trial.loss), rounded_up(trial.epsilon))
        note = trial.error or (f"warning: {trial.warning}" if trial.warning else "")
        table.add_row(trial.folder, settings, *figures, escape(note))
    return table
