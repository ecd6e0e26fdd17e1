"""Format cells, figures and tables in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from fedtune.core.registry.rounding import number


def cell(value: Any, most: int = 200) -> str:
    """Format one value for a cell of a Markdown table: on one line, cut to at most `most`
    characters, then escaped; "–" for None."""
    if value is None:
        return "–"
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    text = text if len(text) <= most else text[: most - 1] + "…"
    return re.sub(r"([\\`*\[\]<>|#!])", r"\\\1", text)


def figure(value: Any) -> str:
    """Format a number for a table: an integer in full, another number with four significant
    figures. A value that is no finite number is formatted as `cell` does."""
    n = number(value)
    if n is None or not math.isfinite(n):
        return cell(value)
    return f"{int(n):,}" if n == int(n) and abs(n) < 1e15 else f"{n:.4g}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, numbers: bool = True) -> str:
    """Build a Markdown table. The first column is left-aligned; with `numbers` the others are
    right-aligned. head: the names of the columns. rows: the texts of the cells, row by row."""
    names = list(head)
    rule = "---:" if numbers else "---"
    lines = [names, ["---", *[rule] * (len(names) - 1)], *[list(row) for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
