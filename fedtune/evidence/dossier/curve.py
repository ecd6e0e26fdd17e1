"""Draw the curve of a run's quality: how its metric changed with the ε spent, or with the
rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from fedtune.core.registry.metrics import metric as known_metric
from fedtune.evidence.dossier.drawing import Picture

WIDTH, HEIGHT = 920, 330
LEFT = 90.0
RIGHT = 800.0
TOP = 52.0
BOTTOM = 274.0
TICKS = 5
POINT = 7  # side of a point's square, in pixels
GAP = 16.0  # smallest distance of two labels' heights, in pixels


def curve(
    metric: str,
    points: Sequence[tuple[float, float]],
    across: str,
    interval: tuple[float, float] | None = None,
    start: float | None = None,
) -> Picture:
    """Draw a run's metric as a curve.

    - metric: the name of the metric
    - points: pairs of a place on the horizontal axis (an ε, or a round's number) and the metric
      there. The first is for the base alone. If several rounds were measured, lines join the points
      in this order
    - across: the label of the horizontal axis, such as "round"
    - interval: the 95 % interval of the last value; None if it is not known
    - start: the metric of the public start; None if there is none

    Errors: ValueError if there are fewer than two points, or a number is not finite."""
    values, about = [value for _, value in points], known_metric(metric)
    shown = [*values, *(interval or ()), *((0.0, 1.0) if about.bounded else ())]
    shown += [] if start is None else [start]
    if len(points) < 2 or not all(map(math.isfinite, [*shown, *(x for x, _ in points)])):
        raise ValueError("a curve needs two points of numbers")
    page = Picture(WIDTH, HEIGHT, f"{metric} by {across}")
    better = "higher" if about.higher_is_better else "lower"
    bar = "; the bar is the 95 % interval of the last" if interval else ""
    page.text(LEFT, 28, f"{metric} ({better} is better){bar}", "bold")
    flat, up = _ticks(0.0, max(x for x, _ in points)), _ticks(min(shown), max(shown))

    def at(x: float, value: float) -> tuple[float, float]:
        share = (value - up[0]) / (up[-1] - up[0])
        return LEFT + (RIGHT - LEFT) * x / flat[-1], BOTTOM - (BOTTOM - TOP) * share

    page.line(LEFT, BOTTOM, RIGHT, BOTTOM, "arrow")
    page.line(LEFT, TOP, LEFT, BOTTOM, "arrow")
    for tick in flat:
        page.text(at(tick, up[0])[0], BOTTOM + 20, f"{tick:g}", "soft", "middle")
    for tick in up:
        page.text(LEFT - 10, at(0, tick)[1] + 4, f"{tick:g}", "soft", "end")
    page.text((LEFT + RIGHT) / 2, BOTTOM + 44, across, "", "middle")
    lines = {"base alone": points[0][1], **({} if start is None else {"public alone": start})}
    labels: list[float] = []
    for name, value in lines.items():
        height = at(0, value)[1]
        page.dashes(LEFT, height, RIGHT, height)
        labels.append(_place_label(height, labels))
        page.text(RIGHT + 8, labels[-1] + 4, name, "soft")
    places = [at(*point) for point in points]
    for before, after in pairwise(places) if len(places) > 2 else ():
        page.line(*before, *after, "leaves")
    for x, y in places:
        page.box(x - POINT / 2, y - POINT / 2, POINT, POINT, "out")
    x, y = places[-1]
    if interval:
        page.line(x, at(0, interval[0])[1], x, at(0, interval[1])[1], "leaves")
    page.text(x + 8, _place_label(y, labels) + 4, f"{values[-1]:.3g}", "bold bad")
    return page


def _place_label(height: float, taken: Sequence[float]) -> float:
    """Return the height for a label: the nearest to `height` at which it overlaps none of the
    labels at the heights `taken`.

    >>> [_place_label(100.0, taken) for taken in ([104.0], [104.0, 96.0], [])]
    [88.0, 120.0, 100.0]
    """
    choices = [height, *(other + way * GAP for other in taken for way in (-1, 1))]
    free = [one for one in choices if all(abs(one - other) >= GAP for other in taken)]
    return min(free, key=lambda one: abs(one - height))


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers for an axis. The first is at most `low`, the last at least
    `high`.

    >>> _ticks(0.0, 7.994)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= span / TICKS)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(n * step, 12) for n in range(first, last + 1)]
