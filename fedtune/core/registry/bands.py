"""Group a column of numbers, such as an age, into bands between edges that a person named."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence


def band_names(edges: Sequence[float]) -> tuple[str, ...]:
    """Return the names of the bands into which edges divide numbers, lowest first. edges: the
    edges, ascending.

    >>> band_names((18, 65))
    ('below 18', '18 to below 65', '65 and above')"""
    between = (f"{low:g} to below {high:g}" for low, high in itertools.pairwise(edges))
    return (f"below {edges[0]:g}", *between, f"{edges[-1]:g} and above")


def band_of(text: str, edges: Sequence[float]) -> int | None:
    """Return in which band a number lies, as an index in `band_names`; None if `text` is not a
    finite number.

    >>> [band_of(age, (18, 65)) for age in ("3", "18", "64.5", "70", "unknown", "nan")]
    [0, 1, 1, 2, None, None]"""
    try:
        number = float(text)
    except ValueError:
        return None
    return bisect_right(edges, number) if math.isfinite(number) else None
