"""Decide when a version replaces the one in use: the rule of a study's [schedule], as the
coordinator applies it and `fedtune verify` computes it again.

    better            all of these, each at p ≤ alpha / looks:
                      | the metric is better by more than schedule.margin |
                      | no group of LEAST_GROUP records is worse by schedule.groups' margin |
    not better        one of them is not shown
    outside the plan  nothing was compared: the plan allows no such look

Guarantee: a version of which any of them is untrue is released in at most alpha of studies for each
public file, whatever the number of versions and groups: it needs all the tests at once, so one of
them would have to be wrong (an intersection-union test, Berger 1982); over the looks at a file the
chances add up. A study's files are at most schedule.files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedtune.core.config import ScheduleTable
from fedtune.report.paired import LEAST_GROUP, chance_above, chance_of, changes
from fedtune.report.scores import Columns, Scores

Verdict = Literal["better", "not better", "outside the plan"]
Files = Mapping[str, frozenset[str]]  # by a public file's sha256: keyed digests of its records


@dataclass(frozen=True)
class Look:
    """The data of one comparison, record by record: the scores from which the metric follows
    (report.scores), of the version in use and of the new one, and each record's value in the
    columns of groups."""

    metric: str
    before: Columns
    after: Columns
    groups: Mapping[str, Sequence[str]]

    @classmethod
    def at(
        cls, metric: str, before: Scores, after: Scores, groups: Mapping[str, Sequence[str]]
    ) -> Look:
        """Keep those scores on which the comparison depends."""
        return cls(metric, before.columns(metric), after.columns(metric), groups)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of its file."""
        return dict(vars(self))


@dataclass(frozen=True)
class Group:
    """The metric's change in one group, above 0 if it got better; p of its being worse by the
    plan's margin, None for fewer than LEAST_GROUP records, which decide nothing."""

    name: str
    records: int
    change: float
    p: float | None


@dataclass(frozen=True)
class Judged:
    """A verdict, why it is not "better", and the figures from which it follows."""

    verdict: Verdict
    why: str
    before: float
    after: float
    p: float
    groups: tuple[Group, ...]


def judge(look: Look, table: ScheduleTable) -> Judged:
    """Decide whether a version is better by the plan, from what a look at it saw.

    Errors: ValueError if the columns are not of the same records."""
    before, after = Scores.of_columns(look.before), Scores.of_columns(look.after)
    metric, level = look.metric, table.threshold
    if len(before.loss) != len(after.loss) or set(look.groups) != set(table.groups):
        raise ValueError("not the same records, or not the plan's groups")
    if table.margin:
        p = chance_above(changes(before, after, metric), table.margin, level)
    else:
        p = chance_of(before, after, metric)
    groups = tuple(_groups(look, table, before, after))
    worse = [group.name for group in groups if group.p is not None and group.p > level]
    if p > level:
        more = f" by more than {table.margin:g}" if table.margin else ""
        why = f"not shown to be better{more}"
    elif worse:
        why = f"{worse[0]} may be worse by more than the plan allows"
        why += f", and {len(worse) - 1} other groups" if len(worse) > 1 else ""
    else:
        why = ""
    return Judged(
        verdict="not better" if why else "better",
        why=why,
        before=before.value(metric),
        after=after.value(metric),
        p=p,
        groups=groups,
    )


def _groups(look: Look, table: ScheduleTable, before: Scores, after: Scores) -> list[Group]:
    found = []
    for column, margin in table.groups.items():
        values = np.array(look.groups[column], dtype=str)
        if values.shape != before.loss.shape:
            raise ValueError("groups of other records")
        for value in np.unique(values):
            parts = changes(before, after, look.metric)[values == value]
            enough = len(parts) >= LEAST_GROUP
            p = chance_above(parts, -margin, table.threshold) if enough else None
            found.append(Group(f"{column}={value}", len(parts), float(parts.mean()), p))
    return found


def look_left(
    looked: Sequence[str], files: Files, apart: Collection[str], public: str, table: ScheduleTable
) -> tuple[int, str]:
    """Count the looks that were taken at the file `public`, and return why the plan allows no
    other; "" if it does.

    looked: the public file of each look so far; files: of all files so far, this one among them;
    apart: digests of the records that taught the model. Files that share records, also by way of a
    third, count as one.

    >>> files = {"a": frozenset("xy"), "b": frozenset("y"), "c": frozenset("z")}
    >>> look_left(["a", "a"], files, (), "b", ScheduleTable(every=60, looks=2))
    (2, 'all 2 looks at these public records were taken')
    >>> look_left(["a", "a"], files, (), "c", ScheduleTable(every=60, looks=2))
    (0, '')
    """
    family = _family(public, files)
    taken = sum(file in family for file in looked)
    others = {frozenset(_family(file, files)) for file in looked if file not in family}
    if taught := len(files.get(public, frozenset()) & {*apart}):
        return taken, f"{taught} of these public records taught the model before its first round"
    if taken >= table.looks:
        return taken, f"all {table.looks} looks at these public records were taken"
    if not taken and len(others) >= table.files:
        return taken, f"the plan's looks are at {table.files} public files, and this is another"
    return taken, ""


def _family(public: str, files: Files) -> set[str]:
    """Return a file and all that share records with it, also by way of others."""
    family, rest = {public}, set(files) - {public}
    records = files.get(public, frozenset())
    while shared := {other for other in rest if files[other] & records}:
        family, rest = family | shared, rest - shared
        records = records.union(*(files[other] for other in shared))
    return family
