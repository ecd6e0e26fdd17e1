"""Explain δ in words: how often, at worst, the promise of ε does not hold for somebody.

An (ε, δ) guarantee allows a mechanism that reveals one unit's records with probability δ and
keeps ε otherwise; among n units, one of them is revealed with probability up to n · δ."""

from __future__ import annotations

MOST = 0.1  # n · δ above which a study's δ is said to be too large (decision 0055)


def delta_for(units: int) -> float:
    """Return the power of ten at or below 1 / (10 · units): of all units of a site, one is outside
    the promise with a chance of at most one in ten.

    >>> delta_for(19), delta_for(40), delta_for(200)
    (0.001, 0.001, 0.0001)
    """
    return float(f"1e-{len(str(10 * units - 1))}")


def chance(delta: float, unit: str, units: int) -> str:
    """Describe δ at worst, for one unit and for any of a site's.

    >>> chance(0.01, "patient", 19)
    'at worst 1 chance in 100 for each patient, and 1 in 5 that it is one of 19'
    """
    total = min(1.0, delta * units)
    return (
        f"at worst 1 chance in {_one_in(delta)} for each {unit}, and 1 in {_one_in(total)} that it "
        f"is one of {units:,}"
    )


def warning(delta: float, unit: str, units: int) -> str:
    """Warn of a δ that is too large for a site of this many units; "" if it is not."""
    if delta * units <= MOST:
        return ""
    return (
        f"WARNING: δ = {delta:g} is large for {units:,} {unit}s: {chance(delta, unit, units)} for "
        f"whom ε promises nothing; privacy.delta = {delta_for(units):g} keeps that below 1 in 10"
    )


def _one_in(probability: float) -> str:
    """Return the reciprocal, to two figures if it is small."""
    inverse = 1 / probability
    return f"{inverse:,.0f}" if inverse >= 10 else f"{inverse:.2g}"
