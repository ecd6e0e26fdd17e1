"""Score, on a site's held-out records, the model of a finished run and the models with which it is
compared."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedtune.core.config import AcceptanceTable, EvaluationTable, Site, Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.adapter_files import pick_arrays
from fedtune.core.models.network import Network
from fedtune.evaluation.evaluator import PREFERENCES
from fedtune.evaluation.run import evaluator_of, public_start
from fedtune.officer.acceptance.records import HeldOut, read_held_out
from fedtune.report.scores import Scores
from fedtune.runs.personal import PersonalRun
from fedtune.runs.run import Run, open_run

MODEL = "this model"
SHARED = "released model"
START = "public start"
ALONE = "site alone"
BASE = "base alone"


@dataclass
class Scored:
    """The scores of several models on the same records.

    - held_out: the records
    - scores: model → its scores; the judged model, MODEL, is the first
    - labels: the classes or choices
    - cut: number of records of which a part was not read
    - not_scored: model → why it has no scores"""

    held_out: HeldOut
    scores: dict[str, Scores]
    labels: tuple[str, ...]
    cut: int
    not_scored: dict[str, str] = field(default_factory=dict)


def score_models(run: Run, table: AcceptanceTable, site: Site, ledger: Ledger) -> Scored:
    """Score this run's model, its base, the public start, and the site's own model; if the run is a
    personal model, score the released one too. All are scored on the same records.

    - run: the run whose model is judged
    - table: the site's [acceptance], which names the records and, if there is one, the site's own
      model
    - site: the site; patients in its [data] are left out if [data] is on this machine
    - ledger: the site's ledger, which knows the patients of its datasets and who withdrew

    Errors: ConfigError, DataError and ModelError, if the model cannot be loaded or the records
    cannot be read."""
    read: list[HeldOut] = []
    taught = frozenset(run.about.units) if isinstance(run, PersonalRun) else frozenset()

    def held_out(network: Network) -> Dataset:
        read.append(read_held_out(table, site, run.study, network, ledger, taught))
        return read[0].dataset

    asked = _describe_records(table, run.study)
    evaluator, trained = evaluator_of(run, asked, held_out)
    scores = {MODEL: evaluator.scores(trained)}
    labels = _labels(run.study, asked)
    found = Scored(read[0], scores, labels, evaluator.n_cut)
    if isinstance(run, PersonalRun):
        run = run.shared
        arrays = pick_arrays(run.adapter(), trained, run.place)
        scores[SHARED] = evaluator.scores(arrays)
    start, why_none = public_start(run)
    if start is not None:
        scores[START] = evaluator.scores(start)
    else:
        found.not_scored[START] = why_none
    if table.alone is not None:
        own = open_run(table.alone)
        if (of_own := _labels(own.study, _describe_records(table, own.study))) != labels:
            raise ConfigError(
                f"{table.alone}: its classes differ from those of this model",
                f"{len(labels)} classes with the same names in the same order (it has "
                f"{len(of_own)} classes)",
                "name another run as acceptance.alone, or none",
            )
        reader, adapter = evaluator_of(
            own,
            _describe_records(table, own.study),
            lambda network: read_held_out(table, site, own.study, network, ledger, taught).dataset,
        )
        scores[ALONE] = reader.scores(adapter)
        if len(scores[ALONE].loss) != len(scores[MODEL].loss):
            raise DataError(
                f"{table.alone}: its base cannot read all records that this model reads",
                "a run on the same base, with the same objective",
                "name another run as acceptance.alone, or none",
            )
    scores[BASE] = evaluator.untouched
    return found


def _describe_records(table: AcceptanceTable, study: Study) -> EvaluationTable:
    """Return an [evaluation] table that names the records of [acceptance], so that an evaluator can
    score a model of the study on these records."""
    record_format = study.objective.resolved.record_format
    choices = study.evaluation.choices if study.evaluation else ()
    metric = "loss"
    if record_format in PREFERENCES:
        metric = "preference"
    elif record_format == "label" or len(choices) > 1:
        metric = "accuracy"
    return EvaluationTable.model_validate(
        {"path": table.path, "columns": table.columns, "metric": metric, "choices": choices}
    )


def _labels(study: Study, asked: EvaluationTable) -> tuple[str, ...]:
    if study.objective.resolved.record_format == "label":
        return tuple(study.objective.labels)
    return tuple(choice.strip() or choice for choice in asked.choices)
