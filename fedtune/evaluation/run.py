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
    """Measure a finished run's base, alone and with the adapter, on a file of records.

    Args:
        data: the file, either as a DataFile with its columns, or as a path; then its columns are
            those of the study's evaluation file.
        metric, choices: what to measure, and the completions to choose from; by default the study's
            own.

    Returns a dict:

    - metric: its name
    - records: how many records were measured
    - rejected: reason -> how many records were left out for this reason
    - cut: how many records were cut off at objective.max_length
    - before, after: for the base alone, and with the adapter, a dict of the metric and "loss"
    - interval: three 95 % intervals of the metric: "before", "after" and "change". The first two
      are Wilson's if the metric is a share of records, else from a bootstrap over records; "change"
      is from a paired bootstrap
    - gain: a dict of "records" and "change" (the interval above), as in report.json; for preference
      pairs also "pairs": their loss, margin, KL and share by length (evaluation.pairs.pair_facts)
    - verdict: a sentence that says whether the model is better with the adapter than without
    - alarms: a list of sentences that warn of harm by the adapter; [] if there is none
    - of the run: a list of sentences: those of the run's report on the gain over public text and on
      what is released or, for a personal model, its mark; [] if there are none

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
    """Prepare to measure models of a finished run's study on a file of records. Return two things:
    an Evaluator, and the run's trained arrays, which the Evaluator's methods take as `adapter`.

    - table: the records' file, the metric, and the choices, if there are any (completions, of which
      the likeliest is the prediction)
    - read: a function that is called with the network and returns the records, which replace those
      of the file; None: the file is read

    Errors: ConfigError if the metric does not fit the objective; DataError if the records cannot be
    used; ModelError."""
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

    Errors: ConfigError if the study has no evaluation file."""
    if study.evaluation is None:
        raise ConfigError("the study names no columns", todo="--column prompt=NAME, and so on")
    return DataFile(path=data, columns=study.evaluation.columns)
