"""Describe a continuous study's versions in its report, with the version in use and its quality."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune import report as reports
from fedtune.core.errors import FedtuneError
from fedtune.core.run_folder import load_plan
from fedtune.core.wire.keys import SigningKey
from fedtune.evidence.sign import sign_files
from fedtune.report.run_files import read_report
from fedtune.server.versions import Index

NOT_MEASURED = "the public records; the version in use could not be measured on them"


def figures(champion: int, public: str) -> dict[str, Any]:
    """Return the entries of a report's "quality" that name the compared models, and the records on
    which these were measured.

    - champion: the number of the version in use
    - public: the fingerprint of the file of public records (`reading.fingerprint`); "" if it is
      not known"""
    records = "the public records"
    if public:
        records += f" in use (fingerprint {public[:8]})"
    columns = ["base alone", f"version {champion}, in use"]
    return {"on": records, "columns": columns, "public": public, "version": champion}


def in_use(index: Index) -> dict[str, Any]:
    """Return those rows of the report's table "continuous" that are about the versions and the
    version in use, name -> value. A rollback changes these rows. index: the run's versions."""
    released = [v.number for v in index.versions if v.decision == "released"]
    return {
        "version in use": index.champion,
        "chosen by a person": index.pinned,
        "versions released": released,
        "versions kept back": index.judged - len(released),
        "record": json.loads(json.dumps(asdict(index))),
    }


def restate(run: Path, index: Index, signed_by: tuple[SigningKey, str] | None = None) -> str:
    """Rewrite a run's report after a person chose the version in use. The chosen version and the
    base are measured on the present public records, unless the report already has the figures of
    this version. If there is no report yet, nothing is written.

    - run: the run's folder
    - index: the run's versions, after the choice
    - signed_by: the coordinator's key and CA, with which the report is signed again; with None the
      new report is not signed

    Returns "", or the reason why the version could not be measured; the report then has no figures
    of this version. Errors: InputError if report.json is damaged; InfrastructureError if the disk
    refuses."""
    if not (run / "report.json").is_file():
        return ""
    body, reason = read_report(run), ""
    before = body.get("continuous") or {}
    quality = body.get("quality") or {}
    body["continuous"] = before | in_use(index)
    if quality.get("version") != index.champion:
        quality = {key: value for key, value in quality.items() if key not in ("gain", "after")}
        try:
            quality |= _measure_version(run, index.champion)
        except FedtuneError as error:
            reason = str(error)
            stale = figures(index.champion, "") | {"on": NOT_MEASURED, "version": None}
            quality |= {"before": {}, "after": {}, **stale}
        body["quality"] = quality
    reports.write(run, body)
    if signed_by:
        sign_files(run, *signed_by)
    return reason


def _measure_version(run: Path, champion: int) -> dict[str, Any]:
    from fedtune.core.files.reading import fingerprint
    from fedtune.evaluation.run import evaluate
    from fedtune.runs.run import Run

    study = load_plan(run)
    assert study.evaluation is not None  # a study with a [schedule] has one
    result = evaluate(Run(run), study.evaluation)
    kept = {key: result[key] for key in ("metric", "before", "after", "gain")}
    return kept | figures(champion, fingerprint(study.evaluation.path))
