"""The command that judges a finished model at a site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedtune.cli.exit_codes import command


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(accept)


def accept(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN|DOSSIER", help="A finished run, or its dossier."),
    ],
    site: Annotated[
        Path,
        typer.Option(
            "--site", metavar="SITE", help="The site.toml, which must hold an [acceptance] table."
        ),
    ] = Path("site.toml"),
    tell: Annotated[
        Path | None,
        typer.Option(
            "--tell",
            metavar="FILE",
            help="Judge nothing. Write a signed statement of the last verdict on this model "
            "(accepted, refused or not resolved) to FILE, for the coordinator.",
            show_default=False,
        ),
    ] = None,
    personal: Annotated[
        bool,
        typer.Option(
            "--personal",
            help="Judge this site's personal model of the run, which `fedtune personalise` "
            "made, and show the released model beside it. The coordinator is never told "
            "of this verdict.",
        ),
    ] = False,
) -> dict[str, Any]:
    """Judge a finished model at this site, on its own held-out patients.

    The verdict is accepted, refused or not resolved, by the rules of [acceptance] in site.toml. The
    command writes a page, all figures and a signed record to the site's state folder. The figures
    are exact, without noise, so they stay at the site: none of them is in the ledger, a dossier or
    the status. If a person tells somebody else the decision, no ε covers that."""
    from fedtune.cli.watch import Watch
    from fedtune.core.config import load_site
    from fedtune.core.config.state_files import PAGE
    from fedtune.core.errors import ConfigError
    from fedtune.officer.acceptance.accept import accept as judge
    from fedtune.runs.personal import open_personal
    from fedtune.runs.run import open_run

    if tell is not None and personal:
        raise ConfigError(
            "--tell and --personal are both given",
            "only one of the two",
            "leave --tell out: a decision about a personal model stays at its site",
        )
    if tell is not None:
        from fedtune.officer.acceptance.accept import tell as write

        decision = write(run, load_site(site), tell)
        typer.echo(f"wrote {tell}: {decision}, and no figure")
        typer.echo("who reads it learns an exact fact about held-out patients; no ε covers it")
        return {"told": str(tell), "decision": decision}
    with Watch(Console(stderr=True), "judging"):
        loaded = load_site(site)
        made = judge(open_personal(open_run(run), loaded) if personal else run, loaded)
    figures = made.figures
    unit = f"{figures['unit']}s"
    typer.echo(f"{made.decision}, of {figures['patients']} held-out {unit}")
    for one in figures["judged"]:
        low, high = one["interval"]
        of = f" of {one['of']}" if one["of"] else ""
        of = " over the public start" if one["better_by"] else of
        why = f": {one['why']}" if one["why"] else ""
        figure = (
            "none" if one["figure"] is None else f"{one['figure']:.3f} ({low:.3f} to {high:.3f})"
        )
        worse = " worse by" if one["of"] else " better by" if one["better_by"] else ""
        typer.echo(f"  {one['measure']}{of}:{worse} {figure}, {one['decision']}{why}")
    for group in figures["different"]:
        typer.echo(f"  differs from all others: {group}")
    for why, number in figures["left_out"].items():
        typer.echo(f"  left out: {number} {why}")
    typer.echo(f"read {made.folder / PAGE}")
    typer.echo("private to this site: all of this follows from its records, and no ε covers it")
    return {"folder": str(made.folder), **figures}
