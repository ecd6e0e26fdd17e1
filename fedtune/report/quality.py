"""Render the part of report.md about quality: the measured figures with their intervals, and the
records on which they were measured."""

from __future__ import annotations

from typing import Any

from fedtune.core.registry.metrics import metric as known_metric
from fedtune.core.registry.rounding import number
from fedtune.report.classes import section as classes
from fedtune.report.gain import TRAINED, advice, headline, is_start_released
from fedtune.report.text import cell, figure, table

HELD_OUT = "the study's held-out records"
BEFORE_AFTER = ("base alone", "with the adapter")


LONG = 1000  # a sentence is cut after so many characters


def section(report: dict[str, Any]) -> str:
    """Return the section on quality as Markdown. It says what the sites' records added and which
    model is released; then it gives the figures with their intervals and the number of records;
    then what was chosen on selection records. If nothing was measured, it says so."""
    quality = report.get("quality") or {}
    metric = quality.get("metric")
    if not metric:
        said = "Not measured: the study has no [evaluation] table."
        parts = ["## Quality", *headline_lines(report), said, classes(quality)]
        return "\n\n".join(part for part in parts if part)
    before, after = quality.get("before"), quality.get("after")
    if not isinstance(before, dict):
        before, after = {metric: before}, {metric: after}
    after = after if isinstance(after, dict) else {metric: after}
    names = [metric, *sorted((set(before) | set(after)) - {metric, "round"})]
    others = _others(quality)
    rows = []
    for name in names:
        b, a = number(before.get(name)), number(after.get(name))
        change = "–" if b is None or a is None else f"{a - b:+.4g}"
        bounds = intervals(quality, name)
        arrow = "higher is better" if known_metric(name).higher_is_better else "lower is better"
        shown = {"before": figure(before.get(name))}
        shown |= {key: figure(quality[key].get(name)) for key in others}
        shown |= {"after": figure(after.get(name)), "change": change}
        cells = [f"{value}{_between(bounds.get(key), key)}" for key, value in shown.items()]
        rows.append([f"{cell(name)} ({arrow})", *cells])
    count = (quality.get("gain") or {}).get("records")
    on = cell(quality.get("on") or HELD_OUT) + (f", {figure(count)} of them" if count else "")
    between = (
        "; in brackets 95 % intervals over those records" if intervals(quality, metric) else ""
    )
    first, last = map(cell, quality.get("columns") or _columns(quality))
    head = ["measure", first, *others.values(), last, "change"]
    return (
        "\n\n".join(["## Quality", *headline_lines(report)])
        + f"\n\nOn {on}, at the coordinator{between or ''}.\n\n"
        + table(head, rows)
        + _pairs(quality)
        + (f"\n\n{by_class}" if (by_class := classes(quality)) else "")
        + _describe_selection(quality)
        + "\n\n![Quality and ε by round](progress.png)"
    )


def headline_lines(report: dict[str, Any]) -> list[str]:
    """Return the main sentences on a run's quality (`gain.headline`, and `gain.advice` if there is
    any) as Markdown, one text for each paragraph."""
    said = [_sentence(line.text) for line in headline(report.get("quality") or {})]
    lines = [f"**{text}**" for text in said]
    return [*lines, _sentence(more)] if (more := advice(report)) else lines


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{cell(text[1:], LONG)}."


def _columns(quality: dict[str, Any]) -> tuple[str, str]:
    """Return the heads of two columns of a table: the column with the base's figures, and the
    column with the released model's figures."""
    return (
        ("base alone", "released: public text alone")
        if is_start_released(quality)
        else (BEFORE_AFTER)
    )


def _others(quality: dict[str, Any]) -> dict[str, str]:
    """Find the model that is neither the base nor the released one: the public start or, if the
    start is released, the trained model. Return a dict with one entry, the model's key in `quality`
    -> the head of its column; {} if there is no such model."""
    named = {"start": "public text alone"}
    if is_start_released(quality):
        named = {TRAINED: "trained, not released"}
    return {key: head for key, head in named.items() if isinstance(quality.get(key), dict)}


def _pairs(quality: dict[str, Any]) -> str:
    """Return the warnings about a preference run and the section on its pairs, as Markdown that is
    appended to the section on quality; "" for another run."""
    from fedtune.report.preference import alarms, section

    pairs = section(quality)
    lines = [f"\n\n> **Warning:** {alarm}." for alarm in alarms(quality)]
    return "".join([*lines, f"\n\n{pairs}" if pairs else ""])


def intervals(quality: dict[str, Any], name: Any) -> dict[str, list[float]]:
    """Return the 95 % intervals [lower, upper] of a metric's figures. The keys are "before",
    "after", "change", and "trained" if the trained model is not released; {} if no intervals were
    computed. quality: the report's "quality"; name: the metric.

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


def _describe_selection(quality: dict[str, Any]) -> str:
    """Return the paragraph that says what was chosen on public records: how far each round moved
    the adapter, the version in use, or nothing at all. Return "" if the evaluation was not
    finished."""
    rounds = quality.get("selection")
    if "version" in quality:  # of a study without a last round
        return (
            "\n\nThe version in use was chosen by comparisons on the public records, so that its "
            "figures may be better here than on records that chose nothing."
        )
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
