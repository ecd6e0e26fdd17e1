"""Format figures for people, rounded so that none looks better than it is."""

from __future__ import annotations

import decimal
import math
from typing import Any

_ALL_DIGITS = decimal.Context(prec=400)  # enough for the largest float


def percent(value: float) -> str:
    """Format a probability as a percentage with one decimal, at most 100, rounded up, since a bound
    must not be rounded down."""
    return f"{min(math.ceil(value * 1000) / 10, 100.0):g} %"


def rounded_up(value: Any, digits: int = 3) -> str:
    """Format an ε with at most `digits` decimals, rounded up, so that the figure shown is never
    below the true one. None gives "none"; what is no finite number is shown as it is."""
    n = number(value)
    if n is None:
        return "none" if value is None else str(value)
    return _rounded(n, digits, decimal.ROUND_CEILING)


def rounded_down(value: float, digits: int = 3) -> str:
    """Format what is left of a budget with at most `digits` decimals, rounded down, so that the
    figure shown is never above the true one."""
    return _rounded(value, digits, decimal.ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    """Format a float with at most `digits` decimals, without an exponent and without zeros at the
    end. It is rounded from the decimal number as which Python writes it, so that 7.994 stays 7.994.
    rounding: how decimal rounds, such as ROUND_CEILING. What is not finite is shown as it is."""
    if not math.isfinite(value):
        return str(value)
    exact, last = decimal.Decimal(repr(float(value))), decimal.Decimal(1).scaleb(-digits)
    rounded = exact.quantize(last, rounding, _ALL_DIGITS) or decimal.Decimal()  # not -0
    return f"{rounded.normalize(_ALL_DIGITS):f}"


def number(value: Any) -> float | None:
    """Return `value` as a float if it is an int or a float; None if it is anything else, a truth
    value included."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
