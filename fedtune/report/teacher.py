"""Render the report's section on the teacher of a study whose sites distil a teacher."""

from __future__ import annotations

from typing import Any

from fedtune.core.registry.rounding import rounded_up
from fedtune.report.claim import protects
from fedtune.report.text import cell, figure, table


def leaves_out(report: dict[str, Any]) -> str:
    """Return what is true of the teacher if a report's ε does not hold its cost, as the end of a
    sentence about the teacher, such as "was trained without privacy". Return "" if the ε covers all
    that trained the model."""
    teacher = report.get("teacher") or {}
    return "" if not teacher or teacher.get("known") else _why(teacher)


def teacher_left_out_line(report: dict[str, Any]) -> str:
    """Return a sentence which says that a private run's ε does not hold the cost of its teacher,
    and why. Return "" if ε holds it, if the run is not private, or if it had no teacher. report:
    the run's report.

    >>> teacher = {"name": "before", "cost": "was trained without privacy", "known": False}
    >>> teacher_left_out_line({"private": True, "teacher": teacher})
    "Its teacher before was trained without privacy: ε is of this run's rounds alone, and does not \
cover what the teacher learnt of the people in its own training."
    """
    left_out = leaves_out(report) if report.get("private") else ""
    if not left_out:
        return ""
    return (
        f"Its teacher {cell(report['teacher'].get('name'))} {left_out}: ε is of this run's rounds "
        "alone, and does not cover what the teacher learnt of the people in its own training."
    )


def section(report: dict[str, Any]) -> list[str]:
    """Return the section on the teacher as Markdown paragraphs: its name, digest and cost. Return
    [] if the report has no "teacher"."""
    teacher = report.get("teacher") or {}
    if not teacher:
        return []
    rows = [
        ["name", cell(teacher.get("name"))],
        ["digest", f"`{cell(teacher.get('digest'))}`"],
        *([["plan", f"`{cell(teacher['plan'])}`"]] if teacher.get("plan") else []),
        ["its ε", rounded_up(teacher["epsilon"]) if "epsilon" in teacher else "–"],
        ["its δ", figure(teacher.get("delta"))],
    ]
    text = [
        "## Its teacher",
        table(["", ""], rows, numbers=False),
        f"Every target came from this teacher's predictions. {_cost(report, teacher)}",
    ]
    return text


def teacher_line(report: dict[str, Any]) -> str:
    """State in one line, for a terminal, the teacher's name and the ε that it cost. The line gives
    only the name if there is nothing to add up: the teacher is a base, its cost is not known
    (`teacher_left_out_line` says so), or the student (the run that the report is about) has no ε.
    Return "" if there is no teacher."""
    teacher = report.get("teacher") or {}
    if not teacher:
        return ""
    name = cell(teacher.get("name"))
    if "student_epsilon" not in teacher:
        return f"its teacher: {name}"
    own, parent = rounded_up(teacher["student_epsilon"]), rounded_up(teacher.get("epsilon"))
    return f"of that {own} by this run alone; its teacher {name} cost {parent} by itself"


def _why(teacher: dict[str, Any]) -> str:
    cost = str(teacher.get("cost"))
    return cell(cost if cost.startswith("was ") else f"has a cost that is {cost}")


def _cost(report: dict[str, Any], teacher: dict[str, Any]) -> str:
    if left_out := leaves_out(report):
        return (
            f"**It {left_out}.** The ε above is of this run's own rounds: for whoever is "
            "among the teacher's records too, what the teacher cost adds to it."
        )
    if "student_epsilon" not in teacher:
        return f"It is {cell(teacher['cost'])}: no ε." if "cost" in teacher else ""
    who = protects(str((report.get("privacy") or {}).get("unit", "record")))
    how = "; ".join(sorted({cell(row.get("how")) for row in teacher.get("decided") or []}))
    return (
        f"The ε above is of both trainings together, for {who} at a site of either ({how}). This "
        f"run's own rounds have ε = {rounded_up(teacher['student_epsilon'])}. What the teacher's "
        "study paid for noised answers about held-out records is in no ε here: it stands in the "
        "teacher's own report."
    )
