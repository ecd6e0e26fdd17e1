"""A finished run, measured on a file of records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config import DataFile, EvaluationTable
from fedtune.evaluation.metrics import intervals

if TYPE_CHECKING:
    pass
from fedtune.evaluation.evaluator import Evaluator, check_evaluation


def evaluate(
    run: Path, data: DataFile, metric: str | None = None, choices: Sequence[str] = ()
) -> dict[str, Any]:
    """Base and adapter of a finished run on the records of `data`.

    `metric` and `choices` are the study's own where left out. Returns metric, records, rejected,
    before and after (measures by name) and interval: 95 % intervals of before, after (Wilson for a
    share of records, else bootstrap over records) and change (paired bootstrap).
    Errors: ConfigError, DataError, ModelError."""
    from fedtune.models.adapter_files import load_adapter, picked
    from fedtune.run_folder import load_plan

    study = load_plan(run)
    old = study.evaluation
    table = EvaluationTable.model_validate(
        {
            "path": data.path,
            "columns": data.columns,
            "metric": metric or (old.metric if old else "loss"),
            "choices": tuple(choices) or (old.choices if old else ()),
        }
    )
    saved = load_adapter(run / "adapter")
    changes: dict[str, Any] = {"evaluation": table}
    if study.lora:  # what was saved is what counts, wherever A came from and whether it was trained
        changes["lora"] = study.lora.model_copy(update={"a_init": "public", "a_digest": None})
    frozen = {name: value for name, value in saved.items() if "lora_A" in name}
    study = study.model_copy(update=changes)
    check_evaluation(study)
    evaluator = Evaluator(study, frozen)
    after = evaluator.scores(picked(saved, evaluator.network.parameters(), run / "adapter"))
    before = evaluator.scores(None)
    names = tuple(dict.fromkeys((table.metric, "loss")))
    return {
        "metric": table.metric,
        "records": len(evaluator),
        "rejected": dict(evaluator.rejected),
        "before": {name: before.value(name) for name in names},
        "after": {name: after.value(name) for name in names},
        "interval": intervals(before, after, table.metric),
    }
