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

NAMED = Annotated[
    Path, typer.Option(metavar="DIR", help="The folder to create.", show_default=False)
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`. panel: the heading under which --help lists them."""
    for function in (release, approve):
        command(app, panel=panel)(function)


def release(
    run: RUN_FOLDER,
    out: NAMED,
    details: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file with the statements that fedtune cannot know, such as the legal "
            "basis. If it does not exist, the command only writes it as a form to fill "
            "in.",
            show_default=False,
        ),
    ] = None,
    home: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The coordinator's home, a folder; its key signs the dossier. Default: the folder "
            "named coordinator beside the folder of runs.",
            show_default=False,
        ),
    ] = None,
    sections: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder of files NAME.toml with further sections for assurance.html, such "
            "as a hospital's own rules.",
            show_default=False,
        ),
    ] = None,
    attacks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="A folder that `fedtune attack RUN` or `fedtune audit STUDY --run RUN` wrote; "
            "assurance.html states what was found. May be repeated.",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Package a finished run as one signed dossier: weights, model card, privacy report, the
    answers for an ethics board, a data protection officer and a governance office, and a bill of
    materials.

    A run that does not verify is refused. Statements that only people can make are marked as
    blanks, unless --details holds them. In a study with a schedule, choose the version with
    `fedtune versions` first."""
    from fedtune.core.files.writing import create
    from fedtune.evidence.dossier import release as dossier
    from fedtune.evidence.dossier import seal
    from fedtune.evidence.dossier.assurance import sections as assurance
    from fedtune.evidence.dossier.content import blanks

    told = assurance.all_sections(sections)
    if details and not os.path.lexists(details):
        create(details, dossier.details_template(told).encode())
        typer.echo(f"wrote {details}: fill it, and run the same command again")
        return {"wrote": str(details)}
    typed = dossier.read_details(details, told) if details else {}
    made = dossier.release(
        run, out, details=typed, home=home, sections=sections, attacks=attacks or []
    )
    names = [block["blank"] for block in blanks()]
    names += [assurance.key(*one) for one in assurance.blanks(told)]
    blank = sum(not typed.get(name, "").strip() for name in names)
    typer.echo(
        f"wrote {out}: {made.dossier['files']} files; read {out}/dossier.html, and "
        f"{out}/assurance.html for a governance office"
    )
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
        Path,
        typer.Argument(
            metavar="DOSSIER", help="The folder that `fedtune release` wrote.", show_default=False
        ),
    ],
    trust: Annotated[
        str,
        typer.Option(
            metavar="FINGERPRINT",
            help="Refuse the dossier unless the consortium with this fingerprint, as its "
            "coordinator read it out, signed it.",
        ),
    ],
    name: Annotated[str, typer.Option(metavar="TEXT", help="Name of the person who approves.")],
    role: Annotated[str, typer.Option(metavar="TEXT", help="Role of the person who approves.")],
    reason: Annotated[
        str, typer.Option(metavar="TEXT", help="Reason for the approval, on one line.")
    ],
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The approver's signing key; if it does not exist, it is created, readable by "
            "this user only. Give either this or --site.",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="SITE",
            help="Sign with the key of this site.toml's site, which also signed its updates. Give "
            "either this or --key.",
            show_default=False,
        ),
    ] = None,
) -> dict[str, Any]:
    """Approve a dossier that was received: check it, and sign it with name, role, reason and date.

    With --site the site itself approves it with its own key. `fedtune verify` shows who
    approved."""
    from fedtune.evidence.dossier.release import approve as sign

    signed_by, log = _key(key, site)
    made = sign(folder, signed_by, trust, name=name, role=role, reason=reason, log=log)
    given = made.dossier["approvals"]
    typer.echo(f"{folder}: approved; {len(given)} approvals")
    for one in given:
        typer.echo(f"  {one['name']}, {one['role']}, {one['date']}: key {one['fingerprint']}")
    return {"approvals": given}


def _key(path: Path | None, site: Path | None) -> tuple[Path | SigningKey, AuditLog | None]:
    """Return the signer and the audit log of an approval: (`path`, None) for a person's key file,
    or the signing key and the audit log of the site whose site file is `site`.

    Errors: ConfigError unless exactly one of the two is given, or if the site has no key yet."""
    from fedtune.core.config import load_site
    from fedtune.core.errors import ConfigError
    from fedtune.core.ledger.audit_log import AuditLog
    from fedtune.core.ledger.ledger import signing_key
    from fedtune.homes.opening import find_ledger

    if (path is None) == (site is None):
        raise ConfigError("--key and --site are both given, or neither", "exactly one of the two")
    if path is not None:
        return path, None
    assert site is not None
    loaded = load_site(site)
    if (book := find_ledger(loaded.home)) is None:
        raise ConfigError(f"{site}: this site has no key yet", "a site that took part")
    return signing_key(loaded, book), AuditLog(book.folder, book.key)
