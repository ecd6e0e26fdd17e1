"""Judge figures by the rules that a site wrote down before: accepted, refused, or not resolved.

| decision     | made if                                                                        |
| accepted     | every figure's interval lies on the right side of the figure's threshold       |
| refused      | the interval of at least one figure lies completely on the wrong side          |
| not resolved | neither: there are too few patients, or an interval contains its threshold     |

The intervals have a confidence of 95 %, except those of groups. A gain over the public start is the
difference of both models on the same patients (`Sample.gain`).
A group's figure is compared with that of all other patients by an interval at the level
1 - 0.05 / (number of comparisons), so that the probability of finding any difference where there is
none is at most 0.05 (Bonferroni). A group of fewer than `least_group` patients is not resolved.
Neither is a measure in which all classes count equally, if a class has fewer than `least_group`
patients: the figure would depend more on the split of the records than on the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedtune.core.config import AcceptanceTable
from fedtune.core.errors import ConfigError
from fedtune.officer.acceptance.intervals import Difference, Interval, Measured, Sample, differences
from fedtune.officer.acceptance.measures import GAP, RECALL, Measure, measures_of
from fedtune.report.scores import Scores

Decision = Literal["accepted", "refused", "not resolved"]
ALARMS = 0.05  # the probability that any group is found to differ although none does
BOTH = "its interval lies on both sides"


@dataclass(frozen=True)
class Judged:
    """A figure with its threshold.

    - measure: the name of the measure
    - of: "" for all records, else the group, as "COLUMN = VALUE". For a group, the figure says by
      how much the group is worse than all other patients
    - better_by: whether the figure says by how much the model is better than the public start
    - bound: the threshold that the site states
    - decision: the decision by this figure
    - why: the reason for the decision "not resolved"; "" for another decision"""

    measure: str
    of: str
    bound: float
    figure: float
    interval: Interval
    decision: Decision
    why: str = ""
    better_by: bool = False


@dataclass(frozen=True)
class Compared:
    """A group compared with all other patients in one measure.

    - found: whether the group and the others differ: true if the interval of the difference does
      not contain 0, None if the comparison is not resolved
    - worse: whether the group is worse, by this interval
    - why: the reason why the comparison is not resolved; "" if it is"""

    column: str
    value: str
    measure: str
    group: Measured | None
    difference: Difference | None
    found: bool | None
    worse: bool = False
    why: str = ""


@dataclass(frozen=True)
class Judgement:
    """The judgement of a model.

    - decision: the decision by all figures together
    - judged: each figure that has a threshold
    - compared: each group's comparison with all others, in each measure
    - level: the confidence of each group comparison's interval
    - overall: measure → its value on all records"""

    decision: Decision
    judged: list[Judged]
    compared: list[Compared]
    level: float
    overall: dict[str, Measured]

    @property
    def different(self) -> list[str]:
        """List the groups whose figure differs from that of all other patients, as "COLUMN = VALUE:
        MEASURE"."""
        return [f"{c.column} = {c.value}: {c.measure}" for c in self.compared if c.found]


def judge(
    table: AcceptanceTable,
    scores: Scores,
    units: np.ndarray,
    groups: Mapping[str, Sequence[str]],
    labels: Sequence[str] = (),
    start: Scores | str = "no public start",
) -> Judgement:
    """Judge one model's scores on a site's held-out records.

    - table: the site's [acceptance], with thresholds and the least size of a group
    - scores: the model's scores on the n records
    - units: the patient of each record, (n,)
    - groups: column → each record's value in it
    - labels: the classes or choices, in the order of their indices in `scores`; () without classes
    - start: the public start's scores on the same records, or why there are none

    Errors: ConfigError (a threshold on a figure that these records do not have)."""
    known = measures_of(scores, labels)
    named = _list_bounds(table, known)
    everybody = Sample(scores, units)
    overall = {name: everybody.of_measure(measure) for name, measure in known.items()}
    judged = [
        _judge_one(
            known[name], bound, overall[name], _too_few(known[name], everybody, known, table)
        )
        for name, bound in named.items()
    ]
    judged += [
        _judge_gain(
            known[name], bound, everybody, start, _too_few(known[name], everybody, known, table)
        )
        for name, bound in table.gains.items()
    ]
    compared, level = _compare_groups(table, scores, units, groups, known, named)
    judged += _judge_groups(table, known, compared)
    return Judgement(_combine(judged), judged, compared, level, overall)


def _list_bounds(table: AcceptanceTable, known: Mapping[str, Measure]) -> dict[str, float]:
    """Return measure → threshold, for every measure to which the site's [acceptance] gives a
    threshold. known: name → measure, for all measures of these records. Errors: ConfigError if
    `known` lacks a measure that the table names."""
    named: dict[str, float] = {str(name): bound for name, bound in table.thresholds.items()}
    named |= {RECALL + name: bound for name, bound in table.recall.items()}
    for name in (*named, *table.differences, *table.gains):
        if name not in known:
            raise ConfigError(
                f"acceptance: {name!r} cannot be measured on this run's records",
                f"one of {', '.join(sorted(known))}",
            )
    return named


def _combine(judged: Sequence[Judged]) -> Decision:
    decisions = {one.decision for one in judged}
    if "refused" in decisions:
        return "refused"
    return "accepted" if decisions == {"accepted"} else "not resolved"


def _too_few(
    measure: Measure, sample: Sample, known: Mapping[str, Measure], table: AcceptanceTable
) -> str:
    """Return why a measure of these records cannot be resolved; "" if it can.

    - measure: the measure; a recall counts only the patients with records of its class
    - sample: the records that are measured, by patient
    - known: name → measure, for all measures of these records; its recalls name the classes
    - table: the site's [acceptance], with the least number of patients"""
    if measure.name.startswith(RECALL):
        patients = sample.of_measure(measure).patients
    else:
        patients = sample.patients
    who = "patients" if table.columns.patient else "records"
    if patients < table.least_group:
        return f"{patients} of at least {table.least_group} {who}"
    if measure.macro:
        counts = {
            name.removeprefix(RECALL): int((sample.sums(one)[:, 1] > 0).sum())
            for name, one in known.items()
            if name.startswith(RECALL)
        }
        if scarce := [name for name, n in counts.items() if n < table.least_group]:
            return (
                f"{len(scarce)} of {len(counts)} classes have fewer than {table.least_group} "
                f"{who} ({', '.join(scarce[:3])}{', …' if len(scarce) > 3 else ''})"
            )
    return ""


def _judge_one(measure: Measure, bound: float, found: Measured, few: str) -> Judged:
    """Judge a measure's figure over all records by the site's threshold.

    - measure: the measure, which says whether a higher value is better
    - bound: the site's threshold
    - found: the figure with its interval
    - few: in words, that there are too few records or patients to judge by; "" if there are
      enough"""
    low, high = found.interval
    sign = 1 if measure.higher_is_better else -1
    decision: Decision = "not resolved"
    why = few or BOTH
    if not few:
        inner, outer = (low, high) if sign > 0 else (high, low)
        if sign * (inner - bound) >= 0:
            decision, why = "accepted", ""
        elif sign * (outer - bound) < 0:
            decision, why = "refused", ""
    return Judged(measure.name, "", bound, found.figure, found.interval, decision, why)


def _judge_gain(
    measure: Measure, bound: float, ours: Sample, start: Scores | str, few: str
) -> Judged:
    """Judge by how much the model is better than the public start. It is accepted if the whole
    interval of the gain lies above the bound, and refused if none of it does.

    - measure: the measure, which says whether a higher value is better
    - bound: the least gain, by the site's [acceptance]
    - ours: the records, scored by the model
    - start: the public start's scores on the same records, or why there are none
    - few: in words, that there are too few records or patients to judge by; "" if there are
      enough"""
    if isinstance(start, str):
        nothing = Interval(math.nan, math.nan)
        why = f"the public start is not measured: {start}"
        return Judged(measure.name, "", bound, math.nan, nothing, "not resolved", why, True)
    figure, (low, high) = ours.gain(measure, start)
    decision: Decision = (
        "accepted" if low > bound else "refused" if high <= bound else "not resolved"
    )
    decision = "not resolved" if few else decision
    why = "" if decision != "not resolved" else few or BOTH
    return Judged(measure.name, "", bound, figure, Interval(low, high), decision, why, True)


def _compare_groups(
    table: AcceptanceTable,
    scores: Scores,
    units: np.ndarray,
    groups: Mapping[str, Sequence[str]],
    known: Mapping[str, Measure],
    named: Mapping[str, float],
) -> tuple[list[Compared], float]:
    """Compare each group with all others in every measure by which the site judges. The calibration
    error, which is larger for fewer records, is replaced by the model's overconfidence.

    - table: the site's [acceptance], with the least size of a group and the bounds on differences
    - scores: the model's scores on the n records
    - units: the patient of each record, (n,)
    - groups: column → each record's value in it
    - known: name → measure, for all measures of these records
    - named: measure → threshold, for the measures that have one

    Returns: the comparisons, and the confidence of each interval."""
    also = [str(name) for name in table.differences if name not in named]
    measures = [known[GAP if name == "ece" else name] for name in [*named, *also]]
    rows: list[Compared] = []
    tested: list[tuple[Sample, Sample, dict[int, Measure]]] = []
    for column, values in groups.items():
        cells = np.asarray(values)
        for value in sorted(set(values)):
            group, others = (Sample(scores, units, at) for at in (cells == value, cells != value))
            resolved: dict[int, Measure] = {}
            for measure in measures:
                few = _too_few(measure, group, known, table)
                if not few and (few := _too_few(measure, others, known, table)):
                    few = f"of all others {few}"
                if not few:
                    resolved[len(rows)] = measure
                rows.append(Compared(column, value, measure.name, None, None, None, why=few))
            tested.append((group, others, resolved))
    level = 1 - ALARMS / max(1, sum(len(resolved) for _, _, resolved in tested))
    for group, others, resolved in tested:
        told = differences([*resolved.values()], group, others, level)
        for (index, measure), difference in zip(resolved.items(), told, strict=True):
            low, high = difference.interval
            sign = 1 if measure.higher_is_better else -1
            rows[index] = replace(
                rows[index],
                group=group.of_measure(measure),
                difference=difference,
                found=low > 0 or high < 0,
                worse=sign * (high if sign > 0 else low) < 0,
            )
    return rows, level


def _judge_groups(
    table: AcceptanceTable, known: Mapping[str, Measure], compared: Sequence[Compared]
) -> list[Judged]:
    """Judge how much worse each resolved group is, in the measures for which the site sets a
    bound. table: the site's [acceptance], with these bounds. known: name → measure. compared: the
    comparisons of all groups with all others."""
    judged = []
    for row in compared:
        if row.difference is None or row.measure not in table.differences:
            continue
        bound = table.differences[row.measure]
        sign = -1 if known[row.measure].higher_is_better else 1
        low, high = sorted(sign * edge for edge in row.difference.interval)
        decision: Decision = "not resolved"
        if high <= bound:
            decision = "accepted"
        elif low > bound:
            decision = "refused"
        why = "" if decision != "not resolved" else BOTH
        of = f"{row.column} = {row.value}"
        figure = sign * row.difference.figure
        judged.append(Judged(row.measure, of, bound, figure, Interval(low, high), decision, why))
    return judged
