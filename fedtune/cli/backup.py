"""Commands for a coordinator that may be lost: a backup while it runs, and its return."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.exit_codes import command

PANEL = "Between machines"


def add_to(app: typer.Typer) -> None:
    """Register the commands on `app`."""
    for function in (backup, restore):
        command(app, panel=PANEL)(function)


def backup(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The coordinator's study.toml.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The backup, a new file.")],
    home: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The coordinator's home. Without it: beside STUDY."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The run. Without it: the last runs/NAME."),
    ] = None,
) -> dict[str, Any]:
    """Copy a coordinator into one file, also while it runs: plan, CA, keys, registry, log, run.

    The file holds the consortium's private keys: only its owner can read it. Each round deserves
    a new one: what came after a backup is done again, and sites are charged for it again."""
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
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `fedtune backup` wrote.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new folder.")],
) -> dict[str, Any]:
    """Lay out a coordinator from its backup; `fedtune server DIR/study.toml --resume` goes on.

    Never run the old one beside it: at its start the server asks at the old address whether a
    coordinator of this consortium still answers there, and refuses if one does."""
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
