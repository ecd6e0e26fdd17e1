"""The coordinator's table of what sites' held-out records say: noised figures of all patients, of
each class and of each group that the plan names, of all sites together and of each.

Everything here follows from sums that left the sites with their noise, so that nothing is charged
for it. A figure is shown where its count stands clear of its noise, and as "not told apart" where
it does not. Figures are never ranked: they stand in the plan's order and by the sites' names, and
a difference is said where two intervals lie apart, of which all hold at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from fedtune.core.registry.rounding import number

TOO_NOISY = 4.0  # a count below so many standard deviations of its noise tells nothing
LEVEL = 0.95  # at which all intervals of a table hold together
NOT_TOLD_APART = "not told apart"
EVERYBODY, EVERY_SITE = "all", "all sites together"
Cell = tuple[str, str]  # an axis and a value on it; ("", ""): all
Row = dict[str, Any]


def make_table(
    score: str,
    cells: Sequence[Cell],
    sums: Mapping[str, Sequence[float]],
    variances: Mapping[str, float],
) -> dict[str, Any]:
    """Make the table of one round's answers.

    score: what a unit's score is, "likelihood" or "accuracy"; cells: of the plan, all first; sums:
    by site, and under "" of all sites together, (Σ score, Σ 1) of each cell with noise; variances:
    of the noise in each of these numbers, by the same names.

    Returns score, level, rows (by, value, site, units, score, interval; the last three None where
    they are lost in the noise) and resolved, what is said of their differences.
    """
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
    if not count > TOO_NOISY * math.sqrt(variance):
        return {"units": None, "score": None, "interval": None}
    return {
        "units": count,
        "score": min(max(score, 0.0), count) / count,
        "interval": interval(score, count, variance, quantile),
    }


def interval(score: float, count: float, variance: float, quantile: float) -> list[float]:
    """Compute which means p in [0, 1] fit two noised sums: |Σ score - p · Σ 1| is at most so many
    (`quantile`) of its standard deviations, √(v · (1 + p²) + n · p · (1 - p)): the noise of both
    sums, and the chance of which units were held out, at most that of scores of 0 and 1.

    variance: v, of the noise in each sum; count: n, noised, above 0. A score beyond [0, count] is
    moved to the nearer end, which brings it nearer to every p.
    Reference: Fieller 1954 (a ratio of two noised figures); Wilson 1927 (a share's own variance).

    >>> interval(50.0, 100.0, 0.0, 1.96)  # without noise it is Wilson's
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
    """Find the end of the excluded values, between an end of [0, 1] and a value that is not
    excluded."""
    if not is_excluded(outside):
        return outside
    for _ in range(40):
        between = (outside + inside) / 2
        outside, inside = (between, inside) if is_excluded(between) else (outside, between)
    return outside


def _say_resolved(rows: Sequence[Row]) -> Iterator[str]:
    """Return which figures differ: values of one axis at one place, and sites in one cell."""
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
    """Name a cell for people."""
    return f"{axis}: {value}" if axis else EVERYBODY


@dataclass(frozen=True)
class Shown:
    """A table for people: the text above it, its column names, its rows, and the text below."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]


def write_shown(report: Mapping[str, Any]) -> Shown | None:
    """Build the table of a run's report for people; None if it has none that can be read."""
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
    """Build a row for people: the group, the site, the number of units, their score, its
    interval."""
    who = cell_name(row["by"], row["value"]), str(row["site"] or EVERY_SITE)
    units, score = number(row["units"]), number(row["score"])
    if units is None or score is None:
        return (*who, "", NOT_TOLD_APART, "")
    low, high = row["interval"]
    return (*who, f"{units:.0f}", f"{score:.2f}", f"{low:.2f} to {high:.2f}")


def lines(table: Mapping[str, Any], unit: str) -> list[str]:
    """Describe how to read the figures, and which differences are resolved."""
    resolved = [f"Resolved: {line}." for line in table["resolved"]]
    return [
        f"Numbers of {unit}s and figures have noise. All intervals hold together in "
        f"{table['level']:.0%} of such tables, noise and the choice of the held-out {unit}s "
        "included; where two overlap, nothing follows of which is higher. "
        f'"{NOT_TOLD_APART.capitalize()}": the number is lost in its noise.',
        *resolved,
        f"No {'other ' if resolved else ''}difference is resolved.",
    ]
