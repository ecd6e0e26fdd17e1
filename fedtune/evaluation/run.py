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
from fedtune.report.gain import headline, is_start_released
from fedtune.report.preference import alarms
from fedtune.runs.personal import PersonalRun
from fedtune.runs.run import Run


def evaluate(
    run: Run, data: DataFile | Path | str, metric: str | None = None, choices: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure three models of a finished run on a file of records: the base alone, the public start
    (the base as trained on public text only), and the base with the run's adapter.

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
    - start: such a dict for the public start; None if there is no public start to compare with, for
      the reason in "no start"
    - no start: the reason; "" if the start was measured, or the study has none
    - interval: three 95 % intervals of the metric: "before", "after" and "change"; with a public
      start also "start", and "over_start", the change from the start to the adapter. Intervals of
      a value are Wilson's if the metric is a share of records, else from a bootstrap over records;
      those of a change are from a paired bootstrap
    - gain: a dict of "records", "change" and "over_start" (the intervals above), as in report.json;
      for preference pairs also "pairs": their loss, margin, KL and share by length
      (evaluation.pairs.pair_facts)
    - over start: a sentence that says whether the model is better than the public start; "" if they
      were not compared
    - verdict: a sentence that says whether the model is better with the adapter than without
    - alarms: a list of sentences that warn of harm by the adapter; [] if there is none
    - of the run: a list of sentences: those of the run's report on the gain over public text and on
      what is released or, for a personal model, its mark; [] if there are none

    Errors: ConfigError, DataError, ModelError."""
    study = run.study
    configured = study.evaluation
    if not isinstance(data, DataFile):
        data = with_columns_of(study, Path(data), "name them: --column prompt=NAME, and so on")
    table = EvaluationTable.model_validate(
        {
            "path": data.path,
            "columns": data.columns,
            "metric": metric or (configured.metric if configured else "loss"),
            "choices": tuple(choices) or (configured.choices if configured else ()),
        }
    )
    check_evaluation(study.model_copy(update={"evaluation": table}))
    arrays, why_none = public_start(run)
    evaluator, trained = evaluator_of(run, table)
    after, before = evaluator.scores(trained, with_kl=True), evaluator.untouched
    names = tuple(dict.fromkeys((table.metric, "loss")))
    interval, pairs = intervals(before, after, table.metric), evaluator.pairs_of(before, after)
    gain = {"records": len(evaluator), "change": list(interval["change"])} | pairs
    start = None
    if arrays is not None:
        public = evaluator.scores(arrays)
        start = {name: public.value(name) for name in names}
        added = intervals(public, after, table.metric)
        interval |= {"start": added["before"], "over_start": added["change"]}
        gain["over_start"] = list(added["change"])
    quality = {"metric": table.metric, "gain": gain, "start": start}
    return {
        "metric": table.metric,
        "records": len(evaluator),
        "rejected": dict(evaluator.rejected),
        "cut": evaluator.n_cut,
        "before": {name: before.value(name) for name in names},
        "after": {name: after.value(name) for name in names},
        "start": start,
        "no start": why_none if run.study.start else "",
        "interval": interval,
        "gain": gain,
        "over start": " ".join(line.text for line in headline(quality) if line.about == "start"),
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


def public_start(run: Run) -> tuple[Arrays | None, str]:
    """Return the arrays of the run's public start, with which its model is compared, and "". The
    public start is the model that was trained on public text alone, before the first round.

    Return None and the reason if there is no such comparison: the study has no [start], the run
    released its public start, or this folder does not have the arrays."""
    if run.study.start is None:
        return None, "the study learnt nothing from public text first"
    has_report = not isinstance(run, PersonalRun) and (run.folder / "report.json").is_file()
    if has_report and is_start_released(run.report.get("quality") or {}):
        return None, "it is what this run released: this model"
    if (arrays := run.start()) is None:
        return None, "it is not in the folder: the coordinator's run and a dossier have it"
    return arrays, ""


def _of_the_run(run: Run) -> list[str]:
    if run.mark:
        return [run.mark]
    if not (run.folder / "report.json").is_file():
        return []
    lines = headline(run.report.get("quality") or {})
    return [line.text for line in lines if line.about != "base"]


def with_columns_of(study: Study, data: Path, todo: str = "") -> DataFile:
    """Describe the file `data` as one whose columns have the same names and uses as those of the
    study's evaluation file. todo: how the columns can be named without such a file, for an error's
    text; "" if they cannot.

    Errors: ConfigError if the study has no evaluation file."""
    if study.evaluation is None:
        raise ConfigError(
            "the study has no [evaluation] table, which names the columns of such a file",
            todo=todo,
        )
    return DataFile(path=data, columns=study.evaluation.columns)
