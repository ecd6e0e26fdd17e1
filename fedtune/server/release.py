"""Decide what a run releases: the adapter that the sites trained, or what public text alone gives.

Both follow from noised updates and public records, so the choice costs no ε. It is made on the
[selection] records; those of [evaluation] judge what was chosen."""

from __future__ import annotations

from typing import Any

from fedtune.config import Study
from fedtune.progress import stage
from fedtune.registry.metrics import METRICS
from fedtune.report.gain import START, TRAINED
from fedtune.server.parts import Measures
from fedtune.server.store import Progress


def decide(progress: Progress, selector: Measures | None) -> dict[str, Any]:
    """Decide by the plan's selection.release, and return the decision: "model" is TRAINED or START,
    "why" says it in words, and where two models were compared, "metric", "records", and the metric
    of each. {} where the plan has nothing to decide.

    | the selection records have none of a class that the plan names | TRAINED: they cannot see it |
    | two that are alike | TRAINED |
    """
    study = progress.study
    if selector is None or not progress.origin or not study.start or study.selection is None:
        return {}
    if study.selection.release == "trained":
        return {"model": TRAINED, "why": "as the plan says, whatever the public start gives"}
    if selector.lacking:
        names = ", ".join(selector.lacking)
        why = f"the selection records cannot see what is learnt of {names}, of which they have none"
        return {"model": TRAINED, "why": why, "lacking": list(selector.lacking)}
    with stage("choosing what is released"):
        compared = selector.compare(progress.origin, progress.adapter)
    sign = 1 if METRICS[_metric(study)].higher_is_better else -1
    gain = sign * (compared.after - compared.before)
    model = TRAINED if gain >= 0 else START
    verdict = "better" if gain > 0 else "no worse" if gain == 0 else "worse"
    return {
        "model": model,
        "why": f"on the selection records the trained model is {verdict} than its public start",
        "metric": _metric(study),
        "records": len(selector),
        START: compared.before,
        TRAINED: compared.after,
    }


def _metric(study: Study) -> str:
    return study.evaluation.metric if study.evaluation else "loss"
