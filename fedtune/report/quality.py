"""The part of report.md that says what was measured, on what, and how sure it is."""

from __future__ import annotations

from typing import Any

from fedtune.registry.metrics import metric as known_metric
from fedtune.report.claim import compared, number, verdict
from fedtune.report.text import cell, figure, table

HELD_OUT = "the study's held-out records"
BEFORE_AFTER = ("base alone", "with the adapter")


def section(quality: dict[str, Any]) -> str:
    """Render what was measured, on how many records, with an interval beside every figure; whether
    the model is better; what was chosen on which records."""
    metric = quality.get("metric")
    if not metric:
        return "## Quality\n\nNot measured: the study has no [evaluation] table."
    before, after = quality.get("before"), quality.get("after")
    if not isinstance(before, dict):
        before, after = {metric: before}, {metric: after}
    after = after if isinstance(after, dict) else {metric: after}
    names = [metric, *sorted((set(before) | set(after)) - {metric, "round"})]
    rows = []
    for name in names:
        b, a = number(before.get(name)), number(after.get(name))
        change = "–" if b is None or a is None else f"{a - b:+.4g}"
        bounds = intervals(quality, name)
        arrow = "higher is better" if known_metric(name).higher_is_better else "lower is better"
        shown = (figure(before.get(name)), figure(after.get(name)), change)
        told = zip(shown, ("before", "after", "change"), strict=True)
        cells = [f"{value}{_between(bounds.get(key), key)}" for value, key in told]
        rows.append([f"{cell(name)} ({arrow})", *cells])
    count = (quality.get("gain") or {}).get("records")
    on = cell(quality.get("on") or HELD_OUT) + (f", {figure(count)} of them" if count else "")
    between = (
        "; in brackets 95 % intervals over those records" if intervals(quality, metric) else ""
    )
    return (
        f"## Quality\n\nOn {on}, at the coordinator{between or ''}.\n\n"
        + table(["measure", *map(cell, quality.get("columns") or BEFORE_AFTER), "change"], rows)
        + _verdict(quality)
        + _started(quality, names)
        + _selected(quality)
        + "\n\n![Quality and ε by round](progress.png)"
    )


def _verdict(quality: dict[str, Any]) -> str:
    """Whether the model is better than the base, and what speaks against it; or nothing."""
    from fedtune.report.preference import alarms, section  # which writes with text's table

    claim, pairs = verdict(quality), section(quality)
    lines = [f"\n\nThe trained model is {cell(claim)}."] if claim else []
    lines += [f"\n\n> **Warning:** {alarm}." for alarm in alarms(quality)]
    return "".join([*lines, f"\n\n{pairs}" if pairs else ""])


def intervals(quality: dict[str, Any], name: Any) -> dict[str, list[float]]:
    """Return the 95 % intervals of a metric's figures: "before", "after", "change"; {} where they
    were not computed.

    >>> intervals({"gain": {"intervals": {"loss": {"after": [1.0, 2.0]}}}}, "loss")
    {'after': [1.0, 2.0]}
    """
    found = ((quality.get("gain") or {}).get("intervals") or {}).get(name)
    bounds: dict[str, list[float]] = {}
    for key, bound in (found or {}).items():
        low, high = (number(edge) for edge in bound)
        if low is not None and high is not None:
            bounds[key] = [low, high]
    return bounds


def _between(bound: list[float] | None, key: str) -> str:
    if bound is None:
        return ""
    sign = "+" if key == "change" else ""
    return f" ({bound[0]:{sign}.4g} to {bound[1]:{sign}.4g})"


def _started(quality: dict[str, Any], names: list[str]) -> str:
    """What the public start alone gives; a paragraph, or nothing."""
    start = quality.get("start")
    if not isinstance(start, dict):
        return ""
    figures = ", ".join(f"{cell(n)} {figure(start[n])}" for n in names if n in start)
    told = compared(str(quality.get("metric")), (quality.get("gain") or {}).get("over_start"))
    added = f" With the sites' records the model is {told[0]} that: {told[1]}." if told else ""
    return f"\n\nBefore the first round, from public text alone and for no ε: {figures}.{added}"


def _selected(quality: dict[str, Any]) -> str:
    """How far the coordinator let each round move the adapter; a paragraph, or nothing."""
    rounds = quality.get("selection")
    if not isinstance(rounds, list) or not rounds:
        if not (quality.get("by_round") and quality.get("gain")):
            return ""
        return (
            "\n\nNothing was chosen on these records: the model is that of the last round, and its "
            "settings are the plan's."
        )
    count = number(quality.get("selection_records"))
    on = f"{figure(count)} public [selection] records" if count else "public [selection] records"
    losses = [(row.get("selection") or {}).get("loss") for row in rounds]
    rows = [
        [figure(row.get("round")), figure(row.get("keep")), figure(row.get("step")), figure(loss)]
        for row, loss in zip(rounds, losses, strict=True)
    ]
    return (
        f"\n\nHow far each round moved the adapter was chosen on the {on}; "
        "the evaluation records chose nothing. A step of 0: no length lowered the loss.\n\n"
        + table(
            ["round", "kept of the past", "step, times the update", "loss on those records"], rows
        )
    )
