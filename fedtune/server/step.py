"""Choose how far a round's mean update moves the adapter, on public [selection] records.

The updates were noised at the sites and the selection records are public, so whatever is tried here
is post-processing: no ε. The loss never rises from round to round, since a step of zero is among
those tried; the last adapter is then the best one too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedtune.config import EvaluationTable, Study
from fedtune.flower.arrays import Arrays
from fedtune.server.parts import Measures

MOST = 40  # halvings and doublings from where the search starts


class Step(NamedTuple):
    """factor: what the round's update was multiplied by; 0 where no factor lowered the loss.
    quality: on the selection records, of the adapter that it leads to."""

    factor: float
    adapter: Arrays
    quality: dict[str, float]


def selecting(study: Study) -> Study:
    """Replace a study's [evaluation] by its [selection] records, to be measured alike."""
    table, asked = study.selection, study.evaluation
    assert table is not None
    held_out = EvaluationTable(path=table.path, columns=table.columns)
    if asked:
        held_out = asked.model_copy(update={"path": table.path, "columns": table.columns})
    return study.model_copy(update={"evaluation": held_out})


def choose(
    evaluator: Measures, adapter: Arrays, proposed: Arrays, history: list[dict[str, Any]]
) -> Step:
    """Choose the best adapter on the line from `adapter` through `proposed`, the round's result
    with a factor of 1. history: of the rounds so far; the search starts at their newest factor."""
    measured: dict[float, dict[str, float]] = {}

    def loss(factor: float) -> float:
        if factor not in measured:
            measured[factor] = evaluator.measure(_between(adapter, proposed, factor))
        value = measured[factor]["loss"]
        return value if math.isfinite(value) else math.inf

    newest = next((entry["step"] for entry in reversed(history) if entry["step"]), 1.0)
    factor = line_search(loss, newest)
    return Step(factor, _between(adapter, proposed, factor), measured[factor])


def line_search(loss: Callable[[float], float], start: float) -> float:
    """Search the factor of least loss among 0 and start times the powers of two: by fours until
    the loss rises on both sides, then by two. 0 where none lowers the loss.

    >>> line_search(lambda factor: (factor - 30) ** 2, 1.0)
    32.0
    """

    def at(power: int) -> float:
        return loss(start * 2.0**power)

    power, untouched = 0, loss(0.0)
    while power < MOST and at(power) < untouched and at(power + 2) < at(power):
        power += 2
    while power > -MOST and (at(power) >= untouched or at(power - 2) < at(power)):
        power -= 2
    best = min((power - 1, power, power + 1), key=at)
    return start * 2.0**best if at(best) < untouched else 0.0


def steps_left(study: Study, history: list[dict[str, Any]]) -> bool:
    """Return whether one of the last selection.patience rounds lowered the loss, or fewer were."""
    if study.selection is None or len(history) < study.selection.patience:
        return True
    return any(entry["step"] for entry in history[-study.selection.patience :])


def _between(adapter: Arrays, proposed: Arrays, factor: float) -> Arrays:
    """adapter + factor · (proposed - adapter), in fp64, returned in fp32; `proposed` itself where
    factor is 1."""
    if factor == 1:
        return proposed
    start = {name: array.astype(np.float64) for name, array in adapter.items()}
    return {n: (a + factor * (proposed[n] - a)).astype(np.float32) for n, a in start.items()}
