"""Render a dossier as one HTML file without scripts or requests, which can be read with a keyboard
or a screen reader, and printed."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fedtune.evidence.dossier.markdown import NOT_RECORDED, TO_FILL, TYPED, group_facts, title
from fedtune.evidence.dossier.pictures import draw_block

STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.55 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0; }
header, main, footer, nav { max-width: 52rem; margin: 0 auto; padding: 0 1.25rem; }
.skip { position: absolute; left: -100rem; }
.skip:focus { position: static; display: inline-block; padding: .5rem; }
a { color: #0b4f9e; }
a:focus, [tabindex]:focus { outline: 3px solid #b35900; outline-offset: 2px; }
h1 { line-height: 1.25; } h2 { border-top: 2px solid #444; padding-top: 1rem; margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: .95rem; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { border: 1px solid #8a8a8a; padding: .35rem .5rem; text-align: left; vertical-align: top;
  overflow-wrap: break-word; }
.facts td, td:last-child { overflow-wrap: anywhere; }
thead th { background: #eef1f4; }
.wide { overflow-x: auto; }
.source { font-family: ui-monospace, monospace; font-size: .8rem; color: #4a4a4a; }
.note { border: 3px solid #9c1c1c; padding: .75rem 1rem; font-weight: 600; }
.blank { border: 2px dashed #7a5200; background: #fff7e3; padding: .6rem 1rem; margin: 1rem 0; }
.typed { border-left: 4px solid #555; padding: .2rem 1rem; margin: 1rem 0; white-space: pre-line; }
pre { background: #f3f3f3; padding: .75rem; overflow-x: auto; }
figure { margin: 1.25rem 0; } figcaption { font-size: .9rem; color: #4a4a4a; }
img { width: 100%; min-width: 44rem; height: auto; }
@media print { nav, .skip { display: none; } body { font-size: 10pt; }
  h2, h3 { break-after: avoid; } tr, .blank, .note { break-inside: avoid; }
  .wide { overflow: visible; } img { min-width: 0; }
  figure { break-inside: avoid; } thead { display: table-header-group; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
    content: Mapping[str, Any], what: str = "Dossier", data: str = "dossier.json", wide: str = ""
) -> str:
    """Return a dossier as the text of one HTML file, with its pictures in it.

    - content: the content of dossier.json, or an assurance pack as a mapping of the same form
    - what: the title's first word, which says what kind of page it is
    - data: the name of the JSON file with the same content; the page's foot names it
    - wide: further CSS, for a page with wide tables; "" for none"""
    name = escape(title(content, what))
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}</title>\n<style>{STYLE}{wide}</style>\n</head>\n<body>",
        '<a class="skip" href="#main">Skip to the content</a>',
        f"<header>\n<h1>{name}</h1>\n</header>",
        f'<nav aria-label="Sections">\n<ol>\n{_links(content)}\n</ol>\n</nav>',
        '<main id="main" tabindex="-1">',
    ]
    parts.append(sections(content))
    version = escape(content["run by"]["shown"] if content["run by"] else "")
    parts.append(f"</main>\n<footer>\n<p>The run is by fedtune {version}. The same as data: ")
    parts.append(f"{data}.</p>\n</footer>\n</body>\n</html>")
    return "\n".join(parts) + "\n"


def sections(content: Mapping[str, Any], *, pictures: bool = True) -> str:
    """Return the sections of a dossier as HTML, without the page around them, so that another page
    can show them. Every text is escaped. content: the content of dossier.json, or a mapping of the
    same form; pictures: whether to include the pictures."""
    parts = []
    for section in content["sections"]:
        name = escape(section["id"])
        parts.append(f'<section aria-labelledby="{name}">')
        parts.append(f'<h2 id="{name}">{escape(section["title"])}</h2>')
        blocks = section["blocks"]
        parts += _section(
            blocks if pictures else [b for b in blocks if b["kind"] not in ("picture", "curve")]
        )
        parts.append("</section>")
    return "\n".join(parts)


def _links(content: Mapping[str, Any]) -> str:
    return "\n".join(
        f'<li><a href="#{escape(s["id"])}">{escape(s["title"])}</a></li>'
        for s in content["sections"]
    )


def _section(blocks: list[dict[str, Any]]) -> Iterator[str]:
    for kind, group in group_facts(blocks):
        block = group[0]
        if kind == "facts":
            yield _facts(group)
        elif kind == "heading":
            yield f"<h3>{escape(block['heading'])}</h3>"
        elif kind == "text":
            yield f"<p>{_prose(block['text'])}</p>"
        elif kind == "note":
            yield f'<p class="note">{_prose(block["note"])}</p>'
        elif kind == "code":
            yield f'<pre tabindex="0"><code>{escape(block["code"])}</code></pre>'
        elif kind == "list":
            items = "".join(f"<li>{_prose(item)}</li>" for item in block["list"])
            yield f"<ul>{items}</ul>"
        elif kind == "blank":
            yield _blank(block)
        elif kind in ("picture", "curve"):
            yield _picture(block)
        elif kind == "table" and block["rows"]:
            yield _table(block["table"], block["head"], block["rows"])


def _facts(group: list[dict[str, Any]]) -> str:
    rows = [[block["label"], block["fact"], (block["fact"] or {}).get("source")] for block in group]
    return _table("Facts of the run", ["What", "Value", "Source in the run"], rows, sources=True)


def _table(caption: str, head: list[str], rows: list[list[Any]], *, sources: bool = False) -> str:
    """Return a table as HTML.

    - caption: the text above it
    - head: the names of its columns
    - rows: a list of rows, each a list of cells: texts, facts, blanks, lists of these, or None for
      a value that the run did not record. The first cell of a row is the row's heading
    - sources: whether the last column holds facts' sources (texts or None); these are shown in
      small type"""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    kind = ' class="facts"' if sources else ""
    lines = [
        f"<table{kind}><caption>{escape(caption)}</caption>",
        f"<thead><tr>{names}</tr></thead>",
    ]
    lines.append("<tbody>")
    for first, *rest in rows:
        cells = [f"<td>{_cell(value)}</td>" for value in rest]
        if sources:
            cells[-1] = f'<td class="source">{escape(rest[-1] or "–")}</td>'
        lines.append(f'<tr><th scope="row">{_cell(first)}</th>{"".join(cells)}</tr>')
    lines.append("</tbody></table>")
    return '<div class="wide" role="group" tabindex="0">' + "".join(lines) + "</div>"


def _picture(block: Mapping[str, Any]) -> str:
    found = draw_block(block)
    data = base64.b64encode(found.svg().encode()).decode()
    shown = f'<img alt="{escape(found.alt)}" src="data:image/svg+xml;base64,{data}">'
    caption = _prose(block.get("caption") or block["curve"])
    scrolls = f'<div class="wide" role="group" tabindex="0">{shown}</div>'
    return f"<figure>{scrolls}<figcaption>{caption}</figcaption></figure>"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "<br>".join(map(_cell, value))
    if isinstance(value, Mapping) and "label" in value:
        return f"{_prose(value['label'])}: {_cell(value['fact'])}"
    if isinstance(value, Mapping) and "blank" in value:
        return _blank_in_cell(value)
    if isinstance(value, Mapping):
        return f'<span title="{escape(value["source"])}">{escape(value["shown"])}</span>'
    return NOT_RECORDED if value is None else _prose(str(value))


def _prose(text: str) -> str:
    """Escape a text for HTML; what stands between backticks in it becomes code. If a backtick has
    no partner, all of them stay."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return "".join(f"<code>{part}</code>" if n % 2 else part for n, part in enumerate(parts))


def _blank_in_cell(value: Mapping[str, str]) -> str:
    if value["typed"]:
        return f'<span class="typed">{escape(value["typed"])}</span> ({TYPED})'
    return f'<span class="blank">☐ {TO_FILL}: {_prose(value["help"])}</span>'


def _blank(block: Mapping[str, str]) -> str:
    label, help_text = _prose(block["label"]), _prose(block["help"])
    if block["typed"]:
        said = f'<div class="typed">{escape(block["typed"])}</div>'
        return f"<p><strong>{label}</strong> ({TYPED}):</p>{said}"
    return f'<p class="blank"><strong>☐ {TO_FILL}: {label}.</strong> {help_text}</p>'
