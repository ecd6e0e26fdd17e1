"""Sample units by independent draws (Poisson sampling) from the system's random generator."""

from __future__ import annotations

import os

import numpy as np


def poisson(n_units: int, sampling_rate: float) -> list[int]:
    """Draw each of the indices 0..n_units-1 independently with probability `sampling_rate`, and
    return the drawn ones in ascending order.

    Guarantee: the sample is as secret as the noise. There is no seed, and nothing is logged.
    | case              | result                                            |
    |-------------------|---------------------------------------------------|
    | sampling_rate = 1 | every index                                       |
    | no index drawn    | an empty list; the caller takes a noise-only step |
    Reference: Mironov, Talwar & Zhang 2019, section 3 (sampled Gaussian mechanism)."""
    if not 0.0 < sampling_rate <= 1.0:
        raise ValueError("sampling_rate must be in (0, 1]")
    if sampling_rate == 1.0:
        return list(range(n_units))
    draws = np.frombuffer(os.urandom(8 * n_units), dtype=np.uint64) >> np.uint64(11)
    # 53 random bits against q·2⁵³ as an integer: exact, no rounding of the draw itself.
    return np.flatnonzero(draws < np.uint64(int(sampling_rate * 2.0**53))).tolist()
