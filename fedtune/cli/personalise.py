"""The command that makes a site's own model out of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedtune.cli.exit_codes import command

if TYPE_CHECKING:
    from fedtune.runs.run import Run

# Of the commands that use a run: the site whose personal model they use in its place.
AT_SITE = Annotated[
    Path | None,
    typer.Option(
        "--site",
        metavar="SITE",
        help="Use the personal model that `fedtune personalise` made from this run for the site of "
        "this site.toml, in place of the released model.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(personalise)


def run_at(run: Path, site: Path | None) -> Run:
    """Open a run or, if a site is given, the site's personal model of that run. Errors:
    InputError."""
    from fedtune.runs.run import Run

    if site is None:
        return Run(run)
    from fedtune.core.config import load_site
    from fedtune.runs.personal import open_personal

    return open_personal(Run(run), load_site(site))


def personalise(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|DOSSIER", help="A finished run, or its dossier."),
    ],
    site: Annotated[
        Path, typer.Option("--site", metavar="SITE", help="This site's site.toml.")
    ] = Path("site.toml"),
) -> dict[str, Any]:
    """Train a released model further on this site's own records, for use only at this site.

    How far the model may move from the released one is chosen by records of [data] that the
    training does not see; patients of [acceptance] and [evaluation] are never trained on. If those
    records do not show that the personal model is better, the released model is kept, and no file
    is written. Otherwise the personal model is sealed to this site's key in the site's state
    folder: no ε covers it, so it never leaves. `predict`, `evaluate` and `generate` use it with
    --site, `accept` judges it with --personal; export, merge, release, distill, improve and label
    refuse it. After a withdrawal it is not used until this command has run again. Nothing is
    charged to the ledger."""
    from fedtune.cli.watch import Watch
    from fedtune.core.config import load_site
    from fedtune.evidence.personal import MARK
    from fedtune.officer.personalise.personalise import personalise as make

    with Watch(Console(stderr=True), "personalising"):
        made = make(run, load_site(site))
    choice = made.choice
    typer.echo(
        f"loss on {made.records} own records of {made.patients} units, each judged by a fit that "
        f"did not see it: {choice.shared:.3f} nats with the released model, {choice.personal:.3f} "
        f"with the best of the fits, which gains at least {choice.least:.3f} (95 %)"
    )
    for why, number in (*made.left_out.items(), *made.rejected.items()):
        typer.echo(f"  left out: {number} {why}")
    if made.file is None:
        typer.echo("the released model is kept: these records do not show a gain; no file is left")
    else:
        way = choice.way
        typer.echo(f"pull {way.pull:g}, {way.steps} steps, {way.share:.0%} of the change")
        typer.echo(f"wrote {made.file}: sealed to this site's key; {MARK}")
    typer.echo("private to this site: these figures follow from its records, and no ε covers them")
    return {
        "kept": "released" if made.file is None else "personal",
        "file": made.file,
        "pull": choice.way.pull,
        "steps": choice.way.steps,
        "share": choice.way.share,
        "loss": {"released": choice.shared, "personal": choice.personal},
        "gain_at_least": choice.least,
        "patients": made.patients,
        "records": made.records,
        "left_out": made.left_out,
        "rejected": made.rejected,
    }
