"""The command that keeps evidence of an incident, and checks what was kept."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.exit_codes import ErrorWithResult, command


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(evidence)


def evidence(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="With --to: the site.toml, or the coordinator's home, whose evidence to keep. "
            "Without --to: a folder of kept evidence to check.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="The folder to create.", show_default=False),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="With --to: also keep this run's plan, report, evidence and signature.",
            show_default=False,
        ),
    ] = None,
    noticed: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="With --to: when somebody noticed the incident, in UTC, as 2026-03-01T09:30:00Z. "
            "Default: now.",
            show_default=False,
        ),
    ] = "",
    signer: Annotated[
        str,
        typer.Option(
            metavar="KEY|PATH",
            help="Without --to: the key that must have signed the evidence: a public key, or the "
            "site.toml or coordinator's home to which it belongs. With another key the exit code "
            "is 2.",
            show_default=False,
        ),
    ] = "",
) -> dict[str, Any]:
    """Keep evidence after an incident, or check evidence that was kept.

    With --to, copy a site's ledger, logs, receipts and plans, or a coordinator's registry and logs,
    to a new folder of read-only files under one signature. No record text, no key and no salt is
    copied. The ledger's entries count patients who arrived or withdrew, in every membership of a
    hospital.

    Without --to, check every copy and the signature. If one was changed, the exit code is 2.
    Without --signer the exit code is 3, because anybody can sign a folder with a key of their
    own."""
    from fedtune.core.config import load_site
    from fedtune.core.errors import Refused
    from fedtune.core.ledger.audit_log import signer_at
    from fedtune.evidence import incident

    if to is None:
        named = Path(signer)
        if named.is_file():
            key = signer_at(load_site(named, keys_may_differ=True).site.state)
        else:
            key = signer_at(named) if signer and named.is_dir() else signer
        kept = incident.check(path, key)
        typer.echo(f"{path}: {kept.files} files, as they were kept at {kept.made} by {kept.by}")
    elif path.is_dir():
        kept = incident.keep_of_coordinator(path, to, noticed, run)
    else:
        kept = incident.keep_of_site(load_site(path, keys_may_differ=True), to, noticed, run)
    if to:
        typer.echo(f"kept {kept.files} files in {to}, read-only")
    typer.echo(
        f"signed by    {kept.signer}\n"
        f"sha256       {kept.digest} of its manifest: note it elsewhere\n"
        f"noticed      {kept.noticed}\n"
        f"72 hours     {kept.notify} (GDPR Art. 33(1), where it applies)"
    )
    if not (to or signer):
        unknown = Refused(
            "consistent, signer unknown: whoever made this folder may have made its key too",
            "the public key of the site or coordinator that kept the evidence",
            "give this key with --signer, not copied from here; or compare the sha256 with the one "
            "that was noted elsewhere",
        )
        raise ErrorWithResult(asdict(kept), unknown)
    return asdict(kept)
