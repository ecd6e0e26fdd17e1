"""A seeded bug: what is changed in which shipped file, and the tests that must fail for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

Edits = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Mutant:
    """trap: its number in the table of traps, or a word for what is on no list. edits: (old, new)
    pairs in `file`, each `old` there exactly once, however its lines are broken and indented.
    tests: pytest node ids, narrow and quick."""

    trap: int | str
    name: str
    file: str
    edits: Edits
    tests: tuple[str, ...]
    note: str


def one(trap: int | str, name: str, file: str, old: str, new: str, tests: str, note: str) -> Mutant:
    return Mutant(trap, name, file, ((old, new),), tuple(tests.split()), note)


class Stale(Exception):
    """A mutant that no longer applies, since what it changes is not in the file exactly once: an
    error, not a pass."""


def mutated(mutant: Mutant, text: str) -> str:
    """Write the file's text with the bug in it. Errors: Stale."""
    for old, new in mutant.edits:
        found = [(match.start(), match.end(), new) for match in re.finditer(re.escape(old), text)]
        found = found or list(_find_laid_out_otherwise(old, new, text))
        if len(found) != 1:
            raise Stale(f"{mutant.file} has {len(found)} times, not once: {old.strip()!r}")
        ((start, end, put),) = found
        text = text[:start] + put + text[end:]
    return text


def _find_laid_out_otherwise(old: str, new: str, text: str) -> Iterator[tuple[int, int, str]]:
    """Find where a file says `old` with other line breaks, another indentation, or the comma that a
    formatter puts behind the last of several lines; and what stands there instead."""
    indent = len(old) - len(old.lstrip(" "))
    whole_lines = indent >= 4 and indent % 4 == 0
    tokens = re.findall(r"\w+|[^\w\s]", old)
    pattern = re.escape(tokens[0])
    for before, token in pairwise(tokens):
        is_word = re.match(r"\w", before) and re.match(r"\w", token)
        comma = r"(?:,\s*)?" if token in ")]}" and before not in "([{," else ""
        pattern += (r"\s+" if is_word else r"\s*") + comma + re.escape(token)
    pattern = (r"^( *)" if whole_lines else r"()") + pattern
    pattern += r"[ \t]*\n" if old.endswith("\n") else ""
    for match in re.finditer(pattern, text, re.MULTILINE):
        further = len(match[1]) - indent if whole_lines else 0
        yield match.start(), match.end(), _indent(new, further)


def _indent(text: str, further: int) -> str:
    """Move lines to the right, or to the left where `further` is below 0."""
    if further >= 0:
        return re.sub(r"^(?=.)", " " * further, text, flags=re.MULTILINE)
    return re.sub(rf"^ {{1,{-further}}}", "", text, flags=re.MULTILINE)
