"""A weighted mean that never holds more than its running sum."""

from __future__ import annotations

from fedtune.strategies._base import Arrays, State


class RunningMean:
    """Σ wᵢxᵢ / Σ wᵢ over the updates added so far.

    Sums are fp64: the order of arrival moves the result by about 1e-16 of the largest term, far
    below the fp32 in which the adapter is kept."""

    def __init__(self) -> None:
        self._sum: State = {}
        self._weight = 0.0

    def add(self, update: Arrays, weight: float) -> None:
        for name, array in update.items():
            term = array.astype("float64") * weight
            if name in self._sum:
                self._sum[name] += term
            else:
                self._sum[name] = term
        self._weight += weight

    def take(self) -> State | None:
        """The mean, or None where nothing was added; starts over."""
        total, weight = self._sum, self._weight
        self._sum, self._weight = {}, 0.0
        return {name: array / weight for name, array in total.items()} if weight else None
