"""Explain δ in words: the probability, at worst, that the promise of ε does not hold for a unit.

An (ε, δ) guarantee allows a mechanism that reveals a unit's records with probability δ and keeps ε
otherwise. So among n units the records of at least one may be revealed with probability n · δ."""

from __future__ import annotations

MOST = 0.1  # the largest n · δ, n being a site's units, without a warning (decision 0055)


def delta_for(units: int) -> float:
    """Return the largest power of ten that is at most 1 / (10 · units), so that units · δ is at
    most 1/10.

    >>> delta_for(19), delta_for(40), delta_for(200)
    (0.001, 0.001, 0.0001)
    """
    return float(f"1e-{len(str(10 * units - 1))}")


def chance(delta: float, unit: str, units: int) -> str:
    """State in words the probabilities with which ε may not hold: δ for one unit, and units · δ for
    any of a site's units. unit: the noun for a unit.

    >>> chance(0.01, "patient", 19)
    'ε may not hold with at most 1 chance in 100 for each patient, 1 in 5.3 for any of 19'
    """
    total = min(1.0, delta * units)
    return (
        f"ε may not hold with at most 1 chance in {_one_in(delta)} for each {unit}, "
        f"1 in {_one_in(total)} for any of {units:,}"
    )


def warning(delta: float, unit: str, units: int) -> str:
    """Return a warning if δ is too large for a site of this many units (units · δ > MOST); "" if it
    is not. unit: the noun for a unit, such as "patient"."""
    if delta * units <= MOST:
        return ""
    return (
        f"WARNING: δ = {delta:g} is large for {units:,} {unit}s: {chance(delta, unit, units)}; "
        f"privacy.delta = {delta_for(units):g} keeps that below 1 in 10"
    )


def _one_in(probability: float) -> str:
    """Return N as text, for a probability that is to be stated as "1 in N". N has two figures if it
    is below 10, else it is rounded to an integer."""
    inverse = 1 / probability
    return f"{inverse:,.0f}" if inverse >= 10 else f"{inverse:.2g}"
