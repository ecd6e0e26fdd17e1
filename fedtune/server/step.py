"""Choose how far a round's mean update moves the adapter, on public [selection] records.

The updates were noised at the sites and the selection records are public, so every trial here is
post-processing and costs no ε. A step of length zero is also tried, so the selection loss never
rises from round to round, and the newest adapter is always the best one so far.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fedtune.core.config import EvaluationTable, Study
from fedtune.core.errors import ModelError
from fedtune.core.progress import stage
from fedtune.core.wire.arrays import Arrays
from fedtune.server.parts import Measures
from fedtune.server.store import Progress

MOST = 40  # halvings or doublings of the step at which the search starts, at most
SHRINK, LEAST = 2**-0.5, 0.01  # `keep` is multiplied by SHRINK again and again while above LEAST
TOLERANCE = 1e-4  # a step must lower the loss by more than this share of the loss


def replace_evaluation(study: Study) -> Study:
    """Return a copy of the study in which the records of [selection] stand in place of the
    [evaluation] records, so that an evaluator for the copy measures adapters on the selection
    records."""
    table, asked = study.selection, study.evaluation
    assert table is not None
    held_out = EvaluationTable(path=table.path, columns=table.columns)
    if asked:
        held_out = asked.model_copy(update={"path": table.path, "columns": table.columns})
    return study.model_copy(update={"evaluation": held_out})


def choose(
    evaluator: Measures, progress: Progress, proposed: Arrays
) -> tuple[Arrays, dict[str, Any]]:
    """Choose how far a round moves the adapter. The candidates are the adapters
    origin + keep · (adapter - origin) + step · (proposed - adapter); the one with the least loss on
    the selection records is chosen. Here origin is the adapter before the first round, adapter is
    the newest one, and proposed is the adapter that the round's updates give.

    The search starts with keep = 1 and the newest step that was not 0. It varies step, then keep,
    then step again. A keep below 1 averages earlier rounds with this one; the average has less
    noise than either. A step of 0 with a keep of 1 leaves the adapter as it is, so its loss is
    known from the previous round. The adapter stays as it is unless the chosen candidate lowers
    this loss by more than the share TOLERANCE of it.

    - evaluator: measures adapters on the selection records
    - progress: the run's state
    - proposed: the adapter that the round's updates give

    Returns the chosen adapter, and the figures for the history: "keep", "step", and "selection",
    metric -> value of the chosen adapter."""
    origin = progress.origin
    adapter = progress.adapter
    history = progress.history
    measured: dict[tuple[float, float], dict[str, float]] = {}
    if history:
        measured[1.0, 0.0] = history[-1]["selection"]
    tries = itertools.count(1)

    def loss(keep: float, factor: float) -> float:
        if (keep, factor) not in measured:
            candidate = _combine(origin, adapter, proposed, keep, factor)
            try:
                with stage(f"choosing the step, length {next(tries)}"):
                    measured[keep, factor] = evaluator.measure(candidate)
            except ModelError:  # an entry is larger than allowed; a shorter step may avoid that
                if not factor:
                    raise
                measured[keep, factor] = {"loss": math.inf}
        value = measured[keep, factor]["loss"]
        return value if math.isfinite(value) else math.inf

    keep, untouched = 1.0, loss(1.0, 0.0)
    newest = next((entry["step"] for entry in reversed(history) if entry.get("step")), 1.0)
    factor = line_search(lambda f: loss(1.0, f), newest)
    while keep > LEAST and loss(keep * SHRINK, factor) < loss(keep, factor):
        keep *= SHRINK
    if keep < 1:
        factor = line_search(lambda f: loss(keep, f), factor or newest)
    if untouched - loss(keep, factor) <= TOLERANCE * abs(untouched):
        keep, factor = 1.0, 0.0
    chosen = _combine(origin, adapter, proposed, keep, factor)
    return chosen, {"keep": keep, "step": factor, "selection": measured[keep, factor]}


def line_search(loss: Callable[[float], float], start: float) -> float:
    """Search for the factor at which `loss` is least, among 0 and the products of `start` and a
    power of two, and return it. The search multiplies or divides by four until the loss rises on
    both sides, then tries the two factors between. The result is 0.0 if no factor gives a lower
    loss than the factor 0 does.

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
    """Return whether to run another round. It is False only if the plan chooses steps, and none of
    the last selection.patience rounds lowered the loss on the selection records, so that each of
    these rounds has step 0 and keep 1. history: the entries of the saved rounds."""
    if study.selection is None or len(history) < study.selection.patience:
        return True
    newest = history[-study.selection.patience :]
    chosen = [entry for entry in newest if "step" in entry]
    return not chosen or any(entry["step"] or entry["keep"] < 1 for entry in chosen)


def _combine(
    origin: Arrays, adapter: Arrays, proposed: Arrays, keep: float, factor: float
) -> Arrays:
    """Compute origin + keep · (adapter - origin) + factor · (proposed - adapter) in fp64, and
    return it in fp32. If both factors are 1, return `proposed` itself, without rounding.

    - origin: the adapter before the first round
    - adapter: the newest adapter
    - proposed: the adapter that the round's updates give
    - keep: how much of the earlier rounds' movement is kept, from 0 to 1
    - factor: how far to go from `adapter` towards `proposed`; 0 for not at all"""
    if keep == factor == 1:
        return proposed
    combined = {}
    for name, array in adapter.items():
        now, start = array.astype(np.float64), origin[name].astype(np.float64)
        moved = start + keep * (now - start) + factor * (proposed[name] - now)
        combined[name] = moved.astype(np.float32)
    return combined
