"""A bad input, and what to do with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Damage = Callable[[Path], None]


FILE, REFUSED = frozenset({2}), frozenset({2, 3})
ANY_CODE = frozenset({0, 2, 3, 4})  # what is promised of any input at all


DEEP = 100_000
PRIVATE = "Zanzibar"  # in every private record, and in nothing else
PASSWORD = "hunter2"  # in every url that has one
LONG = "n" * 300


@dataclass(frozen=True)
class Case:
    """What is damaged, by whose command it is read, and the exit codes that are documented for it.
    `name` begins with its kind: the file, option or place that is bad, up to the first ":", "=" or
    "→"."""

    name: str
    damage: Callable[[Path], None]
    command: tuple[str, ...]
    codes: frozenset[int] = FILE

    @property
    def kind(self) -> str:
        return re.split("[:=→]", self.name)[0]


def nothing(_: Path) -> None:
    pass


SITE, PLAN, RUN = "site-north.toml", "study.toml", "run"


PROMPTS = ("--prompts", "prompts.jsonl", "--licence", "CC0-1.0", "--out", "new")
BASE = ("--generator", "./base")
SERVE = ("server", PLAN, "--port", "18999", "--out", "new")
DISK = frozenset({2, 4})  # 4: the disk, or a ledger that cannot be believed
