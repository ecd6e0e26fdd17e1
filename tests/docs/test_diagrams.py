"""The pictures in the pages are the ones that the code draws, and readable in light and dark."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from fedtune.evidence.dossier.diagrams import PICTURES
from fedtune.evidence.dossier.drawing import STYLE, Picture
from tests.docs.pages import ROOT

IMAGES = ROOT / "docs" / "images"


def contrast(one: str, other: str) -> float:
    """Of two colours, as the WCAG define it: 1 to 21."""

    def luminance(color: str) -> float:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def faint(style: str) -> list[str]:
    """Colours of texts that are hard to read on a ground that they stand on, by theme."""
    grounds, texts = ("paper", "fill", "home", "out"), ("ink", "soft", "key")
    pairs = [(ground, text) for ground in grounds for text in texts]
    pairs += [("home", "home-line"), ("out", "out-line"), ("fill", "out-line")]
    found = []
    for theme in style.split("@media"):
        colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", theme))
        assert colors, "a theme without colours"
        found += [
            f"{text} on {ground}"
            for ground, text in pairs
            if contrast(colors[ground], colors[text]) < 4.5
        ]
    return found


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_as_the_code_draws_it(name: str) -> None:
    drawn = PICTURES[name]().svg()
    kept = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert kept == drawn, "python -m benchmarks.diagrams --out docs/images"
    title = ElementTree.fromstring(drawn).find("{http://www.w3.org/2000/svg}title")
    assert title is not None and title.text


def test_every_drawn_picture_is_in_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    assert [name for name in PICTURES if f"(images/{name}.svg)" not in pages] == []


def test_texts_stand_out_in_light_and_dark() -> None:
    assert faint(STYLE) == []


def test_twin_a_faint_text_is_found() -> None:
    assert "soft on paper" in faint(STYLE.replace("--soft: #59636e", "--soft: #c9d1d9"))


def test_twin_a_text_that_does_not_fit_is_no_picture() -> None:
    page = Picture(300, 100, "Too little room")
    page.box(0, 0, 120, 40, "box", "it fits")
    with pytest.raises(ValueError, match="wide; expected at most"):
        page.box(0, 0, 120, 40, "box", "it does not fit into such a box")
