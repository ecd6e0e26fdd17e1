"""The command for whoever writes a plug-in."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from fedtune.cli.exit_codes import Told, command

Groups = Literal["objectives", "strategies", "modalities", "sources", "converters", "trackers"]


def add_to(app: typer.Typer) -> None:
    """Register the command on `app`."""
    command(app, "check-plugin", panel="Write a plug-in")(check_plugin)


CHECK_PLUGIN_NAME = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Of this release, or an entry point that is installed."),
]
CHECK_PLUGIN_GROUP = Annotated[
    Groups,
    typer.Option(
        metavar="GROUP",
        help="objectives, strategies, modalities, converters or trackers: its entry point's group "
        "is fedtune.GROUP; or sources, of this release.",
    ),
]
CHECK_PLUGIN_OPTION = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="An option of the plug-in; may be repeated.",
        show_default=False,
    ),
]
CHECK_PLUGIN_BASE = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Whose architecture an objective or a modality is tried on, at tiny size. "
        "Without it: a small random text model.",
        show_default=False,
    ),
]
CHECK_PLUGIN_FILE = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Generated records that a source reads, or whose rows a converter is given.",
        show_default=False,
    ),
]
CHECK_PLUGIN_LESS = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The same with one record left out; needed where a line is not a record.",
        show_default=False,
    ),
]


def check_plugin(
    name: CHECK_PLUGIN_NAME,
    group: CHECK_PLUGIN_GROUP = "objectives",
    option: CHECK_PLUGIN_OPTION = None,
    base: CHECK_PLUGIN_BASE = None,
    file: CHECK_PLUGIN_FILE = None,
    less: CHECK_PLUGIN_LESS = None,
) -> dict[str, Any]:
    """Hold a plug-in to what every one of its kind must keep, on generated records.

    objectives and modalities: rows equal a loop of one record, no record moves another's row, a
    removed unit moves the sum by at most C, losses repeat to the last bit. strategies: no update,
    order of arrival, restart. sources: one row at a time, broken files. converters:
    one unit at a time. trackers: events.
    One line for each check, with what was measured and the bound; docs/extending.md shows a plug-in
    of each kind. A check that passes is a measurement, not a proof."""
    from fedtune.audit.contracts import check
    from fedtune.core.errors import InputError, escape_controls

    console = Console()
    bad = 0
    results = list[dict[str, Any]]()
    for result in check(group, name, _options(option or []), base, file, less):
        mark = "[green]ok  [/green]" if result.passed else "[red]BAD [/red]"
        detail = escape_controls(result.note) or f"{result.figure:.3g}, at most {result.bound:g}"
        console.print(f"{mark} {result.name}: {escape(detail)}", highlight=False, soft_wrap=True)
        bad += not result.passed
        results.append(asdict(result))
    if bad:
        counted = "1 check fails" if bad == 1 else f"{bad} checks fail"
        error = InputError(f"{name}: {counted}", todo="do not train with it")
        raise Told({"checks": results}, error)
    return {"checks": results}


def _options(options: list[str]) -> dict[str, Any]:
    """{"beta": 0.1} of beta=0.1; a text stays one. Errors: ConfigError."""
    from fedtune.core.errors import ConfigError

    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--option {option}", "KEY=VALUE")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = {"true": True, "false": False}.get(value, value)
    return values
