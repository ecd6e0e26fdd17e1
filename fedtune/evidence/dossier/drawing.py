"""Draw pictures of boxes, lines and texts, as shapes and as SVG.

The SVG is written by hand, so that the files are small, have the same bytes each time, and follow
the reader's light or dark colours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from xml.sax.saxutils import escape

LIGHT = """
svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #8c959f; --fill: #f3f5f8;
  --home: #e6f4ea; --home-line: #246b3a; --out: #fff3e0; --out-line: #964800; --key: #1f5fbf }
"""
DARK = """\
@media (prefers-color-scheme: dark) { svg { --paper: #12161c; --ink: #e6edf3; --soft: #a3adb8;
  --line: #69737e; --fill: #1d232b; --home: #16301f; --home-line: #57b573; --out: #38260f;
  --out-line: #f0a04b; --key: #7fb2ff } }
"""
RULES = """\
text { font-family: system-ui, "DejaVu Sans", sans-serif; fill: var(--ink) }
.soft { fill: var(--soft) } .key { fill: var(--key) } .bad { fill: var(--out-line) }
.good { fill: var(--home-line) } .bold { font-weight: 600 }
.box { fill: var(--fill); stroke: var(--line) }
.home { fill: var(--home); stroke: var(--home-line) }
.out { fill: var(--out); stroke: var(--out-line) } .arrow { stroke: var(--soft); fill: none }
.leaves { stroke: var(--out-line); fill: none } .paper { fill: var(--paper) }
"""
STYLE = LIGHT + DARK + RULES
HEADS = "".join(
    f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
    f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="var({color})"/>'
    "</marker>"
    for name, color in (("arrow", "--soft"), ("leaves", "--out-line"))
)
# A text's size, the distance of its lines, and the mean width of a character over the size.
SIZE = 12
STEP = 17
CHARACTER = 0.54


@dataclass(frozen=True)
class Text:
    """A text in a picture.

    - x, y: where it stands in the picture, in pixels; y is the height of its baseline
    - line: the text, on one line
    - kind: its CSS classes (of those in RULES), separated by spaces; "" for ordinary text
    - anchor: "start", "middle" or "end", the part of the text that is at x
    - size: the font's size in pixels
    - room: how wide it may be at most, in pixels"""

    x: float
    y: float
    line: str
    kind: str
    anchor: str
    size: int
    room: float

    def svg(self) -> str:
        return (
            f'<text x="{self.x:g}" y="{self.y:g}" class="{self.kind}" '
            f'text-anchor="{self.anchor}" font-size="{self.size}">{escape(self.line)}</text>'
        )


@dataclass(frozen=True)
class Box:
    """A rectangle in a picture.

    - x, y: its upper left corner, in pixels
    - wide, high: its size in pixels
    - kind: its CSS class, which gives its colour: "box" (grey), "home" (green) or "out" (orange)"""

    x: float
    y: float
    wide: float
    high: float
    kind: str

    def svg(self) -> str:
        return (
            f'<rect class="{self.kind}" x="{self.x:g}" y="{self.y:g}" width="{self.wide:g}" '
            f'height="{self.high:g}" rx="6"/>'
        )


@dataclass(frozen=True)
class Line:
    """A line in a picture.

    - x, y, to_x, to_y: where it starts and ends, in pixels; an arrow head is at the end
    - kind: its CSS class, which gives its colour: "arrow" (grey) or "leaves" (orange)
    - end: "head" for a line with an arrow head, "dashes" for a dashed line, "" for a plain line"""

    x: float
    y: float
    to_x: float
    to_y: float
    kind: str
    end: str

    def svg(self) -> str:
        path = f'<path class="{self.kind}" d="M{self.x:g} {self.y:g}L{self.to_x:g} {self.to_y:g}" '
        ends = {
            "head": f'stroke-width="1.6" marker-end="url(#{self.kind})"/>',
            "dashes": 'stroke-dasharray="4 4"/>',
            "": 'stroke-width="1.6"/>',
        }
        return path + ends[self.end]


class Picture:
    """A picture to which shapes are added. All positions are in pixels from the upper left corner.

    - width, height: its size in pixels
    - title: its name, which the SVG holds for a screen reader and does not draw"""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width = width
        self.height = height
        self.title = title
        self.shapes: list[Text | Box | Line] = []

    def text(
        self,
        x: float,
        y: float,
        line: str,
        kind: str = "",
        anchor: str = "start",
        size: int = SIZE,
        room: float | None = None,
    ) -> None:
        """Add a line of text.

        - x, y: where it stands; y is the height of its baseline
        - line: the text, on one line
        - kind: its CSS classes (of those in RULES), such as "bold soft"; "" for ordinary text
        - anchor: "start", "middle" or "end", the part of the text that is at x
        - size: the font's size in pixels
        - room: how wide it may be at most, in pixels; None: up to the picture's edge

        Errors: ValueError if the text is wider than `room`; its width is estimated from its number
        of characters."""
        wide = len(line) * size * CHARACTER
        edges = {"start": self.width - x, "middle": 2 * min(x, self.width - x), "end": x}
        most = room or edges[anchor]
        if wide > most:
            raise ValueError(f"{line!r} is {wide:.0f} wide; expected at most {most:g}")
        self.shapes.append(Text(x, y, line, kind, anchor, size, most))

    def box(self, x: float, y: float, wide: float, high: float, kind: str, *lines: str) -> None:
        """Add a box with lines in its middle, the first one bold.

        - x, y: its upper left corner
        - wide, high: its size in pixels
        - kind: its CSS class, which gives its colour: "box" (grey), "home" (green) or "out"
          (orange)
        - lines: the texts, centred one below the other; an empty box if there are none

        Errors: ValueError if a line is wider than the box."""
        self.shapes.append(Box(x, y, wide, high, kind))
        top = y + (high - STEP * len(lines)) / 2 + SIZE
        for number, line in enumerate(lines):
            weight = "" if number else "bold"
            at = top + STEP * number
            size = SIZE - 1 if number else SIZE
            self.text(x + wide / 2, at, line, weight, "middle", size, wide - 4)

    def card(self, x: float, y: float, wide: float, high: float, kind: str, head: str) -> None:
        """Add a box with a heading at its upper left. Its content can be added afterwards.

        - x, y: its upper left corner
        - wide, high: its size in pixels
        - kind: its CSS class, which gives its colour: "box" (grey), "home" (green) or "out"
          (orange)
        - head: the heading, on one line; it may be ""

        Errors: ValueError if the heading is wider than the box."""
        self.box(x, y, wide, high, kind)
        self.text(x + 12, y + 22, head, "bold", room=wide - 18)

    def list(self, x: float, y: float, room: float, lines: Iterable[str], kind: str = "") -> None:
        """Add lines of text one below the other, STEP pixels apart.

        - x, y: where the first line stands; y is the height of its baseline
        - room: how wide a line may be at most, in pixels
        - lines: the texts
        - kind: their CSS classes (of those in RULES), separated by spaces; "" for ordinary text

        Errors: ValueError if a line is wider than `room`."""
        for number, line in enumerate(lines):
            self.text(x, y + STEP * number, line, kind, room=room)

    def arrow(self, x: float, y: float, to_x: float, to_y: float, kind: str = "arrow") -> None:
        """Add an arrow from (x, y) to (to_x, to_y), in pixels. kind: "arrow" (grey) or "leaves"
        (orange)."""
        self.shapes.append(Line(x, y, to_x, to_y, kind, "head"))

    def dashes(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Add a dashed line from (x, y) to (to_x, to_y), in pixels."""
        self.shapes.append(Line(x, y, to_x, to_y, "arrow", "dashes"))

    def line(self, x: float, y: float, to_x: float, to_y: float, kind: str) -> None:
        """Add a line without a head from (x, y) to (to_x, to_y), in pixels. kind: "arrow" (grey) or
        "leaves" (orange)."""
        self.shapes.append(Line(x, y, to_x, to_y, kind, ""))

    def svg(self, style: str = STYLE) -> str:
        """Return the picture as the text of an SVG file. style: the CSS for its shapes: STYLE
        follows the reader's light or dark colours; LIGHT + RULES is light whatever colours the
        reader prefers."""
        head = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">',
            f"<title>{escape(self.title)}</title><style>{style}</style><defs>{HEADS}</defs>",
            f'<rect class="paper" width="{self.width}" height="{self.height}" rx="8"/>',
        ]
        return "\n".join([*head, *(shape.svg() for shape in self.shapes), "</svg>\n"])
