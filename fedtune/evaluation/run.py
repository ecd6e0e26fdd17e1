"""Evaluate a finished run on a file of records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedtune.core.config import DataFile, EvaluationTable, Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.errors import ConfigError
from fedtune.core.models.adapter_files import pick_arrays
from fedtune.core.models.lora import Arrays
from fedtune.core.models.network import Network
from fedtune.evaluation.evaluator import Evaluator, check_evaluation
from fedtune.evaluation.metrics import intervals
from fedtune.report.claim import verdict
from fedtune.report.gain import headline
from fedtune.report.preference import alarms
from fedtune.runs.run import Run


def evaluate(
    run: Run, data: DataFile | Path | str, metric: str | None = None, choices: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure base and adapter of a finished run on a file of records.

    Args:
        data: the file and its columns; or its path alone, for the columns of the study.
        metric, choices: by default the study's own.

    Returns a dict:

    - metric: its name
    - records: how many records were measured
    - rejected: reason -> the number of records that were left out for it
    - cut: the number of records of which objective.max_length left something out
    - before, after: the base's and the adapter's value of the metric and of "loss"
    - interval: 95 % intervals of the metric: "before", "after" (Wilson's for a share of records,
      else a bootstrap over records) and "change" (a paired bootstrap)
    - gain: "records" and "change", as in report.json; for preference pairs also "pairs": their
      loss, margin, KL and share by length (evaluation.pairs.pair_facts)
    - verdict: whether the adapter is better than the base, in a sentence
    - alarms: warnings against the adapter, a list of sentences
    - of the run: its report's sentences on the gain over public text and on what is released, or a
      personal model's mark; [] if there are none

    Errors: ConfigError, DataError, ModelError."""
    study = run.study
    configured = study.evaluation
    if not isinstance(data, DataFile):
        data = with_columns_of(study, Path(data))
    table = EvaluationTable.model_validate(
        {
            "path": data.path,
            "columns": data.columns,
            "metric": metric or (configured.metric if configured else "loss"),
            "choices": tuple(choices) or (configured.choices if configured else ()),
        }
    )
    check_evaluation(study.model_copy(update={"evaluation": table}))
    evaluator, trained = evaluator_of(run, table)
    after, before = evaluator.scores(trained, with_kl=True), evaluator.untouched
    names = tuple(dict.fromkeys((table.metric, "loss")))
    interval, pairs = intervals(before, after, table.metric), evaluator.pairs_of(before, after)
    gain = {"records": len(evaluator), "change": list(interval["change"])} | pairs
    quality = {"metric": table.metric, "gain": gain}
    return {
        "metric": table.metric,
        "records": len(evaluator),
        "rejected": dict(evaluator.rejected),
        "cut": evaluator.n_cut,
        "before": {name: before.value(name) for name in names},
        "after": {name: after.value(name) for name in names},
        "interval": interval,
        "gain": gain,
        "verdict": verdict(quality),
        "alarms": alarms(quality),
        "of the run": _of_the_run(run),
    }


def evaluator_of(
    run: Run, table: EvaluationTable, read: Callable[[Network], Dataset] | None = None
) -> tuple[Evaluator, Arrays]:
    """Return an evaluator that measures models of a finished run's study, and the run's trained
    arrays, which can be given to it. table: the records' file, metric and choices; read: as for
    Evaluator, in place of the file. Errors: as for Evaluator; ModelError."""
    saved, study = run.adapter(), run.study
    changes: dict[str, Any] = {"evaluation": table}
    if study.lora:  # the saved A is loaded, however it was initialised and whether it was trained
        changes["lora"] = study.lora.model_copy(update={"a_init": "public", "a_digest": None})
    frozen = {name: value for name, value in saved.items() if "lora_A" in name}
    evaluator = Evaluator(study.model_copy(update=changes), frozen, read)
    return evaluator, pick_arrays(saved, evaluator.network.parameters(), run.place)


def _of_the_run(run: Run) -> list[str]:
    if run.mark:
        return [run.mark]
    if not (run.folder / "report.json").is_file():
        return []
    lines = headline(run.report.get("quality") or {})
    return [line.text for line in lines if line.about != "base"]


def with_columns_of(study: Study, data: Path) -> DataFile:
    """Describe the file `data` as one whose columns have the same names and uses as those of the
    study's evaluation file.

    Errors: ConfigError if the study has no such file."""
    if study.evaluation is None:
        raise ConfigError("the study names no columns", todo="--column prompt=NAME, and so on")
    return DataFile(path=data, columns=study.evaluation.columns)
