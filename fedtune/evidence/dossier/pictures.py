"""Draw the pictures of a dossier from its content alone: diagrams that explain fedtune, and the
run's curves.

`fedtune verify` draws each picture again, so that none can contradict the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fedtune.evidence.dossier.curve import curve
from fedtune.evidence.dossier.diagrams import PICTURES
from fedtune.evidence.dossier.drawing import LIGHT, RULES, Picture

FOLDER, CURVE = "pictures", "quality"
FILES = {f"{FOLDER}/{name}.svg" for name in (*PICTURES, CURVE)}


class Drawn(NamedTuple):
    """A picture of a dossier, as it was drawn.

    - picture: its shapes
    - alt: a description in words, for readers who cannot see it
    - file: its path in the dossier's folder"""

    picture: Picture
    alt: str
    file: str

    def svg(self) -> str:
        """Return the picture as the text of an SVG file, in light colours, as a dossier's pages
        are."""
        return self.picture.svg(LIGHT + RULES)


def draw_block(block: Mapping[str, Any]) -> Drawn:
    """Draw the picture of one block of a dossier's content. block: a block of kind "picture" (a
    diagram) or "curve".

    Errors: KeyError if this release does not know the diagram; ValueError if the curve has a number
    that is not finite."""
    if block["kind"] == "picture":
        name = block["picture"]
        return Drawn(PICTURES[name](block["unit"]), block["alt"], f"{FOLDER}/{name}.svg")
    shown = [[cell["shown"] for cell in point] for point in block["points"]]
    across, metric = block["across"], block["metric"]["shown"]
    edges = [float(edge["shown"]) for edge in block["interval"] if edge]
    interval = (edges[0], edges[1]) if len(edges) == 2 else None
    places = [(0.0, float(block["base"]["shown"]))] + [(float(x), float(y)) for x, y in shown]
    start = float(block["start"]["shown"]) if block.get("start") else None
    alt = (
        f"A curve of {metric} by {across}: {block['base']['shown']} for the base alone, "
        + (f"{block['start']['shown']} by public text alone, " if start is not None else "")
        + f"then {'; '.join(f'{y} at {x}' for x, y in shown)}"
    )
    return Drawn(curve(metric, places, across, interval, start), alt, f"{FOLDER}/{CURVE}.svg")


def files(content: Mapping[str, Any]) -> dict[str, str]:
    """Draw every picture of a dossier's content. Return a dict from each picture's path in the
    dossier's folder to the text of its SVG file."""
    return {one.file: one.svg() for one in map(draw_block, _blocks(content))}


def _blocks(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for section in content["sections"]:
        yield from (b for b in section["blocks"] if b["kind"] in ("picture", "curve"))
