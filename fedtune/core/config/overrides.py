"""Replace values of a study.toml by those of the command line, as in `--set training.rounds=4`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedtune.core.config.types import merge_tables
from fedtune.core.errors import ConfigError
from fedtune.core.files.reading import tables

KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,9}")  # no key has more parts than four
WORD = re.compile(r"[A-Za-z_/~.][^\s\"'\[\]{}=#,]*")  # a string that needs no quotes


def overridden(tables: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Return the tables of a TOML file with some values replaced. settings: each "KEY=VALUE", where
    dots separate the key from its tables. VALUE is TOML, but a single word needs no quotes.

    >>> overridden({"training": {"rounds": 8}}, ["training.rounds=4", "base.dtype=float32"])
    {'training': {'rounds': 4}, 'base': {'dtype': 'float32'}}

    Errors: ConfigError if a setting has no key, or its value is not TOML."""
    changed = dict(tables)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not KEY.fullmatch(key := key.strip()):
            raise ConfigError(
                f"--set {setting[:80]}: not KEY=VALUE",
                "KEY=VALUE, where dots separate a key from its tables",
                "such as --set training.rounds=4",
            )
        change = _value(setting, text.strip())
        for name in reversed(key.split(".")):
            change = {name: change}
        changed = merge_tables(changed, change)
    return changed


def _value(setting: str, text: str) -> Any:
    try:
        parsed = tables(f"value = {text}")
    except (ValueError, RecursionError):  # also a number of thousands of digits
        parsed = {"value": text} if WORD.fullmatch(text) else {}
    if set(parsed) != {"value"}:  # also where a line end would begin another key
        raise ConfigError(
            f"--set {setting[:80]}: the value is not TOML",
            "a number, true or false, text, or a list of these",
            "quote text that is more than a word, as in --set 'study.name=\"my study\"'",
        )
    return parsed["value"]
