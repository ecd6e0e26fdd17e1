"""Decide when a new version replaces the one in use, by the rule of a study's [schedule]. The
coordinator applies the rule, and `fedtune verify` computes it again.

A comparison of two versions on a public file is called a look at it. Its verdict is:

    better            tests show all of these, each at p ≤ alpha / looks:
                      | the metric is better by more than schedule.margin                       |
                      | no group of LEAST_GROUP or more records is worse by the group's margin  |
    not better        one of these is not shown
    outside the plan  nothing was compared, since the plan allows no further look

Guarantee: for each public file, the probability that the study releases a version for which one of
these statements is false is at most alpha, whatever the number of versions and groups. A release
needs all tests at once, so the test of the false statement would have to be wrong (an
intersection-union test, Berger 1982), and the probabilities of the looks at a file add up. A study
uses at most schedule.files files.
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
Files = Mapping[str, frozenset[str]]  # fingerprint of a public file -> keyed digests of its records


@dataclass(frozen=True)
class Look:
    """The data of one comparison of two versions, record by record.

    - metric: the name of the compared metric
    - before, after: the scores of the version in use, and of the new one, from which the metric is
      computed: name of the score -> one number for each record
    - groups: column -> each record's value in it"""

    metric: str
    before: Columns
    after: Columns
    groups: Mapping[str, Sequence[str]]

    @classmethod
    def at(
        cls, metric: str, before: Scores, after: Scores, groups: Mapping[str, Sequence[str]]
    ) -> Look:
        """Build a look from all scores. The look keeps the scores on which `metric` depends.

        - metric: the name of the plan's metric, a key of report.scores.FIELDS
        - before, after: the scores of the version in use and of the new one, on the same records
        - groups: column -> each record's value in it, in the order of the scores; for each column
          of schedule.groups"""
        return cls(metric, before.columns(metric), after.columns(metric), groups)

    def as_dict(self) -> dict[str, Any]:
        """Return the look as the content of its file, out/versions/look-N.json."""
        return dict(vars(self))


@dataclass(frozen=True)
class Group:
    """The change of the metric in one group of records.

    - name: the group, as "column=value"
    - records: the number of its records
    - change: above 0 if the new version is better
    - p: the p-value of the hypothesis that the new version is worse by the plan's margin or more;
      None for fewer than LEAST_GROUP records, which decide nothing"""

    name: str
    records: int
    change: float
    p: float | None


@dataclass(frozen=True)
class Judged:
    """The result of a comparison of two versions.

    - verdict: "better", "not better" or "outside the plan"
    - why: why the verdict is not "better"; "" if it is
    - before, after: the metric of the version in use, and of the new one
    - p: the p-value of the hypothesis that the new version is no better; if the plan has a margin,
      of the hypothesis that it is not better by more than this margin
    - groups: the changes in the plan's groups"""

    verdict: Verdict
    why: str
    before: float
    after: float
    p: float
    groups: tuple[Group, ...]


def judge(look: Look, table: ScheduleTable) -> Judged:
    """Decide from a comparison's data whether the new version is better. table: the plan's
    [schedule], which gives margins and level of the tests.

    Errors: ValueError if the two versions were not scored on the same records, or the look's groups
    are not the plan's."""
    before, after = Scores.of_columns(look.before), Scores.of_columns(look.after)
    metric, level = look.metric, table.threshold
    if len(before.loss) != len(after.loss) or set(look.groups) != set(table.groups):
        raise ValueError(
            "the two versions were not scored on the same records, or not by the plan's groups"
        )
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
    """Test for each group of the plan whether the new version is worse there by the plan's margin
    or more. Return the groups in the order of the plan's columns, and of the values within a
    column.

    - look: the comparison, for its metric and groups
    - table: the plan's [schedule], for margins and level
    - before, after: the look's scores of the version in use and of the new one

    Errors: ValueError if a column does not have one value for each record."""
    found = []
    for column, margin in table.groups.items():
        values = np.array(look.groups[column], dtype=str)
        if values.shape != before.loss.shape:
            raise ValueError(f"the column {column!r} of groups needs one value for each record")
        for value in np.unique(values):
            parts = changes(before, after, look.metric)[values == value]
            enough = len(parts) >= LEAST_GROUP
            p = chance_above(parts, -margin, table.threshold) if enough else None
            found.append(Group(f"{column}={value}", len(parts), float(parts.mean()), p))
    return found


def look_left(
    looked: Sequence[str], files: Files, apart: Collection[str], public: str, table: ScheduleTable
) -> tuple[int, str]:
    """Return how many looks (comparisons) were taken at a public file, and why the plan allows no
    further look at it; "" in place of the reason if the plan allows one.

    - looked: the public file (fingerprint) of each look so far
    - files: fingerprint -> the digests of the file's records, for all files so far and `public`
    - apart: the digests of the public records that trained the model. A file with one of them
      allows no look.
    - public: the file (fingerprint) at which the next look would be
    - table: the plan's [schedule]

    Files that share records count as one file. Two files also count as one if they share records
    only with a third file.

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
    """Return the public files that count as one file with `public`. These are `public` itself, all
    files that share records with it, all files that share records with one of those, and so on. A
    file is named by its fingerprint, a sha256. files: fingerprint -> the digests of the file's
    records."""
    family, rest = {public}, set(files) - {public}
    records = files.get(public, frozenset())
    while shared := {other for other in rest if files[other] & records}:
        family, rest = family | shared, rest - shared
        records = records.union(*(files[other] for other in shared))
    return family
