"""Write the files of an example: JSON lines, and TOML from plain dictionaries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Table = dict[str, Any]


def jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    return _text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:  # str.splitlines also breaks inside JSON strings
        return [json.loads(line) for line in lines]


def toml(path: Path, tables: Table, comment: str) -> Path:
    """Write `tables` as TOML below one line of comment, and return the path. A key whose value is
    None is left out."""
    return _text(path, f"# {comment}\n" + "\n".join(_lines(tables, "")) + "\n")


def merged(below: Table, above: Table) -> Table:
    """Return a copy of `below` in which the values of `above` replace or extend those of each
    table."""
    both = {**below, **above}
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            both[key] = merged(below[key], value)
    return both


def _lines(table: Table, name: str) -> list[str]:
    lines = [f"[{name}]"] if name else []
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            # JSON's strings, numbers, booleans and lists are valid TOML.
            lines.append(f"{_key(key)} = {json.dumps(value, ensure_ascii=False)}")
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", *_lines(value, f"{name}.{_key(key)}" if name else _key(key))]
    return lines


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path
