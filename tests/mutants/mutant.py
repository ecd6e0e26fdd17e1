"""A seeded bug: what is changed in which shipped file, and the tests that must fail for it."""

from __future__ import annotations

from dataclasses import dataclass

Edits = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Mutant:
    """trap: its number in the table of traps, or a word for what is on no list. edits: (old, new)
    pairs in `file`, each `old` there exactly once. tests: pytest node ids, narrow and quick."""

    trap: int | str
    name: str
    file: str
    edits: Edits
    tests: tuple[str, ...]
    note: str


def one(trap: int | str, name: str, file: str, old: str, new: str, tests: str, note: str) -> Mutant:
    return Mutant(trap, name, file, ((old, new),), tuple(tests.split()), note)
