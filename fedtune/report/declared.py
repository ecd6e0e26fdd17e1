"""Build the sentences that every output of a run shows. They say whether the run was a simulation,
which sites declared their data public or generated, at which sites a query or a view selected the
records, and whether the cost of the run's teacher is in its ε. ε covers neither such a selection
nor a teacher whose cost is not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedtune.report.teacher import teacher_left_out_line

KINDS = ("public", "generated")
INVENTED = "No patient was involved: fedtune wrote these records itself, for its demo."


def simulation_line(report: Mapping[str, Any]) -> str:
    """Return a text which says that a run was a simulation (one machine ran all its sites), or that
    it was made from a simulation. Return "" if neither is so. report: the run's report.

    >>> simulation_line({"simulation": True})
    'One machine ran all sites. No consortium stands behind its signature, and nobody at a \
hospital took part.'
    """
    if not report.get("simulation"):
        return ""
    if {"merge", "derived"} & report.keys():
        return (
            "At least one of the runs that this was made of was a simulation: one machine ran all "
            "of its sites."
        )
    return (
        "One machine ran all sites. No consortium stands behind its signature, and nobody at a "
        "hospital took part."
    )


def declared_line(report: Mapping[str, Any]) -> str:
    """Return a sentence or two that name the sites whose data is declared public or generated; ""
    if every site's data is private.

    >>> declared_line({"declared": {"north": "public"}})
    'north trained on data that its site declared public: no claim about patients is made for it. \
It paid from a ledger of the run, not from a budget for life.'
    """
    by_site = report.get("declared")
    if not isinstance(by_site, Mapping) or not by_site:
        return ""
    groups = {
        kind: [str(n) for n, what in sorted(by_site.items()) if what == kind] for kind in KINDS
    }
    many = len(by_site) > 1
    whose = "their sites" if many else "its site"
    kinds = " and ".join(
        f"{' and '.join(names)} trained on data that {whose} declared {kind}"
        for kind, names in groups.items()
        if names
    )
    if many:
        return (
            f"{kinds}: no claim about patients is made for them. They paid from ledgers of the "
            "run, not from budgets for life."
        )
    return (
        f"{kinds}: no claim about patients is made for it. It paid from a ledger of the run, not "
        "from a budget for life."
    )


def free_query_line(report: Mapping[str, Any]) -> str:
    """Return a sentence that names the sites whose records were selected by a query or a view of
    their database, and says what this means for ε; "" if there are no such sites.

    >>> free_query_line({"free_query": ["north"]})
    "A query or a view of the database selected the records of north: if it counts, ranks or \
averages, one patient's rows may change what is read of another, and ε does not cover this."
    """
    names = report.get("free_query")
    if not isinstance(names, list) or not names:
        return ""
    return (
        "A query or a view of the database selected the records of "
        f"{' and '.join(map(str, names))}: if it counts, ranks or averages, one patient's rows may "
        "change what is read of another, and ε does not cover this."
    )


def site_lines(report: dict[str, Any]) -> str:
    """Return the sentences about what ε does not cover, and about the sites' records: first that of
    `teacher_left_out_line`, then that of `free_query_line`, then those of `declared_line`; "" if
    all are empty."""
    lines = [teacher_left_out_line(report), free_query_line(report), declared_line(report)]
    return " ".join(filter(None, lines))


def declared_in(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Collect from the reports of several runs what a report on a model derived from them must
    state: the entries "declared", "free_query", "simulation" and "invented". Empty entries are left
    out.

    A site is in "declared" (site -> "public" or "generated") if its data was private in none of the
    runs, and no site is if one of the reports does not say which sites took part, as that of a
    model that was derived from a run without privacy. A site is in "free_query" if a query or a
    view selected its records in one of the runs. "simulation" and "invented" are set if they are
    set for one of them."""
    declared: dict[str, str] = {}
    private = set[str]()
    uncovered = set[str]()
    marks = dict[str, bool]()
    is_complete = True
    for report in reports:
        marks |= {mark: True for mark in ("simulation", "invented") if report.get(mark)}
        uncovered |= {*report.get("free_query", ())}
        said = report.get("declared") or {}
        took_part = set((report.get("privacy") or {}).get("sites") or {})
        for entry in report.get("rounds") or []:  # a run without privacy lists its sites here alone
            took_part |= set(entry.get("participants") or ())
        is_complete = is_complete and bool(took_part)
        private |= took_part - set(said)
        declared |= said
    left = {name: what for name, what in sorted(declared.items()) if name not in private}
    left = left if is_complete else {}
    sections = {"declared": left, "free_query": sorted(uncovered)}
    return {name: section for name, section in sections.items() if section} | marks
