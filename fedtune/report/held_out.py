"""Build the coordinator's table of the sites' answers about held-out records: noised figures of all
units, of each class and of each group that the plan names, for all sites together and for each
site.

Everything here is computed from sums that were noised at the sites, so it costs no ε. A figure is
shown only if its count is well above its noise (TOO_NOISY). Figures are never ranked: rows follow
the plan's order and the sites' names. Two figures are said to differ if their intervals do not
overlap; all intervals of a table hold together with probability LEVEL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from fedtune.core.registry.rounding import number

TOO_NOISY = 4.0  # a figure is shown if its count of units exceeds this times the noise's deviation
LEVEL = 0.95  # the probability with which all intervals of a table hold together
NOT_TOLD_APART = "not told apart"
EVERYBODY, EVERY_SITE = "all", "all sites together"
# A set of units, as (axis, value): one class, or one value of a column of groups. ("", "") is all.
Cell = tuple[str, str]
Row = dict[str, Any]


def make_table(
    score: str,
    cells: Sequence[Cell],
    sums: Mapping[str, Sequence[float]],
    variances: Mapping[str, float],
) -> dict[str, Any]:
    """Make the table of one round's answers.

    - score: the name of a unit's score, "likelihood" or "accuracy"
    - cells: the sets of units for which figures are shown, in the plan's order: all units, then
      each class and each group
    - sums: site -> two numbers with noise for each cell in turn: the sum of the units' scores, and
      the number of units. Under "", the sums of all sites together
    - variances: site, or "" -> variance of the noise in each of these numbers

    Returns a dict:
    - "score": the name of the score
    - "level": the probability with which all intervals hold together
    - "rows": a dict for each cell and site, with "by" and "value" (the cell), "site", "units",
      "score" and "interval"; the last three are None if the number of units is lost in its noise
    - "resolved": the sentences about figures that differ"""
    least = (1 - LEVEL) / (2 * max(1, len(cells) * len(sums)))
    quantile = NormalDist().inv_cdf(1 - least)
    rows = [
        {"by": axis, "value": value, "site": site}
        | _figure(sums[site][2 * place], sums[site][2 * place + 1], variances[site], quantile)
        for place, (axis, value) in enumerate(cells)
        for site in sorted(sums)
    ]
    return {"score": score, "level": LEVEL, "rows": rows, "resolved": [*_say_resolved(rows)]}


def _figure(score: float, count: float, variance: float, quantile: float) -> Row:
    """Return the "units", "score" and "interval" of one cell, a class or a group of units. All
    three are None unless the count of units exceeds TOO_NOISY standard deviations of its noise.

    - score: Σ score with noise
    - count: Σ 1 with noise
    - variance: the variance of the noise in each of these two sums
    - quantile: the interval's half-width in standard deviations, such as 1.96 for 95 %"""
    if not count > TOO_NOISY * math.sqrt(variance):
        return {"units": None, "score": None, "interval": None}
    return {
        "units": count,
        "score": min(max(score, 0.0), count) / count,
        "interval": interval(score, count, variance, quantile),
    }


def interval(score: float, count: float, variance: float, quantile: float) -> list[float]:
    """Compute the interval of the means p in [0, 1] that fit two noised sums. A mean fits if

        |Σ score - p · Σ 1|   ≤   quantile · √(v · (1 + p²) + n · p · (1 - p))

    Under the root, the first term is the noise of both sums. The second is the sampling error of
    the held-out units, which is largest for scores of 0 and 1.

    - score: Σ score with noise. A value outside [0, count] is replaced by the nearer end of this
      range, which can only widen the interval
    - count: n = Σ 1 with noise, above 0
    - variance: v, of the noise in each sum
    - quantile: the interval's half-width in standard deviations, such as 1.96 for 95 %

    Returns the lower and the upper end, rounded to three digits.

    Reference: Fieller 1954 (a ratio of two noised figures); Wilson 1927 (a share's own variance).

    >>> interval(50.0, 100.0, 0.0, 1.96)  # without noise this is Wilson's interval
    [0.404, 0.596]
    """
    score = min(max(score, 0.0), count)

    def is_excluded(p: float) -> bool:
        room = variance * (1 + p**2) + count * p * (1 - p)
        return (score - p * count) ** 2 > quantile**2 * room

    middle = score / count
    ends = (_edge(is_excluded, 0.0, middle), _edge(is_excluded, 1.0, middle))
    return [round(end, 3) for end in ends]


def _edge(is_excluded: Callable[[float], bool], outside: float, inside: float) -> float:
    """Find one end of an interval by bisection. Return a value just outside the interval, so that
    no value of the interval is lost; if `outside` itself lies in the interval, return `outside`.

    - is_excluded: returns whether a value lies outside the interval
    - outside: the end of the range that is searched, 0 or 1
    - inside: a value in the interval"""
    if not is_excluded(outside):
        return outside
    for _ in range(40):
        between = (outside + inside) / 2
        outside, inside = (between, inside) if is_excluded(between) else (outside, between)
    return outside


def _say_resolved(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a sentence for each figure whose interval lies below that of another figure. Two kinds
    of figures are compared: those of the values on one axis, at the same site or at all sites
    together; and those of different sites in the same cell. rows: the rows of the table."""
    shown = [row for row in rows if row["interval"] is not None]
    for site in sorted({row["site"] for row in shown}):
        for axis in dict.fromkeys(row["by"] for row in shown):
            compared = [row for row in shown if (row["site"], row["by"]) == (site, axis)]
            yield from _say_apart(f"{axis} at {site or EVERY_SITE}", "value", compared)
    for cell in dict.fromkeys((row["by"], row["value"]) for row in shown):
        compared = [row for row in shown if (row["by"], row["value"]) == cell and row["site"]]
        yield from _say_apart(cell_name(*cell), "site", compared)


def _say_apart(where: str, name: str, rows: Sequence[Row]) -> Iterator[str]:
    for lower in rows:
        above = [row[name] for row in rows if row["interval"][0] > lower["interval"][1]]
        if above:
            yield f"{where}: {lower[name]} is below {', '.join(above)}"


def cell_name(axis: str, value: str) -> str:
    """Return the name of a cell (one class or one group) for people, as "axis: value". For the cell
    of all units, whose axis is "", return EVERYBODY."""
    return f"{axis}: {value}" if axis else EVERYBODY


@dataclass(frozen=True)
class Shown:
    """The sites' answers about held-out records as a table for people.

    - title: the text above the table
    - head: the names of its columns
    - rows: its rows, one text for each column
    - lines: the text below it, line by line"""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]


def write_shown(report: Mapping[str, Any]) -> Shown | None:
    """Build the table of a report's answers about held-out records, for people; None if the report
    has no such table, or a damaged one."""
    table = report.get("held_out")
    if not isinstance(table, Mapping):
        return None
    try:
        unit = str((report.get("privacy") or {}).get("unit", "record"))
        return Shown(
            f"Held-out {unit}s at the sites, after round {int(table['round'])}",
            ("of", "at", f"{unit}s", str(table["score"]), "interval"),
            tuple(map(text_row, table["rows"])),
            tuple(lines(table, unit)),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def text_row(row: Row) -> tuple[str, ...]:
    """Return one row as texts for people: the group, the site, the number of units, their score,
    and the interval of the score. If the number is lost in its noise, the score is NOT_TOLD_APART,
    and number and interval are ""."""
    who = cell_name(row["by"], row["value"]), str(row["site"] or EVERY_SITE)
    units, score = number(row["units"]), number(row["score"])
    if units is None or score is None:
        return (*who, "", NOT_TOLD_APART, "")
    low, high = row["interval"]
    return (*who, f"{units:.0f}", f"{score:.2f}", f"{low:.2f} to {high:.2f}")


def lines(table: Mapping[str, Any], unit: str) -> list[str]:
    """Return the lines of text that stand below the table. They say how to read its figures, and
    which figures differ. table: the result of `make_table`. unit: the noun for a unit, such as
    "patient"."""
    resolved = [f"Resolved: {line}." for line in table["resolved"]]
    return [
        f"Numbers of {unit}s and figures have noise. All intervals hold together in "
        f"{table['level']:.0%} of such tables, noise and the choice of the held-out {unit}s "
        "included; where two overlap, nothing follows of which is higher. "
        f'"{NOT_TOLD_APART.capitalize()}": the number is lost in its noise.',
        *resolved,
        f"No {'other ' if resolved else ''}difference is resolved.",
    ]
