"""Render the part of report.md about how a run was made: times, machine, versions, settings, and
who signed."""

from __future__ import annotations

from typing import Any

from fedtune.report.text import cell, figure, table

SHOWN = 16  # digits of a signing key that are shown; report.json has the whole key


def section(report: dict[str, Any]) -> list[str]:
    """Return the paragraphs about how a run was made, as Markdown, from the report's "settings",
    "signed" and "ran"; [] if the report has none of these."""
    parts = [_settings(report.get("settings") or {}), _describe_signed(report.get("signed") or {})]
    parts.append(_describe_run(report.get("ran") or {}))
    return [part for part in parts if part]


def _describe_run(ran: dict[str, Any]) -> str:
    machine, versions = ran.get("machine") or {}, ran.get("versions") or {}
    rows = [
        [words, cell(value)]
        for words, value in (
            ("first round began, UTC", ran.get("began")),
            ("last round ended, UTC", ran.get("ended")),
            ("system", machine.get("system")),
            ("processor", machine.get("processor")),
            ("cores", machine.get("cores")),
            ("GPU", machine.get("gpu") or ("none" if machine else None)),
            ("versions", ", ".join(f"{name} {is_}" for name, is_ in versions.items()) or None),
        )
        if value is not None
    ]
    if not rows:
        return ""
    return (
        "## When and where\n\nBy the coordinator's clock, on its machine (in a simulation also the "
        f"sites'); what a site runs on is not asked.\n\n{table(['', ''], rows, numbers=False)}"
    )


def _settings(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    options = ", ".join(f"{name} = {value}" for name, value in settings.get("options", {}).items())
    strategy = f"{settings.get('strategy')}{f' ({options})' if options else ''}"
    rounds, steps = settings.get("rounds"), settings.get("local_steps")
    rows = [
        ["objective", cell(settings.get("objective"))],
        ["strategy, weights", cell(f"{strategy}, {settings.get('weights')}")],
        ["optimizer, learning rate", cell(f"{settings.get('optimizer')}, {_rate(settings)}")],
        ["rounds × noised steps at a site", cell(f"{rounds or 'no last one'} × {steps}")],
    ]
    return f"## Settings of the plan\n\n{table(['', ''], rows, numbers=False)}"


def _rate(settings: dict[str, Any]) -> str:
    return figure(settings.get("learning_rate"))


def _describe_signed(signed: dict[str, Any]) -> str:
    if not signed:
        return ""
    rows = [
        [
            cell(name),
            figure(site.get("declared_size")),
            figure(site.get("updates")),
            f"`{cell(str(site.get('key') or '')[:SHOWN])}…`" if site.get("key") else "–",
        ]
        for name, site in sorted(signed.items())
    ]
    head = ["site", "declared size", "updates that counted", "its signing key begins"]
    return (
        "## Who took part and signed\n\nThe size is what a site states in public. Each update that "
        "counted was sealed with its site's key, over the plan, the round and the base, and the "
        f"seal was verified here. The whole keys are in report.json.\n\n{table(head, rows)}"
    )
