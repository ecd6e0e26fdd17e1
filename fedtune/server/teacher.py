"""Add a teacher to the report of a study that distils it, with the joint cost of both trainings."""

from __future__ import annotations

from typing import Any

from fedtune.accounting.composed_epsilon import compose_reports
from fedtune.core.errors import InputError
from fedtune.report.teacher import leaves_out

UNKNOWN = "not known on this machine"
PUBLIC = "a base, which was trained on no record of the sites"
NOT_PRIVATE = "was trained without privacy"
COMPOSED = ("epsilon", "delta", "unit", "events", "known_as")  # of an entry, by `compose_reports`
TAUGHT = "was itself trained by a teacher that"


def with_teacher(report: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """Return a student's report with its teacher in it, and with the teacher's cost added to the
    student's ε.

    - report: the report of the student's own rounds
    - teacher: the teacher's name, digest and kind ("base", "run" or "unknown") and, if it is a run,
      the run's report

    If student and teacher are both private runs, "epsilon" of each site becomes the ε of both
    trainings together, composed as `fedtune merge` composes parents, for the weaker of their units;
    "own_epsilon" is the ε of the student's rounds alone, for the unit of the student's plan.
    "free_query" then also names the sites at which a query or a view selected the records on which
    the teacher was trained: the guarantee covers that training no more than the student's own.
    Guarantee: the stated ε is never less than the ε of all trainings in which one unit took part,
    unless the report says that the teacher's cost, or that of a teacher before it, is not known, or
    that one of these was trained without privacy.

    | the teacher                                      | ε of the result | "teacher" says of cost  |
    | is a base                                        | the student's   | trained on no record    |
    | is not on this machine, or its report is missing | the student's   | not known               |
    | or cannot be composed with the student's         |                 |                         |
    | is a run without privacy                         | the student's   | trained without privacy |
    | is a run whose own teacher's cost is not in its ε | the student's  | what that run's says    |
    | is a private run; the student is not private     | none            | the teacher's ε and δ   |
    | is a private run; the student is private         | of both         | the teacher's ε and δ   |
    """
    facts = {key: teacher[key] for key in ("name", "digest")}
    if teacher["kind"] == "base":
        return report | {"teacher": facts | {"cost": PUBLIC, "known": True}}
    unknown = report | {"teacher": facts | {"cost": UNKNOWN, "known": False}}
    parent = teacher.get("report")
    if not isinstance(parent, dict):
        return unknown
    facts["plan"] = parent.get("plan_digest")
    if selected := {*report.get("free_query", ()), *parent.get("free_query", ())}:
        report = report | {"free_query": sorted(selected)}
    if not parent.get("private"):
        return report | {"teacher": facts | {"cost": NOT_PRIVATE, "known": False}}
    if left_out := leaves_out(parent):
        why = left_out.removeprefix(f"{TAUGHT} ")
        return report | {"teacher": facts | {"cost": f"{TAUGHT} {why}", "known": False}}
    cost = {key: parent["privacy"].get(key) for key in ("epsilon", "delta")}
    facts |= {"known": True, **cost}
    if not report.get("private"):
        return report | {"teacher": facts}
    try:
        both = compose_reports([report, parent])
    except InputError:
        return unknown
    own = report["privacy"]
    facts |= {"student_epsilon": own.get("epsilon"), "decided": both["decided"]}
    sites = dict[str, Any](both["sites"])
    for name, site in own.get("sites", {}).items():
        total = sites.get(name) or {}
        spent = {key: total[key] for key in COMPOSED if key in total}
        spent |= _with_shared_noise(site, total)
        sites[name] = site | {"own_epsilon": site["epsilon"]} | spent
    total = {key: both[key] for key in ("epsilon", "delta", "unit")}
    total |= _with_shared_noise(own, both)
    if asked := own.get("evaluation"):
        total["evaluation"] = asked | {"with_training": _with_queries(report, parent)}
    return report | {"privacy": own | total | {"sites": sites}, "teacher": facts}


def _with_shared_noise(own: dict[str, Any], both: dict[str, Any]) -> dict[str, Any]:
    """Return what the result says of shared noise: under which assumptions the ε of both trainings
    holds, and the ε that holds without them; {} if neither run shared noise. What the student's
    report says is kept as "own_secure_aggregation".

    own, both: the student's figures, and the composed ones, of a site or of the run."""
    if (composed := both.get("secure_aggregation")) is None:
        return {}
    if (alone := own.get("secure_aggregation")) is None:
        return {"secure_aggregation": composed}
    return {"secure_aggregation": alone | composed, "own_secure_aggregation": alone}


def _with_queries(report: dict[str, Any], parent: dict[str, Any]) -> float:
    """Compute the ε of a unit that took part in three things: the queries about a site's held-out
    records, the student's training and the teacher's training. It holds whatever other sites do, as
    the student's own figure for training and queries does.

    - report: the student's report, which also has the queries' cost
    - parent: the teacher's report"""
    own = report["privacy"]
    rows = {
        name: row | {"sampling_rate": 1.0, "key": own["sites"].get(name, {}).get("key")}
        for name, row in own["evaluation"].get("sites", {}).items()
    }
    asked = {"privacy": own | {"sites": rows}} if rows else None
    composed = compose_reports([report, parent, *([asked] if asked else [])])
    figures = [site.get("secure_aggregation", {}) | site for site in composed["sites"].values()]
    return max(float(site.get("fallback_epsilon", site["epsilon"])) for site in figures)
