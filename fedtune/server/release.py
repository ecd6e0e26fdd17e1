"""Decide which adapter a run releases: the one that the sites trained, or the public start.

Both adapters follow from noised updates and public records, so the choice costs no ε. The
[selection] records decide; the [evaluation] records only measure the chosen adapter."""

from __future__ import annotations

from typing import Any

from fedtune.core.config import Study
from fedtune.core.progress import stage
from fedtune.core.registry.metrics import METRICS
from fedtune.report.gain import START, TRAINED, choose_better
from fedtune.server.parts import Measures
from fedtune.server.store import Progress
from fedtune.server.summary import counts_are_told
from fedtune.strategies._posterior import ClassFigures


def decide(
    progress: Progress, selector: Measures | None, figures: ClassFigures | None = None
) -> dict[str, Any]:
    """Decide by the plan's selection.release whether the run releases the trained model or its
    public start, and return the decision; {} if the plan has no public start or no [selection].

    - progress: the run's state
    - selector: measures on the [selection] records; None if the plan has none
    - figures: the sites' noised figures of each class; None if there are none

    The decision's entries:
    - model: TRAINED or START
    - why: the reason in words
    - metric, records, and each model's value, if the two models were compared: the metric's name,
      the number of selection records, and the metric under the names TRAINED and START
    - lacking, if selection records lack classes: the names of these classes
    - unseen, if it is known: the share of the sites' units that is in these classes

    If the selection records lack a class, they cannot show what the trained model has learnt of it.
    Then the start is released only if it would be better even if the trained model were right about
    every unit of the lacking classes. The share of these units is estimated from the noised counts.
    The decision is TRAINED also if the plan says so, if both models measure the same, or if records
    lack classes whose share is not known, or cannot be used since the metric is not accuracy."""
    study = progress.study
    if selector is None or not progress.origin or not study.start or study.selection is None:
        return {}
    if study.selection.release == "trained":
        return {"model": TRAINED, "why": "as the plan says, whatever the public start gives"}
    unseen = _compute_unseen_share(study, selector, figures if counts_are_told(progress) else None)
    names = ", ".join(selector.lacking)
    if unseen is None:
        why = f"the selection records cannot show what was learnt of {names}: they have none of it"
        return {"model": TRAINED, "why": why, "lacking": list(selector.lacking)}
    with stage("choosing what is released"):
        before, after = (
            selector.measure(adapter)[_metric(study)]
            for adapter in (progress.origin, progress.adapter)
        )
    gain = (after - before) if METRICS[_metric(study)].higher_is_better else (before - after)
    model = choose_better(gain, unseen)
    verdict = "better" if gain > 0 else "no worse" if gain == 0 else "worse"
    why = f"on the selection records the trained model is {verdict} than its public start"
    if unseen and gain < 0:
        share = f"{names}, {100 * unseen:.2g} % of the sites' units"
        if model == TRAINED:
            why += f", but they cannot show what it learnt of {share}, which may be more"
        else:
            why += f", by more than it can have learnt of {share}, of which they have no record"
    decision = {
        "model": model,
        "why": why,
        "metric": _metric(study),
        "records": len(selector),
        START: before,
        TRAINED: after,
    }
    if selector.lacking:
        decision |= {"lacking": list(selector.lacking), "unseen": unseen}
    return decision


def _compute_unseen_share(
    study: Study, selector: Measures, figures: ClassFigures | None
) -> float | None:
    """Compute from the noised counts in `figures` which share of the sites' units is in classes
    that the selection records lack; 0.0 if they lack none. selector: measures on the selection
    records.

    Returns None if the share is not known (`figures` is None, or no count is above 0), or if it
    cannot be used, since the metric is not accuracy."""
    if not selector.lacking:
        return 0.0
    if figures is None or _metric(study) != "accuracy":
        return None
    counts = dict(zip(study.objective.labels, figures.count.clip(min=0), strict=True))
    total = float(sum(counts.values()))
    return float(sum(counts[name] for name in selector.lacking)) / total if total else None


def _metric(study: Study) -> str:
    return study.evaluation.metric if study.evaluation else "loss"
