"""Compose hospital.toml, and edit hospital.toml and site.toml as text, so that a person's comments
stay.

Each new text is loaded, as a check, before it replaces the old file."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from fedtune.core.config.hospital import FILE, CeilingTable, Hospital, RegisteredData
from fedtune.core.config.load import load_hospital
from fedtune.core.errors import ConfigError
from fedtune.core.files import reading
from fedtune.core.files.writing import create, replace

T = TypeVar("T")
BARE = re.compile(r"[A-Za-z0-9_-]+")
HEADER = re.compile(r"\s*\[")
HOSPITAL = """\
# hospital.toml: the home that all memberships of one hospital share. It stays on this machine:
# nothing of it is ever sent. One ledger lies beside it, from which every consortium is paid. A key
# that is not known is an error, not a default. `fedtune memberships HOME` shows who spent what.

[hospital]
name = {name}
declared_size = {declared_size}    # units of the largest dataset, as a person states it

[policy]               # what all consortia together may spend of each dataset
max_epsilon = {max_epsilon}      # for all that was ever released, at twice max_delta
max_fallback_epsilon = {max_fallback_epsilon}      # the same if secure aggregation fails
max_delta = {max_delta}      # twice this is below 1 / declared_size
max_rounds = {max_rounds}      # most rounds of all memberships; each takes 4 KiB of disk

# The datasets that memberships may train on. Overlap is declared here and never inferred: unless
# one names the other in disjoint_from, what is spent on either counts against both.
#
# [datasets.records]
# path = "/data/notes.jsonl"   # or url = "postgresql://user@host/db"
# patient = "patient_id"       # column of the patients' keys, for all memberships
# disjoint_from = ["other"]    # datasets that share no patient with this one
# cohort = "first"             # name of the newest units; change it when patients are added
# consent = {{ column = "consent", values = ["yes"] }}
"""
MEMBERSHIPS = """
# The memberships. Each has a site.toml, a signing key, network keys and a policy of its own.
# `fedtune memberships HOME --add`, `--adopt` and `--end` keep these tables; shares may be edited.
#
# [memberships.NAME]
# site = "/consortia/north/site.toml"
# max_epsilon = 4.0            # its share of the ceiling; without it, the whole ceiling
# max_fallback_epsilon = 4.0
# earlier = true               # what was paid before the ledger was the hospital's is its own
"""


def write_hospital(
    name: str, size: int, ceilings: CeilingTable, data: Mapping[str, RegisteredData]
) -> str:
    """Compose hospital.toml, without a membership.

    - name: the hospital's name
    - size: the number of units of its largest dataset, as a person declares it
    - ceilings: the most that all memberships together may spend of a dataset
    - data: name → dataset, for the datasets that memberships may train on; every path is absolute

    Returns: the content of the file, with comments for the person who edits it."""
    figures = {key: quote(value) for key, value in ceilings.model_dump().items()}
    text = HOSPITAL.format(name=quote(name), declared_size=size, **figures)
    return text + "".join(write_data(*one) for one in data.items()) + MEMBERSHIPS


def write_data(name: str, data: RegisteredData) -> str:
    """Compose the table of a dataset, to be added to hospital.toml. name: the dataset's name. data:
    its settings, in which every path is absolute."""
    given = data.model_dump(exclude_defaults=True)
    return _table(f"datasets.{_key(name)}", given)


def write_membership(
    name: str, site: Path, max_epsilon: float | None = None, *, earlier: bool = False
) -> str:
    """Compose the table of a membership, to be added to hospital.toml.

    - name: the membership's name
    - site: the absolute path of its site.toml
    - max_epsilon: its share of the hospital's ceiling; None allows the whole ceiling
    - earlier: whether the charges that were made before this ledger became the hospital's count as
      charges of this membership"""
    given = {"site": site, "max_epsilon": max_epsilon, "earlier": earlier or None}
    return _table(f"memberships.{_key(name)}", given)


def write_home(home: Path, membership: str) -> str:
    """Return the text of the table [hospital], which makes a site.toml that of a membership. home:
    the folder of the hospital's home. membership: the membership's name."""
    return (
        "\n[hospital]             # this site pays from the ledger of a hospital's home, under\n"
        f"home = {quote(home)}   # the ceilings of its hospital.toml\n"
        f"membership = {quote(membership)}\n"
    )


def quote(value: Any) -> str:
    """Return a number, text, path, list or table as TOML. Numbers must be finite. A key of a table
    whose value is None is left out; elsewhere None is not allowed."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(quote, value))}]"
    if isinstance(value, dict):
        parts = (f"{_key(key)} = {quote(each)}" for key, each in value.items() if each is not None)
        return f"{{ {', '.join(parts)} }}"
    return json.dumps(str(value), ensure_ascii=False)


def _key(name: str) -> str:
    return name if BARE.fullmatch(name) else json.dumps(name)


def _table(name: str, values: Mapping[str, Any]) -> str:
    lines = [f"{key} = {quote(value)}" for key, value in values.items() if value is not None]
    return "\n".join(["", f"[{name}]", *lines, ""])


# ------------------------------------------------------------------------------------- edits


def without_table(text: str, *path: str) -> str:
    """Return `text`, the content of a TOML file, without one of its tables. path: the parts of the
    table's name, such as "memberships", "north". Errors: ConfigError if the file has no such table
    under a header of its own."""
    lines = text.splitlines(keepends=True)
    start, end = _find(lines, path)
    while start + 1 < end < len(lines) and not lines[end - 1].partition("#")[0].strip():
        end -= 1  # a comment above the next table belongs to the next table
    return "".join(lines[:start] + lines[end:])


def with_key(text: str, table: str, key: str, value: str | None) -> str:
    """Return the text of a TOML file in which one key of a table is set to `value`, or is removed
    if `value` is None.

    - text: the content of a TOML file; its comments stay
    - table: the name of a table of the file, without dots
    - key: the name of the key; it is added below the table's header if it is not there
    - value: the new value, a text

    Errors: ConfigError if the file has no such table under a header of its own."""
    lines = text.splitlines(keepends=True)
    start, end = _find(lines, (table,))
    written = [f"{key} = {quote(value)}\n"] if value is not None else []
    for first in range(start + 1, end):
        if re.match(rf"\s*{re.escape(key)}\s*=", lines[first]):
            last = next(n for n in range(first + 1, end + 1) if _is_whole(lines[first:n]))
            return "".join(lines[:first] + written + lines[last:])
    return "".join(lines[: start + 1] + written + lines[start + 1 :])


def _is_whole(lines: list[str]) -> bool:
    try:
        tomllib.loads("".join(lines))
    except ValueError:
        return False
    return True


def _find(lines: list[str], path: Iterable[str]) -> tuple[int, int]:
    """Return the index of a table's header in `lines`, and the index of the first line that no
    longer belongs to the table. path: the parts of the table's name. Errors: ConfigError if no line
    is that header."""
    wanted = list(path)
    for start, line in enumerate(lines):
        with suppress(ValueError):
            if HEADER.match(line) and _path_of(tomllib.loads(line)) == wanted:
                rest = range(start + 1, len(lines))
                return start, next((n for n in rest if _begins(lines[n])), len(lines))
    raise ConfigError(
        f"[{'.'.join(wanted)}]: is not written as a table of its own",
        f"a line [{'.'.join(wanted)}]",
        "write the table under a line of its own, and run the command again",
    )


def _begins(line: str) -> bool:
    """Return whether this line of a TOML file is the header of a table."""
    with suppress(ValueError):
        return bool(HEADER.match(line)) and bool(tomllib.loads(line))
    return False


def _path_of(table: Any) -> list[str]:
    """Return the parts of a table's name, such as ["memberships", "north"]. table: what a TOML
    parser makes of the table's header alone: nested dicts."""
    path = list[str]()
    while isinstance(table, dict) and table:
        ((name, table),) = table.items()
        path.append(name)
    return path


def check_text(path: Path, text: str, load: Callable[[Path], T]) -> T:
    """Write the text to a draft beside `path`, and return what `load` reads from the draft, which
    is then deleted. path: the file for which the text is meant; it is not changed. load: reads and
    checks a file. Errors: those of `load`, with the name of `path` in a ConfigError."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        return load(replace(draft, text.encode(), private=True))
    except ConfigError as error:
        happened = error.happened.replace(str(draft), str(path))
        raise ConfigError(happened, error.expected, error.todo) from None
    finally:
        draft.unlink(missing_ok=True)


def load_hospital_text(home: Path, text: str) -> Hospital:
    """Read a text as the hospital.toml of `home`. Errors: ConfigError."""
    return check_text(home / FILE, text, lambda draft: load_hospital(home, draft.name))


def keep_copy(path: Path) -> Path:
    """Copy a settings file to a file beside it that only this user can read, and return the copy's
    path. If there is a copy from today with the same content, return its path, and make none.
    Errors: ConfigError if the file cannot be read, or has 999 copies already."""
    content = reading.content(path, "a settings file", kind=ConfigError)
    for number in range(1, 1000):
        copy = path.with_name(f"{path.name}.{today_suffix()}{f'-{number}' * (number > 1)}")
        if not copy.exists():
            return create(copy, content, private=True)
        if copy.read_bytes() == content:
            return copy
    raise ConfigError(f"{path}: 999 copies of it are beside it", todo="delete old copies")


def today_suffix() -> str:
    """Return the suffix of the name of a copy that is made today: "before-" and the date (UTC)."""
    return f"before-{datetime.now(UTC).date().isoformat()}"
