"""Admit a teacher: verify its signature when a person names it, or reviews a plan that names it.

Afterwards the teacher is identified by its digest. A site's process checks that the model which it
loads has this digest (core/models/loaded.py), and verifies no signature."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.core.bases.find import base_of_plan, place_of
from fedtune.core.config import Study
from fedtune.core.errors import FedtuneError
from fedtune.core.models.loaded import PLAN, load
from fedtune.core.models.teacher import folder_of
from fedtune.core.run_folder import is_exported, load_plan
from fedtune.evidence.verify import check_signed
from fedtune.report.run_files import read_report
from fedtune.runs.verify_model import verify


def register_teacher(study: Study) -> None:
    """Verify the signature of the teacher that a study names, and load the teacher by the name that
    the study gives. From then on, `find_teacher` finds the teacher by its digest. The study must
    have been written on this machine, where this name is valid. Nothing is done for a study without
    a teacher.

    Errors: ModelError (the model is missing, or has another digest), NotGenuine (the teacher is a
    run that was changed after it was signed)."""
    spec = study.objective.resolved.teacher_spec
    if spec is not None:
        check_signed(place_of(spec.name))
        load(spec.name, spec.digest)


def check_teacher(study: Study) -> None:
    """Verify the signature of the study's teacher, if the teacher is a signed run on this machine.
    Otherwise do nothing.

    Errors: NotGenuine (it was changed since it was signed)."""
    spec = study.objective.resolved.teacher_spec
    folder = folder_of(spec) if spec else None
    if folder is not None:
        check_signed(folder)


def describe_teacher(study: Study) -> dict[str, Any] | None:
    """Describe the study's teacher for a report; None if the study has none.

    Returns its "name", "digest", "kind" and, for a run, "report" (None if it has no report). The
    kind is "base", "run", or "unknown": it is not on this machine, its folder now holds another
    model, or it is an exported model or a run on one."""
    spec = study.objective.resolved.teacher_spec
    if spec is None:
        return None
    facts: dict[str, Any] = {"name": spec.name, "digest": spec.digest, "kind": "unknown"}
    with suppress(FedtuneError):
        folder = folder_of(spec)
        if folder is None:
            base_of_plan(spec.digest, None)
            return facts | {"kind": "base"}
        name, digest = verify(str(folder))
        if digest != spec.digest:
            return facts
        if is_exported(folder):
            return facts  # trained by a run whose report is not the folder's own: cost not known
        if not (folder / PLAN).is_file():
            return facts | {"kind": "base"}
        if is_exported(Path(load_plan(folder).base.model)):
            return facts  # its report does not hold the cost of the run that trained its base
        facts |= {"name": name, "kind": "run", "report": None}
        facts["report"] = read_report(folder, "private")
    return facts
