"""The command that shows and verifies an audit log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.exit_codes import command

PATH = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="A site.toml, a coordinator's home, or a folder with audit.jsonl.",
        show_default=False,
    ),
]
HEAD = Annotated[
    str,
    typer.Option(
        metavar="SEQ:HASH",
        help="Check that the log holds this entry, which somebody noted earlier as its newest "
        "(its head).",
        show_default=False,
    ),
]
SIGNER = Annotated[
    str,
    typer.Option(
        metavar="KEY",
        help="Check that this public key signed the log. Default: the public key of the signing "
        "key that lies beside the log; a copy of the log may have none beside it.",
        show_default=False,
    ),
]


RUN = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="PATH",
        help="Also check that this log is complete up to a run or dossier: each update that this "
        "site signed for the run names an entry, which this log must hold.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(log)


def log(
    path: PATH,
    verify: Annotated[
        bool, typer.Option("--verify", help="Print the verdict only, without the entries.")
    ] = False,
    head: HEAD = "",
    run: RUN = None,
    signer: SIGNER = "",
    event: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Show entries of this kind only, such as sign or withdraw."
        ),
    ] = "",
) -> dict[str, Any]:
    """Show who did what at this site or coordinator, when, and under which rule.

    Every entry is signed and holds the hash of the one before it. All entries are checked first; a
    log that was changed ends with exit code 2. The log alone cannot show that its newest entries
    were cut off: compare a site's log with a run in which the site took part (--run), wherever that
    run is kept, and any log with a head that somebody noted (--head)."""
    from rich.console import Console

    from fedtune.cli.console import acts_table
    from fedtune.core.errors import ConfigError, InputError
    from fedtune.core.ledger import audit_log

    if run is not None and head:
        raise ConfigError("--head and --run are both given", "only one of the two")
    if event and event not in audit_log.EVENTS:
        raise InputError(
            f"--event {event[:40]}: not known", ", ".join(sorted(audit_log.EVENTS)), "choose one"
        )
    folder = _folder(path)
    if run is not None:
        from fedtune.officer.noted_in_run import noted_in

        head = noted_in(run, folder, _memberships(path))
    checked = audit_log.verify(folder, signer or audit_log.signer_at(folder), head)
    shown = [entry for entry in checked.entries if event in ("", entry["event"])]
    if not verify:
        Console().print(acts_table(shown))
    typer.echo(
        f"{len(checked.entries)} entries, whole and signed by {checked.signer}\nhead {checked.head}"
    )
    return {
        "entries": [] if verify else shown,
        "count": len(checked.entries),
        "signer": checked.signer,
        "head": checked.head,
    }


def _memberships(path: Path) -> set[str]:
    """Return the names of the memberships that may have written to an audit log; "" stands for a
    site with a ledger of its own. path: a site.toml, or a folder with the log. Errors:
    ConfigError."""
    from fedtune.core.config import load_site
    from fedtune.core.config.hospital import FILE
    from fedtune.core.config.load import load_hospital

    if not path.is_dir():
        return {*load_site(path, keys_may_differ=True).policy.own_memberships}
    return {"", *(load_hospital(path).memberships if (path / FILE).exists() else ())}


def _folder(path: Path) -> Path:
    """Return the folder of an audit log: `path` itself, or that of the ledger if `path` is a
    site.toml. Errors: ConfigError."""
    if path.is_dir():
        return path
    from fedtune.core.config import load_site

    return load_site(path, keys_may_differ=True).home
