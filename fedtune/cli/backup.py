"""Commands that back a coordinator up while it runs, and restore it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.exit_codes import command


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`. panel: the heading under which --help lists them."""
    for function in (backup, restore):
        command(app, panel=panel)(function)


def backup(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The coordinator's study.toml.")],
    to: Annotated[
        Path, typer.Option("--to", metavar="FILE", help="The file to write; it must not exist yet.")
    ],
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The coordinator's home. Default: the folder named coordinator beside STUDY.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The run folder to copy. Default: the newest runs/NAME beside STUDY.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Copy a coordinator into one file, even while it runs: plan, CA, keys, registry, log and run.

    The file holds the consortium's private keys: only its owner can read it. Make a new backup
    after each round: a restored coordinator runs the rounds after its backup again, and the sites
    are charged for them again."""
    from fedtune.core.config import load_study
    from fedtune.core.ledger.audit_log import AuditLog
    from fedtune.core.wire.keys import SigningKey
    from fedtune.runs.choice import folder_for
    from fedtune.server.backup import backup as write
    from fedtune.server.backup import home_with_ca

    loaded, home = load_study(study), home_with_ca(home or study.parent / "coordinator")
    run = out or folder_for(loaded.study.name, resume=True, runs=study.parent / "runs")
    begun = out is not None or run.is_dir()
    AuditLog(home, SigningKey.at(home / "signing.key")).add("backup", "--to")
    manifest = write(loaded, study, home, run if begun else None, to)
    typer.echo(f"wrote {to}: {len(manifest['files'])} files, with private keys")
    if not begun:
        typer.echo("run  none yet")
    return {"file": to, "at": manifest["at"], "files": sorted(manifest["files"])}


def restore(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file that `fedtune backup` wrote.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder to create.")],
) -> dict[str, Any]:
    """Restore a coordinator from its backup; `fedtune server DIR/study.toml --resume` continues it.

    Never run the old coordinator beside the restored one: the server asks at its start whether a
    coordinator of this consortium still answers at the old address, and refuses to start if one
    does."""
    from fedtune.core.ledger.audit_log import AuditLog
    from fedtune.core.wire.keys import SigningKey
    from fedtune.server.backup import HOME
    from fedtune.server.backup import restore as lay_out

    manifest = lay_out(file, to)
    home = to / HOME
    AuditLog(home, SigningKey.at(home / "signing.key")).add("restore", "--to", at=manifest["at"])
    typer.echo(
        f"restored {manifest['study']} as of {manifest['at']} in {to}\n"
        f"next   fedtune server {to}/study.toml --resume, with the options of the old one"
    )
    return {"folder": to, "study": manifest["study"], "at": manifest["at"]}
