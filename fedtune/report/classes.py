"""Report for each class how many units the sites have of it (with noise), from what the model knows
the class, and what share of the class's public test records is recognised."""

from __future__ import annotations

from typing import Any

from fedtune.core.registry.rounding import number
from fedtune.report.text import cell, figure, table

HEAD = ("class", "units at the sites, noised (± 2 sd)", "known from", "test records", "recognised")


def class_rows(quality: dict[str, Any]) -> list[list[str]]:
    """Return one row of cells for each class, for a table whose columns are named by HEAD; [] if
    the run has no classes. quality: the report's "quality"."""
    found = quality.get("classes")
    return [_row(one) for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def class_lines(quality: dict[str, Any]) -> list[str]:
    """Return up to two lines. The first names the classes of which nothing was learnt. The second
    names the classes that occur in the test records but are never predicted. A line that would name
    no class is left out. quality: the report's "quality".

    >>> rash = {"name": "rash", "known_from": "nothing", "records": 4, "predicted": 0}
    >>> class_lines({"classes": [rash]})
    ['of 1 class nothing was learnt: rash', 'classes never predicted: rash']
    """
    found = [one for one in quality.get("classes") or [] if isinstance(one, dict)]
    unlearnt = [str(one["name"]) for one in found if one.get("known_from") == "nothing"]
    unpredicted = [
        str(one["name"]) for one in found if one.get("records") and one.get("predicted") == 0
    ]
    noun = "class" if len(unlearnt) == 1 else "classes"
    lines = [f"of {len(unlearnt)} {noun} nothing was learnt: {', '.join(unlearnt)}"]
    lines = lines if unlearnt else []
    return [*lines, f"classes never predicted: {', '.join(unpredicted)}"] if unpredicted else lines


def section(quality: dict[str, Any]) -> str:
    """Return the table of classes as Markdown; "" for a run without classes. quality: the report's
    "quality"."""
    rows = class_rows(quality)
    if not rows:
        return ""
    said = [f"**{line[:1].upper()}{cell(line[1:], 1000)}.**" for line in class_lines(quality)]
    how = (
        "Units are all sites' together, from what they sent with its noise, so that a count costs "
        "no ε of its own and may be below 0. A class is known from the sites if its count exceeds "
        "its noise; that alone does not mean that the model recognises it. Recognised: of its "
        "test records, by what is released."
    )
    cells = [[cell(value) for value in row] for row in rows]
    return "\n\n".join(["### By class", *said, table(HEAD, cells), how])


def _row(one: dict[str, Any]) -> list[str]:
    units, deviation = number(one.get("units")), number(one.get("deviation"))
    counted = "–" if units is None or deviation is None else f"{units:.0f} ± {2 * deviation:.0f}"
    return [
        str(one.get("name")),
        counted,
        str(one.get("known_from", "–")),
        figure(one.get("records")),
        figure(one.get("recall")),
    ]
