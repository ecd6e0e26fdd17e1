"""Draw the calibration of a model's probabilities, and the differences between groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.evidence.dossier.drawing import Picture

# Where the square of a reliability picture stands.
SIDE = 330.0
LEFT = 60.0
TOP = 44.0
ROW, NAMES, WIDE = (
    24.0,
    190.0,
    330.0,
)  # in a picture of differences: the height of a line, the widths of the names and of the axis


def reliability(bins: Sequence[Mapping[str, float]]) -> Picture:
    """Return a picture of the share of correct predictions against the predicted probability, with
    one point for each bin of probability. bins: the content of "reliability" in figures.json."""
    page = Picture(int(LEFT + SIDE + 40), int(TOP + SIDE + 56), "Reliability")
    page.text(LEFT, 26, "share right, by the probability said", "bold")

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + SIDE * x, TOP + SIDE * (1 - y)

    page.line(*at(0, 0), *at(1, 0), "arrow")
    page.line(*at(0, 0), *at(0, 1), "arrow")
    page.dashes(*at(0, 0), *at(1, 1))
    for tick in (0.0, 0.5, 1.0):
        page.text(at(tick, 0)[0], at(0, 0)[1] + 18, f"{tick:g}", "soft", "middle")
        page.text(LEFT - 8, at(0, tick)[1] + 4, f"{tick:g}", "soft", "end")
    page.text(LEFT + SIDE / 2, TOP + SIDE + 42, "probability of the answer", "soft", "middle")
    for bin_ in bins:
        x, y = at(bin_["probability"], bin_["right"])
        page.line(*at(bin_["probability"], bin_["probability"]), x, y, "leaves")
        page.box(x - 4, y - 4, 8, 8, "home")
        page.text(x + 7, y + 4, f"{bin_['records']:.0f}", "soft", size=10)
    return page


def differences(measure: str, rows: Sequence[Mapping[str, Any]], level: float) -> Picture:
    """Draw for each group the difference from all other patients in one measure, with its interval.
    A group whose interval does not contain 0 is marked.

    - measure: the measure's name
    - rows: the comparisons in this measure, as figures.json has them. Comparisons that were not
      resolved, because there are too few patients, must not be among them
    - level: the confidence of each interval"""
    edges = [bound for row in rows for bound in row["difference"]["interval"]]
    most = max(map(abs, edges), default=0.0) or 1.0
    height = TOP + ROW * len(rows)
    page = Picture(int(NAMES + WIDE + 30), int(height + 40), f"{measure}: differences of groups")
    page.text(12, 26, f"{measure[:40]}: group less all others, {level:.2%}", "bold")

    def at(value: float) -> float:
        return NAMES + WIDE * (value / most + 1) / 2

    page.dashes(at(0), TOP - 8, at(0), height)
    for tick in (-most, 0.0, most):
        page.text(at(tick), height + 20, f"{tick:+.2f}" if tick else "0", "soft", "middle", room=80)
    for number, row in enumerate(rows):
        y = TOP + ROW * number + ROW / 2
        name = f"{row['column']} = {row['value']}"
        page.text(
            12, y + 4, name if len(name) <= 26 else f"{name[:25]}…", "bad" if row["found"] else ""
        )
        low, high = row["difference"]["interval"]
        page.line(at(low), y, at(high), y, "leaves" if row["found"] else "arrow")
        page.box(at(row["difference"]["figure"]) - 4, y - 4, 8, 8, "out" if row["found"] else "box")
    return page
