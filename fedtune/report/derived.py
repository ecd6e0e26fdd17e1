"""Render the report's section on a model derived at the coordinator from runs and public
prompts."""

from __future__ import annotations

from typing import Any

from fedtune.core.registry.rounding import rounded_up
from fedtune.report.text import cell, figure, table

NOTE = (
    "It was made from finished runs and public prompts alone, after the sites had released their "
    "updates. Whatever is computed from these has at most the runs' own (ε, δ) "
    "(post-processing), so this step cost no ε."
)


def section(derived: dict[str, Any]) -> list[str]:
    """Return the section on a derived model as Markdown paragraphs: the runs and prompts from which
    it was made. derived: the report's "derived"; for {}, the model is not derived, and the result
    is []."""
    if not derived:
        return []
    rows = [
        [
            cell(parent.get("name")),
            cell(parent.get("role") or "teacher"),
            rounded_up((parent.get("privacy") or {}).get("epsilon")),
            figure((parent.get("privacy") or {}).get("delta")),
            f"`{cell(parent.get('plan'))}`",
            f"`{cell(parent.get('digest'))}`",
        ]
        for parent in derived.get("parents") or []
    ]
    prompts = derived.get("prompts") or {}
    paragraphs = [
        f"## How it was {cell(derived.get('step'))}\n\n{NOTE} The ε above is that of the runs "
        "below, composed.",
        table(["run", "as", "ε", "δ", "plan", "base and adapter"], rows),
        f"Public prompts: {figure(prompts.get('prompts'))}, licence "
        f"{cell(prompts.get('licence'))}, `{cell(prompts.get('digest'))}`.",
    ]
    for name in ("settings", "measured"):
        if values := derived.get(name):
            lines = [[cell(key), figure(value)] for key, value in sorted(values.items())]
            paragraphs.append(table([name, ""], lines, numbers=False))
    return paragraphs
