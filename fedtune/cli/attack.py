"""The command that attacks a finished run."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedtune.cli.exit_codes import ErrorWithResult, command

if TYPE_CHECKING:
    from fedtune.audit.attack import Attack, Secrets
    from fedtune.audit.membership import Membership
    from fedtune.officer.attack import SiteAttack

RUN = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)
]
SITE = Annotated[
    Path | None,
    typer.Option(
        "--site",
        metavar="SITE",
        help="Attack at a site, with the records of this site.toml as the members.",
        show_default=False,
    ),
]
HELD_OUT = Annotated[
    Path | None,
    typer.Option(
        "--held-out",
        metavar="FILE",
        help="With --site: a file of non-members, records like the site's on which no site "
        "trained. Default: the records of [evaluation] in SITE.",
        show_default=False,
    ),
]
REFERENCES = Annotated[
    list[Path] | None,
    typer.Option(
        "--reference",
        metavar="RUN",
        help="With --site or --records: compare with the model of this other run, which has "
        "the same base and shape of adapter and did not train on these records; may be "
        "repeated.",
        show_default=False,
    ),
]
RECORDS = Annotated[
    list[str] | None,
    typer.Option(
        "--records",
        metavar="NAME=FILE",
        help="Attack sites instead of units: name a site and a file of its records, with the "
        "study's columns. Give the option once for each of two or more sites.",
        show_default=False,
    ),
]
RECEIVED = Annotated[
    bool,
    typer.Option(
        "--received",
        help="With --records: train the study again on half of each site's records, and try to "
        "tell which site sent each update that reaches the coordinator.",
    ),
]
OUT = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder for attack.json and attack.png.")
]
CANARIES = Annotated[
    int,
    typer.Option(
        min=10,
        max=10_000,
        metavar="N",
        help="Without --site: the number of test units (canaries); each model trains on half "
        "of them.",
    ),
]
MODELS = Annotated[
    int,
    typer.Option(
        min=8,
        max=1000,
        metavar="N",
        help="Without --site: how many models to train with noise; as many are trained without it.",
    ),
]
UNITS = Annotated[
    int,
    typer.Option(
        min=20, metavar="N", help="Without --site: the number of units on which each model trains."
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(attack)


def attack(
    run: RUN,
    site: SITE = None,
    held_out: HELD_OUT = None,
    references: REFERENCES = None,
    records: RECORDS = None,
    received: RECEIVED = False,
    out: OUT = Path("attack"),
    canaries: CANARIES = 64,
    models: MODELS = 16,
    units: UNITS = 100,
) -> dict[str, Any]:
    """Try to tell which units a model was trained on, and compare the success with what ε allows.

    **At a site** (--site): tell the site's own units from held-out ones, by the model of this run.
    The result follows exactly from private records, so it must stay at the site.

    **Anywhere**: train models on generated records, as the run's sites trained. Each model gets
    half of the test units (canaries), and the attack tells which. The same attack on models that
    are trained without noise must succeed. For a study on text, also measure how much a model
    reveals of planted secrets, and whether it writes them. This reads no record and costs no ε.

    **Between sites** (--records for each site): from the model's outputs, tell which site a record
    is from and whose records the model learnt. Both results are tested against permutations of the
    sites' names. With --received, also tell which site sent each update. ε does not cover this
    attack.

    If the attack finds more than ε allows, something is broken, and the exit code is 3."""
    from fedtune.cli.watch import Watch
    from fedtune.core.errors import ConfigError, Refused
    from fedtune.runs.run import Run

    if records:
        return _attack_sites(run, records, references or [], out, site or held_out, received)
    if received:
        raise ConfigError(
            "--received is given without --records", "--received together with --records NAME=FILE"
        )
    if site is None and (held_out or references):
        raise ConfigError(
            "--held-out or --reference is given without --site", "--site SITE with them"
        )
    loaded = Run(run)
    result: SiteAttack | Attack
    with Watch(Console(), "attacking"):
        if site is not None:
            from fedtune.core.config import load_site
            from fedtune.officer.attack import attack_site

            others = [Run(folder) for folder in references or ()]
            result = attack_site(loaded, load_site(site), held_out, references=others, out=out)
            judged = [("members of this site", result.membership)]
        else:
            from fedtune.audit.attack import attack_run

            result = attack_run(loaded, out, canaries=canaries, models=models, units=units)
            judged = [("canaries, with noise", result.private), ("without noise", result.twin)]
    for name, found in judged:
        typer.echo(f"{name}: {_line(found)}")
    if secrets := getattr(result, "secrets", None):
        typer.echo(f"planted secrets: {_secrets_line(secrets)}")
        judged.append(("secrets", secrets))
    typer.echo(f"wrote {out / 'attack.json'} and {out / 'attack.png'}")
    if site is not None:
        typer.echo("private to this site: the result follows from its records")
    elif not result.succeeds:  # type: ignore[union-attr]
        typer.echo(
            "too weak: the attack does not succeed without noise either, so it says nothing about "
            "the noise; give more --models, or attack a run of a longer study"
        )
    if any(found.contradicts for _, found in judged):
        error = Refused(
            "the attack finds more than ε allows", todo="do not release; run `fedtune doctor`"
        )
        raise ErrorWithResult(asdict(result), error)
    return asdict(result)


def _attack_sites(
    run: Path,
    records: list[str],
    references: list[Path],
    out: Path,
    other: Path | None,
    received: bool,
) -> dict[str, Any]:
    from fedtune.audit import received as of_updates
    from fedtune.audit.site_inference import attack_sites, lines
    from fedtune.cli.watch import Watch
    from fedtune.core.errors import ConfigError
    from fedtune.runs.run import open_run

    named = {name: path for name, _, path in (text.partition("=") for text in records)}
    if other or len(named) < len(records) or not all(named) or not all(named.values()):
        raise ConfigError(
            "--records: a name is given twice, NAME=FILE is not complete, or --site "
            "or --held-out is given too",
            "NAME=FILE once for each site, and no other option but --reference",
        )
    others = [open_run(folder) for folder in references]
    with Watch(Console(), "attacking"):
        found = attack_sites(open_run(run), named, references=others, out=out)
        traced = of_updates.attack_received(open_run(run), named, out=out) if received else ()
    for line in (*lines(found), *(of_updates.lines(traced) if received else ())):
        typer.echo(line)
    written = ("sites.json", "received.json") if received else ("sites.json",)
    wrote = " and ".join(str(out / name) for name in written)
    typer.echo(f"wrote {wrote}: the figures follow from these records, exactly")
    return asdict(found) | ({"received": list(map(asdict, traced))} if received else {})


def _secrets_line(found: Secrets) -> str:
    private, twin = found.private, found.twin
    bits = math.log2(private.pool)
    return (
        f"exposure {private.mean:.2f} of {bits:.0f} bits (chance {private.chance:.2f}, ε allows "
        f"{found.allowed:.2f}), without noise {twin.mean:.2f}; written by the model: "
        f"{private.extracted} of {private.secrets} (ε allows each with {found.extractable:.2g}), "
        f"without noise {twin.extracted}"
        + ("" if twin.exposed else "; too weak: without noise they are not exposed either")
    )


def _line(found: Membership) -> str:
    def format_interval(three: tuple[float, float, float]) -> str:
        return f"{three[0]:.3f} ({three[1]:.3f} to {three[2]:.3f})"

    return (
        f"area under the curve {format_interval(found.auc)}, ε allows {found.auc_bound:.3f}; "
        f"at 1 % false alarms it finds {format_interval(found.tpr)}, ε allows "
        f"{found.tpr_bound:.3f}; judged: at least {found.surely_found:.3f}, where ε allows "
        f"{found.surely_allowed:.3f} at up to {found.alarms:.1%} false alarms"
    )
