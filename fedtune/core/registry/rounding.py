"""Format figures for people, rounded so that none looks better than it is."""

from __future__ import annotations

import math
from typing import Any


def percent(value: float) -> str:
    """Format a probability as a percentage with one decimal, at most 100, rounded up, since a bound
    must not be rounded down."""
    return f"{min(math.ceil(value * 1000) / 10, 100.0):g} %"


def rounded_up(value: Any, digits: int = 3) -> str:
    """Format an ε with at most `digits` decimals, rounded up, so that the figure shown is never
    below the true one. None gives "none"; what is no finite number is shown as it is."""
    n = number(value)
    if n is None or not math.isfinite(n):
        return "none" if value is None else str(value)
    scale = 10**digits
    up = math.ceil(round(n * scale, 6)) / scale
    return f"{up:.{digits}f}".rstrip("0").rstrip(".")


def rounded_down(value: float, digits: int = 3) -> str:
    """Format what is left of a budget with at most `digits` decimals, rounded down, so that the
    figure shown is never above the true one."""
    scale = 10**digits
    return f"{math.floor(value * scale) / scale:g}"


def number(value: Any) -> float | None:
    """Return `value` as a float if it is an int or a float; None if it is anything else, a truth
    value included."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
