"""Draw a picture of drawing.py into a PDF, as vector shapes and text."""

from __future__ import annotations

import math
import re
from typing import Any

from fedtune.evidence.dossier.drawing import LIGHT, Box, Line, Picture, Text

COLOURS = {
    name: tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
    for name, colour in re.findall(r"(?<![a-z-])--([a-z-]+): (#[0-9a-f]{6})", LIGHT)
}
GROUNDS = {"box": ("fill", "line"), "home": ("home", "home-line"), "out": ("out", "out-line")}
INKS = {"soft": "soft", "key": "key", "bad": "out-line", "good": "home-line"}
STROKES = {"arrow": "soft", "leaves": "out-line"}
HEAD = 8.0  # length of an arrow's head, in pixels
POINTS = 72 / 25.4  # points in a millimetre


def draw(document: Any, picture: Picture, font: str) -> None:
    """Draw a picture as wide as the text at the document's present position, and move the position
    below it. document: the fpdf2 document; font: the font family of the picture's texts, which the
    document has already loaded in regular and bold."""
    scale = document.epw / picture.width
    if document.will_page_break(picture.height * scale + 14):  # keep it with its caption
        document.add_page()
    left, top = document.l_margin, document.get_y()
    document.set_line_width(1.2 * scale)
    for shape in picture.shapes:
        if isinstance(shape, Box):
            _box(document, shape, left, top, scale)
        elif isinstance(shape, Line):
            _line(document, shape, left, top, scale)
        else:
            _text(document, shape, left, top, scale, font)
    document.set_line_width(0.2)
    document.set_draw_color(0)
    document.set_fill_color(255)
    document.set_text_color(0)
    document.set_y(top + picture.height * scale)


def _box(document: Any, box: Box, left: float, top: float, scale: float) -> None:
    """Draw a box of a picture.

    - document: the fpdf2 document
    - box: the shape, whose positions are in pixels of the picture
    - left, top: the picture's upper left corner on the page, in millimetres
    - scale: millimetres per pixel of the picture"""
    ground, edge = GROUNDS[box.kind]
    document.set_fill_color(*COLOURS[ground])
    document.set_draw_color(*COLOURS[edge])
    document.rect(
        left + box.x * scale,
        top + box.y * scale,
        box.wide * scale,
        box.high * scale,
        style="DF",
        round_corners=True,
        corner_radius=min(6.0, box.wide / 2, box.high / 2) * scale,
    )


def _line(document: Any, line: Line, left: float, top: float, scale: float) -> None:
    """Draw a line of a picture, with its arrow head or its dashes.

    - line: the shape, whose positions are in pixels of the picture
    - document: the fpdf2 document
    - left, top: the picture's upper left corner on the page, in millimetres
    - scale: millimetres per pixel of the picture"""
    colour = COLOURS[STROKES[line.kind]]
    document.set_draw_color(*colour)
    document.set_fill_color(*colour)
    if line.end == "dashes":
        document.set_dash_pattern(dash=4 * scale, gap=4 * scale)
    x, y = left + line.x * scale, top + line.y * scale
    to_x, to_y = left + line.to_x * scale, top + line.to_y * scale
    document.line(x, y, to_x, to_y)
    document.set_dash_pattern()
    if line.end == "head":
        turned, length = math.atan2(to_y - y, to_x - x), HEAD * scale
        wings = [turned + math.pi + sign * math.atan(0.5) for sign in (-1, 1)]
        reach = length / math.cos(math.atan(0.5))
        tips = [(to_x + reach * math.cos(w), to_y + reach * math.sin(w)) for w in wings]
        document.polygon([(to_x, to_y), *tips], style="F")


def _text(document: Any, text: Text, left: float, top: float, scale: float, font: str) -> None:
    """Draw a text of a picture. Its letters are made narrower if it would be wider than its `room`.

    - text: the shape, whose positions are in pixels of the picture
    - font: the font family in which the text is set
    - document: the fpdf2 document
    - left, top: the picture's upper left corner on the page, in millimetres
    - scale: millimetres per pixel of the picture"""
    kinds = text.kind.split()
    document.set_font(font, "B" if "bold" in kinds else "", text.size * scale * POINTS)
    ink = next((INKS[kind] for kind in kinds if kind in INKS), "ink")
    document.set_text_color(*COLOURS[ink])
    wide = document.get_string_width(text.line)
    room = text.room * scale
    if wide > room:  # the PDF's font is wider than that for which the positions were chosen
        document.set_stretching(100 * room / wide)
    shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.anchor] * min(wide, room)
    document.text(left + text.x * scale - shift, top + text.y * scale, text.line)
    document.set_stretching(100)
