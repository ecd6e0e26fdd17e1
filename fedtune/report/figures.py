"""Format figures for people, in the same form in every command and on every page."""

from __future__ import annotations

import math
from typing import Any


def format_short(value: Any) -> str:
    """Format a number to four significant figures; "–" if the value is no number."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def size_text(value: Any) -> str:
    """Format a number of bytes in the unit that suits it, from B to GB. value: the number, or a
    dict whose numbers are added up."""
    total = sum(value.values()) if isinstance(value, dict) else value or 0
    for unit in ("B", "kB", "MB"):
        if total < 1000:
            return f"{total:.3g} {unit}"
        total /= 1000
    return f"{total:.3g} GB"


def duration(seconds: float) -> str:
    """Format a duration for people: in seconds (90 s), whole minutes (2 min), or hours with one
    decimal place (1.5 h)."""
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
