"""A bad input, and what to do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Damage = Callable[[Path], None]


FILE, REFUSED = frozenset({2}), frozenset({2, 3})


DEEP = 100_000
LONG = "n" * 300


@dataclass(frozen=True)
class Case:
    """What is damaged, by whose command it is read, and the exit codes that are documented for it.
    The first group of `name` is the file or option, so that one of each makes a short test."""

    name: str
    damage: Callable[[Path], None]
    command: tuple[str, ...]
    codes: frozenset[int] = FILE


def nothing(_: Path) -> None:
    pass


SITE, PLAN, RUN = "site-north.toml", "study.toml", "run"


PROMPTS = ("--prompts", "prompts.jsonl", "--licence", "CC0-1.0", "--out", "new")
BASE = ("--generator", "./base")
SERVE = ("server", PLAN, "--port", "18999", "--out", "new")
DISK = frozenset({2, 4})  # 4: the disk, or a ledger that cannot be believed
