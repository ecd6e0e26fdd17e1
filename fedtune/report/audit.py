"""Render the report's section on audits, with the ε that attacks found and the claimed ε."""

from __future__ import annotations

from typing import Any

from fedtune.core.registry.rounding import number, rounded_up
from fedtune.report.text import cell, figure, table


def section(audit: dict[str, Any]) -> list[str]:
    """Return the report's section on the audits as Markdown paragraphs; [] if there were none.
    audit: the result of `audit_study`, {} without an audit."""
    if not audit:
        return []
    rows = [_row(name, audit.get(key) or {}) for key, name in _AUDITS.items() if audit.get(key)]
    head = ["audit", "ε claimed for it", "ε found (95 %)", "ε found (99.9 %)", "δ", "verdict"]
    verdict = (
        "No audit contradicts the claim."
        if audit.get("passed")
        else "**An audit contradicts the claim: do not release; run `fedtune doctor`.**"
    )
    return [
        "## Audit",
        f"{verdict} An audit plays the attacker and gives a lower bound on ε: it can show that a "
        "claim is broken, never that it holds. It ran on "
        f"{cell(audit.get('data'))}.",
        table(head, rows),
        *_notes(audit),
    ]


_AUDITS = {
    "one_step": "one step, a worst-case unit",
    "one_step_alone": "the same, one site's own noise alone",
    "one_run": "one training run, coin by coin",
}


def _row(name: str, result: dict[str, Any]) -> list[str]:
    verdict = "holds" if result.get("passed") else "broken"
    if verdict == "broken" and result.get("weak"):
        verdict = "too weak"
    bounds = [figure(result.get(key)) for key in ("audited", "ceiling", "delta")]
    return [name, rounded_up(result.get("claimed")), *bounds, verdict]


def _notes(audit: dict[str, Any]) -> list[str]:
    notes = []
    if step := audit.get("one_step"):
        notes.append(
            f"One step: {figure(step.get('trials'))} test units that were in their step and as "
            "many that were not, none left out by sampling (q = 1), judged under the assumption of "
            f"a {cell(step.get('assumption'))}. Its ε is compared with that of one step, not of "
            "the run. A verdict of “too weak” means that less than 80 % of a claim of at least 3 "
            "was found, so that the step is not the one described."
        )
    if audit.get("assumption"):
        notes.append(
            "The sites share one dose of noise. The first row is of the sum that is opened, and "
            f"its ε holds if {cell(audit['assumption'])}: the attacker has taken out what those "
            "know. The second is of a single site's update, as if all others colluded; so is the "
            "run that is attacked coin by coin."
        )
    if one_run := audit.get("one_run"):
        notes.append(
            f"One run: {figure(one_run.get('correct'))} of {figure(one_run.get('guesses'))} "
            f"guesses about {figure(one_run.get('m'))} units were right after "
            f"{figure(one_run.get('steps'))} steps (Steinke et al. 2023; no assumption, and far "
            "from tight)."
        )
    if secret := audit.get("exposure"):
        mean, limit = number(secret.get("mean")), number(secret.get("limit"))
        knows = mean is not None and limit is not None and mean > limit
        notes.append(
            f"Canary exposure of the released adapter: {figure(mean)} bits "
            f"(base alone {figure(secret.get('base'))}, chance {figure(secret.get('chance'))}, "
            f"limit {figure(limit)}). "
            + (
                "**The adapter knows planted secrets.**"
                if knows
                else "The adapter shows no knowledge of the planted secrets; if none was planted, "
                "this says only that the measure works."
            )
        )
    return notes
