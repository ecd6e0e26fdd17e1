"""The commands that package a run for others, and approve the package."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.exit_codes import command
from fedtune.cli.use_run import RUN_FOLDER

if TYPE_CHECKING:
    from fedtune.core.ledger.audit_log import AuditLog
    from fedtune.core.wire.keys import SigningKey

NAMED = Annotated[Path, typer.Option(metavar="DIR", help="The new folder.", show_default=False)]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`."""
    for function in (release, approve):
        command(app, panel=panel)(function)


def release(
    run: RUN_FOLDER,
    out: NAMED,
    details: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What only people can say. Where there is no such file, it is written, to be "
            "filled, and nothing else is done.",
            show_default=False,
        ),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The coordinator's home, whose key signs. Without it: beside the folder of runs.",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Package a finished run as one signed dossier: weights, model card, privacy report, what an
    ethics board and a data protection officer ask for, and a bill of materials.

    A run that does not verify is refused. What only people can say is marked as a blank, unless
    --details says it. `fedtune versions` chooses the version first, in a study with a schedule."""
    from fedtune.core.files.writing import create
    from fedtune.evidence.dossier import release as dossier
    from fedtune.evidence.dossier import seal
    from fedtune.evidence.dossier.content import blanks

    if details and not os.path.lexists(details):
        create(details, dossier.details_template().encode())
        typer.echo(f"wrote {details}: fill it, and run the same command again")
        return {"wrote": str(details)}
    typed = dossier.read_details(details) if details else {}
    made = dossier.release(run, out, details=typed, home=home)
    blank = sum(not typed.get(block["blank"], "").strip() for block in blanks())
    typer.echo(f"wrote {out}: {made.dossier['files']} files; read {out}/dossier.html")
    if not (out / seal.PDF).is_file():
        typer.echo("no dossier.pdf: it needs fpdf2; pip install 'fedtune[dossier]'")
    if not made.private:
        typer.echo("NOT PRIVATE: the model may repeat the records that it was trained on")
    if blank:
        typer.echo(f"{blank} blanks are for people to fill: --details FILE")
    who = "a key made for this simulation" if made.simulated else "the consortium's coordinator"
    typer.echo(f"signed by {who}, to be read out: {made.signer}")
    return {"wrote": str(out), "blanks": blank, **asdict(made)}


def approve(
    folder: Annotated[
        Path, typer.Argument(metavar="DOSSIER", help="A released folder.", show_default=False)
    ],
    trust: Annotated[
        str,
        typer.Option(
            metavar="FINGERPRINT", help="The consortium's, as its coordinator reads it out."
        ),
    ],
    name: Annotated[str, typer.Option(metavar="TEXT", help="Who approves.")],
    role: Annotated[str, typer.Option(metavar="TEXT", help="In which role.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; on one line.")],
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The approver's own signing key; made, for this user alone, where there is none.",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="SITE",
            help="site.toml: sign with this site's key, as it signed its updates.",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Approve a dossier that was received: check it, and sign it with name, role, reason and date.

    With --site the site itself countersigns. `fedtune verify` shows who approved."""
    from fedtune.evidence.dossier.release import approve as sign

    signed_by, log = _key(key, site)
    made = sign(folder, signed_by, trust, name=name, role=role, reason=reason, log=log)
    given = made.dossier["approvals"]
    typer.echo(f"{folder}: approved; {len(given)} approvals")
    for one in given:
        typer.echo(f"  {one['name']}, {one['role']}, {one['date']}: key {one['fingerprint']}")
    return {"approvals": given}


def _key(path: Path | None, site: Path | None) -> tuple[Path | SigningKey, AuditLog | None]:
    """Find the key that approves; of a site, also its audit log."""
    from fedtune.core.config import load_site
    from fedtune.core.errors import ConfigError
    from fedtune.core.ledger.audit_log import AuditLog
    from fedtune.core.ledger.files import traces
    from fedtune.core.ledger.ledger import Ledger

    if (path is None) == (site is None):
        raise ConfigError("--key or --site", "one of the two")
    if path is not None:
        return path, None
    assert site is not None
    loaded = load_site(site)
    if not traces(loaded.site.state):
        raise ConfigError(f"{site}: this site has no key yet", "a site that took part")
    book = Ledger(loaded.site.state)
    return book.key, AuditLog(book.folder, book.key)
