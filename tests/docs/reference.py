"""What there is to document, read from the code: keys, commands, flags, errors and metrics.

python -m tests.docs.reference     # writes docs/reference.md and docs/fedtune.1"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import click
import typer

import fedtune
from fedtune.cli.main import app
from fedtune.core.config import Columns, Site, Study
from fedtune.core.config.hospital import Hospital
from fedtune.core.config.types import Table
from fedtune.core.data.sources import SOURCES
from fedtune.core.errors import FedtuneError
from fedtune.core.objectives import OBJECTIVES
from fedtune.core.progress import OnEvent
from fedtune.core.strategy import STRATEGIES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference.md"
AS_IN_DATA = tuple(
    f"{table}.{name}"
    for table in ("evaluation", "acceptance", "datasets")
    for name in ("consent", "scan", "convert")
)
ELSEWHERE = ("policy.hospital",)  # which no site file may have: it is read from hospital.toml
HEADINGS: dict[tuple[type[Table], str], str] = {
    (Site, "evaluation"): "[evaluation] of a site",
    (Hospital, "hospital"): "[hospital] of a home",
    (Hospital, "policy"): "[policy] of a home",
    (Hospital, "datasets"): "[datasets.NAME]",
    (Hospital, "memberships"): "[memberships.NAME]",
}
HEAD = """# Every command, exported name and error

For whoever looks up a command, an option, an exported name or an error.

Written by `python -m tests.docs.reference` from the code; not edited by hand. `fedtune COMMAND
--help` shows the same of a command. The keys of all files are in
[configuration.md](configuration.md), how the library is used in [library.md](library.md).
"""
Key = tuple[str, str]  # the table's heading, the key
IN_WORDS = {  # defaults too long for a table
    ("[data.scan]", "kinds"): "all",
    ("[policy]", "modules"): "every linear layer that this release knows",
    ("[policy]", "bases"): "the digests that this release pins",
    ("[data]", "path"): "required without `url`",
    ("[evaluation] of a site", "path"): "required without `url`",
    ("[acceptance]", "path"): "required without `url`",
}


def keys() -> dict[Key, str]:
    """Every key of study.toml, site.toml and hospital.toml, and its default as a page shows it."""
    found = {("Columns", key): "–" for key in Columns.model_fields}
    for model in (Study, Site, Hospital):
        for name, table in _tables(model):
            if name in AS_IN_DATA or name in ELSEWHERE:
                continue
            heading = HEADINGS.get((model, name), f"[{name}]")
            for key, field in table.model_fields.items():
                if not _table_in(field.annotation) or key == "columns":
                    default = "required"
                    if not field.is_required():
                        default = shown(field.get_default(call_default_factory=True))
                    found[heading, key] = IN_WORDS.get((heading, key), default)
    return found


def options() -> dict[Key, str]:
    """Every option of a plug-in of this release, and its default."""
    found = {}
    groups: tuple[tuple[str, Any], ...] = (
        ("objective", OBJECTIVES), ("strategy", STRATEGIES), ("source", SOURCES)
    )  # fmt: skip
    for kind, group in groups:
        for name in group.release():
            plugin = group.load(name)
            inherited = getattr(group.kind, "__dataclass_fields__", {})
            for field in dataclasses.fields(plugin):
                if field.name not in inherited:
                    found[f"{kind} `{name}`", field.name] = shown(field.default)
    return found


def shown(default: Any) -> str:
    """A default as the pages show it: as TOML, – for none."""
    if default is None:
        return "–"
    value = list(default) if isinstance(default, tuple) else default
    number = isinstance(value, float) and value.is_integer() and not isinstance(value, bool)
    text = str(value) if isinstance(value, Path) else value
    return f"`{value:.1f}`" if number else f"`{json.dumps(text, ensure_ascii=False)}`"


def _tables(table: type[Table], name: str = "") -> Iterator[tuple[str, type[Table]]]:
    for key, field in table.model_fields.items():
        inner = _table_in(field.annotation)
        if inner and inner is not Columns:
            yield name + key, inner
            yield from _tables(inner, f"{name}{key}.")


def _table_in(annotation: Any) -> type[Table] | None:
    kinds = typing.get_args(annotation) or (annotation,)
    tables = [k for k in kinds if isinstance(k, type) and issubclass(k, Table)]
    return tables[0] if tables else None


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by its full name, in the order in which `--help` lists them."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    yield from _commands("fedtune", group)


def _commands(name: str, group: click.Group) -> Iterator[tuple[str, click.Command]]:
    for word, command in group.commands.items():
        if command.hidden:
            continue
        if isinstance(command, click.Group):
            yield from _commands(f"{name} {word}", command)
        else:
            yield f"{name} {word}", command


def parameters(command: click.Command) -> list[click.Parameter]:
    """A command's arguments and flags, hidden ones (old names, refused) left out."""
    return [p for p in command.params if not getattr(p, "hidden", False)]


def errors() -> list[type[FedtuneError]]:
    """Every error that fedtune raises on purpose, a class before those that extend it."""
    for module in pkgutil.walk_packages(fedtune.__path__, "fedtune."):
        importlib.import_module(module.name)

    def below(kind: type[FedtuneError]) -> Iterator[type[FedtuneError]]:
        for child in sorted(kind.__subclasses__(), key=lambda c: (c.exit_code, c.__name__)):
            if child.__module__.startswith("fedtune."):
                yield child
                yield from below(child)

    return list(below(FedtuneError))


def page() -> str:
    """The whole of docs/reference.md."""
    parts = [HEAD]
    for name, command in commands():
        parts.append(f"## {name}\n\n{_words(command.help)}\n")
        rows = [f"| {_spelled(p)} | {_words(_help(p))} |" for p in parameters(command)]
        if rows:
            parts.append("\n".join(["| flag | meaning |", "|---|---|", *rows, ""]))
    parts.append("## The library\n\n" + _exported())
    parts.append("## Exit codes and errors\n\n" + _codes())
    return "\n".join(parts)


def _exported() -> str:
    rows = [f"| `{name}` | {summary(getattr(fedtune, name))} |" for name in fedtune.__all__]
    return "\n".join(["| `fedtune.` | |", "|---|---|", *rows, ""])


def _codes() -> str:
    said = "0: done; 130: stopped by Ctrl-C; 141: nobody reads the output. Every error says what"
    rows = [f"| `{e.__name__}` | {e.exit_code} | {_words(e.__doc__, 1)} |" for e in errors()]
    table = ["| error | exit code | meaning |", "|---|---|---|"]
    more = "happened and, where this helps, what was expected and what to do."
    return "\n".join([said, more, "", *table, *rows, ""])


def summary(value: Any) -> str:
    """The first sentence or so of a docstring: what the value is."""
    if isinstance(value, str):
        return "Version of this release."
    if value is OnEvent:  # an alias has no docstring
        return "A callback `(kind, facts)` for what happens while a function works."
    return _words(value.__doc__, 1)


def _spelled(parameter: click.Parameter) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if isinstance(parameter, click.Argument):
        return f"`{parameter.metavar or (parameter.name or '').upper()}`"
    kind = parameter.type
    value = parameter.metavar or ""
    if isinstance(kind, click.Choice):
        value = " ".join(str(c.value if isinstance(c, Enum) else c) for c in kind.choices)
    default = parameter.default
    fixed = default not in (None, False, "", (), []) and not callable(default)
    text = f"{names} {value}".strip()
    plain = str(default.value if isinstance(default, Enum) else default)
    return f"{text} (default `{plain}`)" if fixed else text


def _help(parameter: click.Parameter) -> str:
    return getattr(parameter, "help", None) or ""


def _words(text: str | None, paragraphs: int = 9) -> str:
    kept = (text or "").strip().split("\n\n")[:paragraphs]
    return " ".join(" ".join(kept).split()).replace("|", "\\|")


if __name__ == "__main__":
    from tests.docs import man

    PAGE.write_text(page(), encoding="utf-8")
    man.PAGE.write_text(man.page(), encoding="utf-8")
