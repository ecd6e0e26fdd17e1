"""Render the report's section on a merged adapter: its parents, and how their ε were composed."""

from __future__ import annotations

from typing import Any

from fedtune.core.registry.rounding import rounded_up
from fedtune.report.text import cell, figure, table


def section(merge: dict[str, Any], privacy: dict[str, Any]) -> list[str]:
    """Return the section on a merged adapter as Markdown paragraphs. merge: the report's "merge";
    for {}, the adapter is not merged, and the result is []. privacy: the report's "privacy"."""
    if not merge:
        return []
    parents = merge.get("parents") or []
    rows = [
        [
            str(number),
            cell(parent.get("study")),
            figure(parent.get("weight")),
            rounded_up(parent.get("epsilon")),
            figure(parent.get("delta")),
            f"`{cell(parent.get('plan_digest'))}`",
            f"`{cell(parent.get('adapter_digest'))}`",
        ]
        for number, parent in enumerate(parents, 1)
    ]
    head = ["parent", "study", "weight", "ε", "δ", "plan", "adapter"]
    shown = {name: merge[name] for name in ("rank", "density", "seed") if name in merge}
    how = ", ".join(f"{name} {_figures(value)}" for name, value in shown.items())
    return [
        f"## Merged from {len(parents)} runs\n\nMethod {cell(merge.get('method'))} ({how}). No "
        "record was read, so nothing was spent by merging.",
        table(head, rows),
        *_budget(privacy),
        *_gains(merge.get("kept") or []),
    ]


def _figures(value: Any) -> str:
    """Format a figure as text. A list, which has one figure for each parent, becomes a text in
    which the figures are joined by "and"."""
    return " and ".join(map(figure, value)) if isinstance(value, list) else figure(value)


def _budget(privacy: dict[str, Any]) -> list[str]:
    decided = privacy.get("decided") or []
    if not decided:
        return []
    rows = [[" and ".join(map(str, pair["parents"])), cell(pair["how"])] for pair in decided]
    return [
        "### How the budgets were composed\n\nWhat the parents' studies paid for noised answers "
        "about held-out records is not in this ε: it stands in the parents' own reports.",
        table(["parents", "what is known of their data"], rows, numbers=False),
        *_name_hospitals(privacy.get("sites") or {}),
    ]


def _name_hospitals(sites: dict[str, dict[str, Any]]) -> list[str]:
    """Say which of the sites' names are of one hospital. sites: the report's entries, by name."""
    known = {tuple((site.get("known_as") or {}).get("names") or []) for site in sites.values()}
    return [
        "One hospital, by its names and keys, which pays for all of them: "
        f"{', '.join(cell(name) for name in names)}."
        for names in sorted(known)
        if len(names) > 1
    ]


def _gains(measured: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            str(row["parent"]),
            cell(row["metric"]),
            *(figure(row[name]) for name in ("base", "alone", "merged")),
            "–" if row.get("kept") is None else f"{100 * row['kept']:.0f} %",
        ]
        for row in measured
    ]
    if not rows:
        return []
    head = ["parent", "measure", "base alone", "the parent", "merged", "of the parent's gain"]
    return ["### What was kept of each parent", table(head, rows)]
