"""Say in every output of a run which sites trained on data that no patient is in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

KINDS = ("public", "generated")


def declared_line(report: Mapping[str, Any]) -> str:
    """Name the sites whose data is declared public or generated, in a sentence or two; "" where
    every site's data is private.

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


def declared_in(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the "declared" section of what is made of several runs: a site that trained on private
    data in one of them is not in it. {} where none is left."""
    declared: dict[str, str] = {}
    private: set[str] = set()
    for report in reports:
        said = report.get("declared") or {}
        private |= set((report.get("privacy") or {}).get("sites") or {}) - set(said)
        declared |= said
    left = {name: what for name, what in sorted(declared.items()) if name not in private}
    return {"declared": left} if left else {}
