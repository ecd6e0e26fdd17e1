"""Render a dossier as one printable PDF, dossier.pdf. This needs fpdf2, of the extra `dossier`.

The font is DejaVu Sans, which comes with matplotlib: the built-in fonts of PDF readers lack ε, σ
and ☐."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedtune.evidence.dossier.markdown import NOT_RECORDED, TO_FILL, TYPED, group_facts, title
from fedtune.evidence.dossier.pdf_picture import draw
from fedtune.evidence.dossier.pictures import draw_block

SANS, MONO = "DejaVu", "DejaVuMono"
FILES = {
    (SANS, ""): "DejaVuSans.ttf",
    (SANS, "B"): "DejaVuSans-Bold.ttf",
    (MONO, ""): "DejaVuSansMono.ttf",
}
SIZES = {"title": 20, "section": 15, "heading": 11.5, "text": 9.5, "table": 8, "small": 7}
LINES = (138, 138, 138)
GREY = (90, 90, 90)
RED = (156, 28, 28)
AMBER = (122, 82, 0)
BREAK = "\u200b"  # zero-width space, after which a long word may be broken
BROKEN_AFTER = "/_.#-"
LONG = 24  # a longer word may be broken: after BROKEN_AFTER, else after so many letters


def can_write() -> bool:
    """Return whether fpdf2 is installed."""
    return importlib.util.find_spec("fpdf") is not None


def pdf(content: Mapping[str, Any]) -> bytes:
    """Return a dossier as the bytes of a PDF file (A4), with its pictures in it. content: the
    content of dossier.json.

    Errors: ModuleNotFoundError without fpdf2."""
    document = _create_document(title(content))
    document.set_font(SANS, "B", SIZES["title"])
    document.multi_cell(0, 9, document.title, new_x="LMARGIN", new_y="NEXT")
    for section in content["sections"]:
        _heading(document, section["title"], 0)
        for kind, group in group_facts(section["blocks"]):
            _block(document, kind, group)
    return bytes(document.output())


def _create_document(title: str) -> Any:
    from fpdf import FPDF

    class Document(FPDF):  # type: ignore[misc]
        def footer(self) -> None:
            self.set_y(-12)
            self.set_font(SANS, "", SIZES["small"])
            self.set_text_color(*GREY)
            self.cell(0, 6, f"{title}; page {self.page_no()} of {{nb}}", align="C")
            self.set_text_color(0)

    document = Document(format="A4")
    document.set_auto_page_break(True, margin=18)
    document.set_margins(18, 16, 18)
    document.set_title(title)
    document.set_lang("en")
    document.set_creator("fedtune")
    package = importlib.util.find_spec("matplotlib")
    assert package and package.origin
    folder = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf"
    for (family, style), name in FILES.items():
        document.add_font(family, style, str(folder / name))
    document.add_page()
    return document


def _heading(document: Any, text: str, level: int) -> None:
    size = SIZES["heading" if level else "section"]
    if document.will_page_break(45):  # keep a heading on the page of its text
        document.add_page()
    document.ln(3 if level else 6)
    document.set_font(SANS, "B", size)
    document.start_section(text, level)
    document.multi_cell(0, size * 0.5, text, align="L", new_x="LMARGIN", new_y="NEXT")
    document.ln(1.5)


def _block(document: Any, kind: str, group: list[dict[str, Any]]) -> None:
    block = group[0]
    if kind == "heading":
        _heading(document, block["heading"], 1)
    elif kind == "facts":
        rows = [[b["label"], b["fact"], (b["fact"] or {}).get("source", "–")] for b in group]
        _table(document, ["What", "Value", "Source in the run"], rows)
    elif kind == "table" and block["rows"]:
        if document.will_page_break(30):  # keep a caption on the page of its table
            document.add_page()
        _text(document, block["table"], style="B")
        _table(document, block["head"], block["rows"])
    elif kind == "list":
        for item in block["list"]:
            _text(document, f"•  {item}", indent=4)
    elif kind in DRAWN:
        DRAWN[kind](document, block)


def _text(
    document: Any,
    text: str,
    style: str = "",
    indent: float = 0,
    font: str = SANS,
    size: str = "text",
) -> None:
    """Write a paragraph at the document's present position, and move the position below it.

    - document: the fpdf2 document
    - text: the paragraph; its backticks are left out
    - style: "", or "B" for bold, which only the font SANS has
    - indent: the distance from the left margin, in millimetres
    - font: SANS or MONO
    - size: the name of the font's size, a key of SIZES"""
    document.set_font(font, style, SIZES[size])
    document.set_x(document.l_margin + indent)
    width = document.epw - indent
    plain = _make_breakable(text.replace("`", ""))
    document.multi_cell(width, 4.8, plain, align="L", new_x="LMARGIN", new_y="NEXT")
    document.ln(1.2)


def _draw_box(document: Any, text: str, colour: tuple[int, int, int], style: str) -> None:
    """Write a text in a frame at the document's present position, or on a new page if too little
    space is left on this one.

    - document: the fpdf2 document
    - text: the text; its backticks are left out
    - colour: the frame's red, green and blue, from 0 to 255
    - style: "", or "B" for bold"""
    document.set_font(SANS, style, SIZES["text"])
    plain = _make_breakable(text.replace("`", ""))
    lines = document.get_string_width(plain) / document.epw + 2
    if document.will_page_break(min(5 * lines + 6, 60)):  # keep a box on one page
        document.add_page()
    document.set_draw_color(*colour)
    document.set_line_width(0.5)
    document.ln(1)
    document.multi_cell(0, 5, plain, border=1, align="L", padding=2, new_x="LMARGIN", new_y="NEXT")
    document.ln(2)
    document.set_draw_color(0)
    document.set_line_width(0.2)


def _blank(document: Any, block: Mapping[str, str]) -> None:
    if block["typed"]:
        if document.will_page_break(15):
            document.add_page()
        _text(document, f"{block['label']} ({TYPED}):", style="B")
        _text(document, block["typed"], indent=4)
        return
    _draw_box(document, f"☐ {TO_FILL}: {block['label']}. {block['help']}", AMBER, "")


def _picture(document: Any, block: Mapping[str, Any]) -> None:
    document.ln(1)
    draw(document, draw_block(block).picture, SANS)
    document.ln(1)
    _text(document, block.get("caption") or block["curve"], size="small")


DRAWN: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "text": lambda document, block: _text(document, block["text"]),
    "note": lambda document, block: _draw_box(document, block["note"], RED, "B"),
    "code": lambda document, block: _text(document, block["code"], indent=4, font=MONO),
    "blank": _blank,
    "picture": _picture,
    "curve": _picture,
}


def _widths(document: Any, head: list[str], rows: list[list[Any]]) -> tuple[float, ...]:
    """Compute the width of each column of a table, in millimetres. A column gets the width of its
    longest word and a part of the space that is then left, in proportion to the mean length of its
    cells.

    - document: the fpdf2 document
    - head: the names of the columns
    - rows: a list of rows, each a list of cells: texts, facts, or None for a value that the run did
      not record"""
    document.set_font(SANS, "B", SIZES["table"])
    least, means = [], []
    for n, name in enumerate(head):
        cells = [_cell(row[n]) for row in rows]
        words = [
            w for text in (name, *cells) for w in _make_breakable(text).replace(BREAK, " ").split()
        ]
        least.append(max(map(document.get_string_width, words)) + 4)
        means.append(min(sum(map(len, cells)) / max(len(cells), 1), 60.0) + 1)
    rest = max(document.epw - sum(least), 0.0)
    pairs = zip(least, means, strict=True)
    return tuple(width + rest * mean / sum(means) for width, mean in pairs)


def _table(document: Any, head: list[str], rows: list[list[Any]]) -> None:
    from fpdf.fonts import FontFace

    widths = _widths(document, head, rows)
    document.set_font(SANS, "", SIZES["table"])
    style = FontFace(emphasis="BOLD", fill_color=(238, 241, 244))
    document.set_draw_color(*LINES)
    document.ln(0.5)
    with document.table(
        col_widths=widths, headings_style=style, line_height=4, padding=1, text_align="LEFT"
    ) as table:
        table.row([_make_breakable(name) for name in head])
        for row in rows:
            table.row([_make_breakable(_cell(value)) for value in row])
    document.set_draw_color(0)
    document.ln(2.5)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value["shown"])
    return NOT_RECORDED if value is None else str(value).replace("`", "")


def _make_breakable(text: str) -> str:
    """Return the text with invisible places for line breaks in each word longer than LONG, so that
    a long word fits into a line. There is such a place after each of the characters in BROKEN_AFTER
    and, where none of them occurs, after every LONG letters."""
    return " ".join(_word(word) if len(word) > LONG else word for word in text.split(" "))


def _word(word: str) -> str:
    parts = "".join(f"{c}{BREAK}" if c in BROKEN_AFTER else c for c in word).split(BREAK)
    pieces = [part[n : n + LONG] for part in parts for n in range(0, len(part), LONG)]
    return BREAK.join(pieces)
