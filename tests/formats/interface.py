"""What files, scripts and programs of users rely on, read from the code: keys and their defaults,
commands and flags, Python names, exit codes, and the numbers of the wire and of formats.

    python -m tests.formats.interface     # writes tests/formats/interface.json, at a release

Groups of members: `study.toml [lora]` has `rank`, `fedtune plan` has `--size`, `fedtune.plan()` has
`study`. An entry is stable unless docs/versions.md lists it as experimental; interface.json notes
which it was. What is compared with it may add, and is told apart by `changes`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import click
from packaging.version import Version
from pydantic import TypeAdapter

import fedtune
from fedtune.core.config import Columns, Site, Study
from fedtune.core.config.hospital import Hospital
from fedtune.core.data.sources import SOURCES
from fedtune.core.ledger import chain
from fedtune.core.objectives import OBJECTIVES
from fedtune.core.strategy import STRATEGIES
from fedtune.core.wire.protocol import PROTOCOL
from fedtune.flower import enrol
from tests.docs import reference

KEPT = Path(__file__).with_name("interface.json")
CHANGELOG = reference.ROOT / "CHANGELOG.md"
VERSIONS = reference.ROOT / "docs" / "versions.md"
REQUIRED = "required"
FILES = {Study: "study.toml", Site: "site.toml", Hospital: "hospital.toml"}
_FORMAT = re.compile(r'"(fedtune-[a-z]+)-(\d+)"')
_SECTION = re.compile(r"^## (\d+\.\d+\.\d+)( \(unreleased\))?$", re.MULTILINE)

# default: as text; takes: types and words that it accepts; experimental. Empty ones are left out.
Entry = dict[str, Any]
Interface = dict[str, dict[str, Entry]]  # by group and member


def interface() -> Interface:
    """Everything below, with what docs/versions.md lists as experimental marked."""
    found: Interface = {}
    patterns = experimental()
    for read in (_keys, _options, _commands, _python, _numbers):
        for group, member, default, takes in read():
            entry = {"default": default, "takes": sorted(set(takes))}
            names = (name(group), name(group, member))
            entry["experimental"] = any(
                fnmatchcase(said, pattern) for pattern in patterns for said in names
            )
            kept = {what: value for what, value in entry.items() if value}
            found.setdefault(group, {})[member] = kept
    return found


def experimental() -> list[str]:
    """The names and patterns in the table of docs/versions.md."""
    text = VERSIONS.read_text(encoding="utf-8").partition("\n## Experimental\n")[2]
    rows = [row.split("|") for row in text.partition("\n## ")[0].splitlines() if "|" in row]
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row[2])]


def name(group: str, member: str = "") -> str:
    """What a person calls an entry, and CHANGELOG.md names it by: `lora.rank`,
    `fedtune plan --size`, `fedtune.plan(size)`, `fedtune.Plan.sites`; without a member the group's
    own name."""
    table = re.fullmatch(r".*\.toml \[(.+)\]", group)
    if table:
        return f"{table[1]}.{member}" if member else f"[{table[1]}]"
    if not member:
        return group.removesuffix("()")
    if group.endswith("()"):
        return f"{group[:-1]}{member})"
    if group.startswith("fedtune."):
        return f"{group}.{member}"
    return member if group in ("numbers", "exit codes") else f"{group} {member}"


Row = tuple[str, str, str, list[str]]


def _keys() -> Iterator[Row]:
    shown = reference.keys()
    for model, file in FILES.items():
        for table, fields in [*reference._tables(model), ("columns", Columns)]:
            heading = "Columns" if table == "columns" else f"[{table}]"
            heading = reference.HEADINGS.get((model, table), heading)
            for key, field in fields.model_fields.items():
                if (heading, key) in shown:
                    takes = _accepted(TypeAdapter(field.rebuild_annotation()).json_schema())
                    yield f"{file} [{table}]", key, shown[heading, key].strip("`"), takes


def _accepted(schema: Any, defined: Any = None) -> list[str]:
    """JSON's types and the fixed words that a schema accepts; none of them: left out."""
    defined = schema.get("$defs", defined or {})
    if "$ref" in schema:
        return _accepted(defined[schema["$ref"].rsplit("/", 1)[1]], defined)
    if "enum" in schema or "const" in schema:
        return [json.dumps(word) for word in schema.get("enum", [schema.get("const")])]
    among = [schema[key] for key in ("anyOf", "oneOf", "allOf") if key in schema]
    if among:
        return [word for each in among[0] for word in _accepted(each, defined)]
    kind = schema.get("type", "any")
    return [kind] if kind != "null" else []


def _options() -> Iterator[Row]:
    for kind, registry in {
        "objective": OBJECTIVES,
        "strategy": STRATEGIES,
        "source": SOURCES,
    }.items():
        for plugin in registry.release():
            yield f"{kind}s", plugin, "", []
    for (group, key), default in reference.options().items():
        yield group.replace("`", ""), key, default.strip("`"), []


def _commands() -> Iterator[Row]:
    for command, described in reference.commands():
        yield command, "command", "", []
        place = 0
        for parameter in reference.parameters(described):
            default = REQUIRED if parameter.required else _text(parameter.default)
            takes = _accepted_by(parameter)
            if isinstance(parameter, click.Argument):
                place += 1
                yield command, f"argument {place}", default, takes
            for flag in () if isinstance(parameter, click.Argument) else parameter.opts:
                yield command, flag, default, takes
            for flag in parameter.secondary_opts:
                yield command, flag, default, takes


def _accepted_by(parameter: click.Parameter) -> list[str]:
    if isinstance(parameter.type, click.Choice):
        return [str(getattr(choice, "value", choice)) for choice in parameter.type.choices]
    many = parameter.nargs != 1 or getattr(parameter, "multiple", False)
    return [*(["many"] if many else []), parameter.type.name.removesuffix(" range")]


def _python() -> Iterator[Row]:
    for exported in fedtune.__all__:
        value = getattr(fedtune, exported)
        if isinstance(value, type):
            yield f"fedtune.{exported}", "class", "", []
            fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
            for field in fields:
                if not field.name.startswith("_"):
                    yield f"fedtune.{exported}", field.name, "", []
        elif inspect.isfunction(value):
            yield f"fedtune.{exported}()", "function", "", []
            for place, parameter in enumerate(inspect.signature(value).parameters.values()):
                fixed = parameter.default is not parameter.empty
                variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
                default = _text(parameter.default) if fixed or variadic else REQUIRED
                by_place = parameter.kind is not parameter.KEYWORD_ONLY
                takes = ["keyword", *([f"place {place}"] if by_place else [])]
                yield f"fedtune.{exported}()", parameter.name, default, takes
        else:
            yield f"fedtune.{exported}", "name", "", []


def _numbers() -> Iterator[Row]:
    for error in reference.errors():
        if error.__name__ in fedtune.__all__:
            yield "exit codes", error.__name__, str(error.exit_code), []
    numbers = {"PROTOCOL": PROTOCOL, "ledger": chain.FORMAT, "registry": enrol.FORMAT}
    for source in sorted(Path(fedtune.__file__).parent.rglob("*.py")):
        numbers |= dict(_FORMAT.findall(source.read_text(encoding="utf-8")))
    for what, number in numbers.items():
        yield "numbers", what, str(number), []


def _text(default: Any) -> str:
    """A default as text, – for none."""
    value = getattr(default, "value", default)
    plain = isinstance(value, bool | int | float | str | Path)
    return str(value) if plain and value is not False and value != "" else "–"


class Change(NamedTuple):
    """What somebody who relied on an entry must hear of."""

    name: str
    what: str
    stable: bool


def changes(before: Interface, now: Interface) -> list[Change]:
    """Whatever is gone, has another default, takes less than it took, is required and was not
    there, or was stable and no longer is. What is added beside is none."""
    found: list[Change] = []

    def add(named: str, what: str, entry: Entry) -> None:
        found.append(Change(named, what, not entry.get("experimental")))

    for group, members in before.items():
        if group not in now:
            stable = [entry for entry in members.values() if not entry.get("experimental")]
            add(name(group), "is gone", [*stable, *members.values()][0])
            continue
        for member, was in members.items():
            entry, named = now[group].get(member), name(group, member)
            if entry is None:
                add(named, "is gone", was)
                continue
            if entry.get("default") != was.get("default"):
                add(named, f"was {was.get('default')}, is {entry.get('default')}", was)
            if lost := sorted({*was.get("takes", ())} - {*entry.get("takes", ())}):
                add(named, f"no longer takes {', '.join(lost)}", was)
            if entry.get("experimental") and not was.get("experimental"):
                add(named, "was stable, is experimental", was)
        for member in now[group].keys() - members.keys():
            if now[group][member].get("default") == REQUIRED:
                add(name(group, member), "is required, and was not there", now[group][member])
    return found


def unnamed(found: list[Change], kept_of: str, changelog: str) -> list[Change]:
    """Those of `found` that no entry under Changed or Removed names, in a section of CHANGELOG.md
    that is newer than `kept_of`, the release in interface.json (or its own, until it is released).
    A stable entry changes with the second number of a version alone."""
    starts = [*_SECTION.finditer(changelog)]
    ends = [start.start() for start in starts[1:]] + [len(changelog)]
    said: dict[bool, set[str]] = {True: set(), False: set()}
    for start, end in zip(starts, ends, strict=True):
        own, before = Version(start[1]), Version(kept_of)
        if own < before or (own == before and not start[2]):
            continue
        words = _named_as_changed(changelog[start.end() : end])
        said[False] |= words
        if own == before or own.release[:2] > before.release[:2]:
            said[True] |= words
    return [change for change in found if change.name not in said[change.stable]]


def _named_as_changed(section: str) -> set[str]:
    parts = re.split(r"^### (.+)$", section, flags=re.MULTILINE)
    headed = zip(parts[1::2], parts[2::2], strict=True)
    texts = [text for heading, text in headed if heading.split()[0] in ("Changed", "Removed")]
    return {word for text in texts for word in re.findall(r"`([^`]+)`", text)}


def kept() -> tuple[str, Interface]:
    """The release that interface.json describes, and its entries."""
    found = json.loads(KEPT.read_text(encoding="utf-8"))
    return found["release"], found["entries"]


def write() -> list[Change]:
    """Write interface.json; or, where something of a release that is out was changed and
    CHANGELOG.md does not say so, leave it and return that."""
    now = interface()
    if KEPT.exists():
        release, before = kept()
        changelog = CHANGELOG.read_text(encoding="utf-8")
        out = f"## {release} (unreleased)\n" not in changelog
        if out and (left := unnamed(changes(before, now), release, changelog)):
            return left
    KEPT.write_text(dumped(fedtune.__version__, now), encoding="utf-8")
    return []


def dumped(release: str, entries: Interface) -> str:
    """interface.json: an entry a line."""
    groups = []
    for group, members in sorted(entries.items()):
        lines = [
            f"  {json.dumps(member)}: {json.dumps(entry, ensure_ascii=False)}"
            for member, entry in sorted(members.items())
        ]
        groups.append(f" {json.dumps(group)}: {{\n" + ",\n".join(lines) + "\n }")
    head = f'{{\n"release": {json.dumps(release)},\n"entries": {{\n'
    return head + ",\n".join(groups) + "\n}\n}\n"


if __name__ == "__main__":
    left = write()
    for change in left:
        print(f"{change.name} {change.what}: name it in CHANGELOG.md, under Changed or Removed")
    sys.exit(bool(left))
