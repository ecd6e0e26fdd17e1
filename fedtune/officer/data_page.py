"""Render a data report as one HTML page without scripts, links or images, so that the page loads
nothing."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.officer.data_report import DataReport

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:0 0 1.5rem}td{padding:.2rem 1rem .2rem 0;"
    "border-bottom:1px solid #ddd;vertical-align:top}"
    ".private{border:2px solid #a00;padding:.5rem 1rem;color:#a00;font-weight:bold}"
)
PRIVATE = (
    "Private to the site {site}. This page counts private records without noise: it must not leave "
    "the site, and nothing of it is covered by a study's (ε, δ)."
)


def page(report: DataReport) -> str:
    """Return the report as an HTML page, in which every cell is escaped."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        # No script runs and nothing is fetched, whatever a name holds.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>data of {escape(report.site)}</title><style>{STYLE}</style></head><body>",
        f'<p class="private">{escape(PRIVATE.format(site=report.site))}</p>',
        f"<h1>{escape(report.site)}: {escape(report.path)}</h1>",
    ]
    for heading, rows in report.tables():
        cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        parts.append(f"<h2>{escape(heading)}</h2><table>{body}</table>")
    return "".join([*parts, "</body></html>\n"])
