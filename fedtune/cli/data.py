"""Commands on a site's own files of records."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape

from fedtune.cli.exit_codes import command
from fedtune.cli.site import SITE
from fedtune.cli.study import SET
from fedtune.cli.tables import Figures
from fedtune.core.errors import escape_controls

if TYPE_CHECKING:
    from fedtune.core.config import Site, Study
    from fedtune.officer.data_report import DataReport

PLAN = Annotated[
    Path | None,
    typer.Option(
        metavar="STUDY",
        help="Also count tokens, and report what the study of this study.toml would cut or "
        "leave out.",
        show_default=False,
    ),
]
HTML = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write the report as one HTML page that only this user can read (0600).",
        show_default=False,
    ),
]
DATE = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Count records by year of the dates in this column.",
        show_default=False,
    ),
]


ACTIONS = {
    "": "training reads them as they are, unless [data.scan] says redact or leave_out",
    "warn": "training reads them as they are ([data.scan] action = warn)",
    "redact": "training reads each finding as its kind, such as [name] ([data.scan])",
    "leave_out": "training leaves these records out ([data.scan])",
}
ROWS = Annotated[
    bool,
    typer.Option(
        "--rows",
        help="Also list the rows with findings, and the kinds of identifier that were found in "
        "each.",
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`, under `data`. panel: the heading under which --help lists
    `data`."""
    group = typer.Typer(
        no_args_is_help=True, help="Report on and describe the files of a site's records."
    )
    for function in (report, describe, scan):
        command(group)(function)
    app.add_typer(group, name="data", rich_help_panel=panel)


def report(
    site: SITE,
    study: PLAN = None,
    html: HTML = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
    date: DATE = None,
    settings: SET = None,
) -> None:
    """Report on this site's records: columns, unusable rows, classes, lengths, duplicates and
    records per patient; with --study also what that study would cut, cap or reject.

    The report holds exact counts of private records, and no record's content: it is for the site
    alone. Nothing leaves this machine."""
    from fedtune.core.config import load_site
    from fedtune.core.errors import ConfigError
    from fedtune.core.files.writing import check_replaceable
    from fedtune.officer.data_report import data_report

    if settings and study is None:
        raise ConfigError(
            "--set is given, but no study.toml is read", "--study STUDY together with --set"
        )
    loaded = load_site(site)
    if html:
        check_replaceable(html, ".html", ".htm")
    plan = _plan(study, loaded, settings or []) if study else None
    found = data_report(loaded, plan, date=date)
    if html:
        found.save(html)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
        return
    show(Console(), found)
    if html:
        typer.echo(f"wrote {html}: private to this site")


def describe(
    site: SITE,
    public: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the public data sheet to FILE. It holds what a person typed, and "
            "nothing computed from records. Only this sheet may leave the site, and only "
            'if policy.release lists "sheet".',
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Write this site's data sheet (Croissant) beside its records, and attest that it describes
    them.

    sheet.toml, beside site.toml, holds what only people know; if it does not exist, it is written
    as a form to fill in. If policy.data_sheet asks for fields, `fedtune client` joins a study only
    once they are filled in, and only while sheet and records are unchanged since they were
    attested."""
    from fedtune.core.config import load_site
    from fedtune.core.config.sheet import FIELDS
    from fedtune.officer.sheet import describe_data

    made = describe_data(load_site(site), public)
    if made.template:
        typer.echo(f"wrote {made.sheet}: fill it, and run the same command again")
        return asdict(made)
    typer.echo(f"wrote {made.private}: private to this site, with counts and hashes")
    if empty := [name for name in FIELDS if name not in made.held]:
        typer.echo(f"not filled: {', '.join(empty)}")
    if made.public:
        typer.echo(f"wrote {made.public}: only what was typed in {made.sheet}")
    return asdict(made)


def _plan(path: Path, site: Site, settings: list[str]) -> Study:
    """Load a plan, from study.toml or from JSON. What public text adds to the plan is not computed,
    since a report on data does not depend on it.

    - path: the file
    - site: the site whose policy names the plug-ins that may be imported
    - settings: the values of --set"""
    from fedtune.core.config import load_study
    from fedtune.core.vault.policy import permit_plugins
    from fedtune.officer.review import read_plan

    if path.suffix == ".json":
        return read_plan(path, site, settings)
    return load_study(path, lambda study: permit_plugins(study, site), settings)


def show(console: Console, found: DataReport) -> None:
    """Print a data report."""

    console.print(f"[bold]{escape(found.site)}[/bold]  {escape(found.path)}", highlight=False)
    console.print("private to this site: exact counts of its records", style="yellow")
    for heading, rows in found.tables():
        table = Figures(
            title=escape(heading),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE,
            show_header=False,
            pad_edge=False,
        )
        for _ in range(max(map(len, rows), default=0)):
            table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*(escape(escape_controls(cell)) for cell in row))
        console.print(table, highlight=False)


def scan(site: SITE, rows: ROWS = False) -> dict[str, Any]:
    """Scan this site's records for what identifies a person: names, dates, addresses and numbers.

    The scan prints counts by kind, and with --rows the rows concerned, but never a piece of a text.
    Nothing leaves this machine. [data.scan] in site.toml decides what happens to such records in
    training: warn, redact or leave_out. A scan can miss identifiers, and those stay in the records.
    The scan needs fedtune[scan] and reads English."""
    from fedtune.cli.watch import Watch
    from fedtune.core.config import load_site
    from fedtune.officer.data_scan import data_scan

    console = Console()
    with Watch(console, "loading the scan's model"):
        found = data_scan(load_site(site))
    table = Figures(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("kind", "HIPAA (b)(2)(i)"):
        table.add_column(head)
    for head in ("findings", "rows"):
        table.add_column(head, justify="right")
    for kind, paragraph, findings, in_rows in found.table():
        table.add_row(kind, f"({paragraph})", f"{findings:,}", f"{in_rows:,}")
    console.print("private to this site: exact counts of its records", style="yellow")
    console.print(table)
    for row in found.rows if rows else ():
        kinds = ", ".join(f"{kind} {n}" for kind, n in row.kinds.items())
        typer.echo(f"{escape_controls(row.file)}, row {row.row}: {kinds}")
    typer.echo(f"{len(found.rows):,} of {found.records:,} records hold what the scan looks for")
    if found.failed:
        typer.echo(f"{found.failed:,} rows cannot be read or scanned: nothing is said of them")
    typer.echo(ACTIONS[found.action])
    return found.as_dict()
