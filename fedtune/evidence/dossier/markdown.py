"""Render a dossier as Markdown: dossier.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedtune.evidence.dossier.facts import MOST
from fedtune.evidence.dossier.pictures import draw_block
from fedtune.report.text import cell, table

TO_FILL = "TO BE FILLED BY A PERSON"
NOT_RECORDED = "not recorded by this run"
TYPED = "typed by a person, not checked"


def title(content: Mapping[str, Any], what: str = "Dossier") -> str:
    """Return the title of a dossier, or of another page about a run. The study's name in it is in
    quotes, since it may be an ordinary word.

    - content: the content of dossier.json, or a mapping of the same form
    - what: the title's first word, which says what kind of page it is"""
    return f"{what} of the study “{content['study']['shown']}”"


def markdown(content: Mapping[str, Any]) -> str:
    """Return a dossier as Markdown: the text of dossier.md. Values of the run in it are escaped and
    cannot break a line. content: the content of dossier.json."""
    parts = [f"# {cell(title(content))}"]
    parts.append(_contents(content))
    for section in content["sections"]:
        parts.append(f"## {section['title']}")
        parts += _section(section["blocks"])
    return "\n\n".join(parts) + "\n"


def body(blocks: list[dict[str, Any]]) -> str:
    """Render the blocks of a section as Markdown, without the section's heading."""
    return "\n\n".join(_section(blocks)) + "\n"


def _contents(content: Mapping[str, Any]) -> str:
    return "\n".join(f"- [{s['title']}](#{anchor(s['title'])})" for s in content["sections"])


def anchor(title: str) -> str:
    """Return the name by which a link in a Markdown page leads to this heading (its anchor)."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def group_facts(blocks: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Group the blocks of a section for rendering: consecutive facts belong together, since they
    become one table. Yield, in order, pairs (kind, blocks): "facts" with all facts that follow each
    other, and the block's own kind with a list of one for any other block."""
    facts: list[dict[str, Any]] = []
    for block in blocks:
        if block["kind"] == "fact":
            facts.append(block)
            continue
        if facts:
            yield "facts", facts
            facts = []
        yield block["kind"], [block]
    if facts:
        yield "facts", facts


def _section(blocks: list[dict[str, Any]]) -> Iterator[str]:
    for kind, group in group_facts(blocks):
        block = group[0]
        if kind == "facts":
            rows = [[b["label"], *_fact(b["fact"])] for b in group]
            yield table(["what", "value", "source in the run"], rows, numbers=False)
        elif kind == "heading":
            yield f"### {block['heading']}"
        elif kind == "text":
            yield block["text"]
        elif kind == "note":
            yield f"> **{block['note']}**"
        elif kind == "code":
            yield "\n".join(f"    {line}" for line in block["code"].splitlines())
        elif kind == "list":
            yield "\n".join(f"- {item}" for item in block["list"])
        elif kind == "blank":
            yield _blank(block)
        elif kind in ("picture", "curve"):
            found = draw_block(block)
            yield f"![{cell_long(found.alt)}]({found.file})"
            yield f"*{block.get('caption') or block['curve']}*"
        elif kind == "table" and block["rows"]:
            rows = [[_cell(value) for value in row] for row in block["rows"]]
            yield f"{block['table']}:\n\n{table(block['head'], rows, numbers=False)}"


def _fact(fact: Mapping[str, str] | None) -> tuple[str, str]:
    if fact is None:
        return NOT_RECORDED, "–"
    return cell(fact["shown"], MOST), f"`{fact['source'].replace('`', '')}`"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return cell(value["shown"], MOST)
    return NOT_RECORDED if value is None else cell(value)


def _blank(block: Mapping[str, str]) -> str:
    if block["typed"]:
        said = cell_long(block["typed"])
        return f"**{block['label']}** ({TYPED}): {said}"
    return f"**[ ] {TO_FILL}: {block['label']}.** {block['help']}"


def cell_long(text: str) -> str:
    """Escape a text that a person typed for Markdown, and put it on one line. Unlike `cell`, this
    does not cut a long text."""
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 150:
            lines.append("")
        lines[-1] += f" {word}"
    return " ".join(cell(line.strip()) for line in lines)
