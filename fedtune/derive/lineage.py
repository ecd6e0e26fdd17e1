"""Describe the lineage of a derived model: its parent runs, their privacy cost, and whether they
may set targets for private records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.accounting import composed_epsilon
from fedtune.core.errors import Refused
from fedtune.core.models.loaded import LoadedModel
from fedtune.core.run_folder import is_exported
from fedtune.evidence.verify import check_signed
from fedtune.report.declared import declared_in
from fedtune.report.teacher import leaves_out
from fedtune.runs.run import Run


def require_private(model: LoadedModel, role: str, source: str) -> None:
    """Check that a model may set targets for private records: it must be a base, or a run that was
    trained under DP, as all runs from which it was derived. With a model that was trained without
    noise on the same records, each record's target would depend on all the other records.

    - model: the base or run
    - role: what the error calls it, such as "judge"
    - source: the base's name or the run's folder, from which the model was loaded

    Errors: Refused (also for an exported model, and for a run on one); InputError if the run has no
    report."""
    if model.study is not None:
        require_counted_base(model.base.path, role)
    elif is_exported(model.base.path):
        raise Refused(
            f"the {role} is an exported model ({model.digest}), and was trained by a run",
            "a base, or the run from which the model was exported, whose report says what it cost",
            "name the folder of that run",
        )
    if model.study is None:
        return
    if not model.study.private:
        how = 'with privacy = "off"'
    elif not (run := Run(source)).private:
        how = "derived from one without privacy"
    elif left_out := leaves_out(run.report):
        how = f"whose teacher {left_out}"
    else:
        return
    raise Refused(
        f"the {role} is a run {how} ({model.digest})",
        "a base, or a run that was trained under (ε, δ), as all runs from which it was derived",
    )


def require_counted_base(base: Path, role: str) -> None:
    """Check that the base of a run is no exported model. The run that trained an exported model
    read records, and their cost is in no report of a run that started from it.

    base: the folder of the run's base; role: what the error calls the run, such as "judge". Errors:
    Refused."""
    if is_exported(base):
        raise Refused(
            f"the {role} is a run whose base, {base.name}, is an exported model: another run "
            "trained it, whose cost is not in this run's ε",
            "a run on a base that no record of the sites trained",
            "train the study again on the base of that other run",
        )


def parent(run: Run, model: LoadedModel, role: str) -> dict[str, Any]:
    """Describe a parent run for the report of a derived model: "name", "role", "plan" (a digest),
    "digest" (the model's) and "report", the whole report. role: what the parent was for, such as
    "teacher". Errors: InputError; NotGenuine (the run was changed after it was signed); Refused
    (its base is an exported model)."""
    check_signed(run.folder)
    require_counted_base(model.base.path, role)
    return {
        "name": run.study.study.name,
        "role": role,
        "plan": run.study.digest,
        "digest": model.digest,
        "report": run.report,
    }


def warn_of_cost(reports: Sequence[dict[str, Any]]) -> str:
    """Return why the ε of runs cannot be composed: which of them were trained without privacy, or
    by a teacher whose cost their reports do not hold. Return "" if it can."""
    bare = [str(report.get("study")) for report in reports if not report.get("private")]
    said = [f"trained without privacy: {', '.join(bare)}"] if bare else []
    for report in reports:
        if report.get("private") and (left_out := leaves_out(report)):
            said.append(f"the teacher of {report.get('study')} {left_out}")
    return "; ".join(said)


def combined_lineage(parents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compose the privacy of the parent runs, for the report of a model derived from them. Return
    the report's sections "private", "privacy" (with the composed ε, or a warning if a parent is not
    private) and "parents". The result also has what the parents' reports say about the sites' data,
    for example that it was declared public or generated. A run that occurs twice is charged once.
    parents: the dicts that `parent` returned."""
    reports = {p["digest"]: p["report"] for p in parents}
    warning = warn_of_cost(list(reports.values()))
    privacy: dict[str, Any] = {"warning": warning}
    if not warning:
        privacy = composed_epsilon.compose_reports(list(reports.values()))
    entries = [
        {key: value for key, value in p.items() if key != "report"}
        | {"privacy": {k: p["report"].get("privacy", {}).get(k) for k in ("epsilon", "delta")}}
        for p in parents
    ]
    combined = {"private": not warning, "privacy": privacy, "parents": entries}
    return combined | declared_in(list(reports.values()))
