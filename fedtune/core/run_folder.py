"""Read and write a run's folder: its layout, its plan and its report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.errors import ConfigError, InputError
from fedtune.core.files import reading
from fedtune.core.files.writing import replace

if TYPE_CHECKING:
    from fedtune.core.config import Study

PRINTED = "name the folder that a run printed; if it is damaged, copy it again"
SIGNATURE = "signature.json"  # the last file that a run writes: a folder that has it is complete
BASE = "base"  # a run's own base, inside it
FILED = ("public", "selection", "evaluation")  # tables of a plan that name a coordinator's file
PLACES = Path("checkpoint") / "places.json"  # in a run: where those files are; not signed
ANSWERS = "answers.json"  # in a run: base and adapter on the same public prompts; not signed
LEDGERS = "ledgers"  # in a run of declared data: the ledger of each site with such data
ADAPTER, HEAD = "adapter", "head.safetensors"  # the folder that a run releases; its file of a head
TRAINED = "trained"  # what the sites trained, if the run releases the public start instead


def has_head(run: Path) -> bool:
    """Return whether a finished run trained a head. This follows from its files, not from its
    objective."""
    return (run / ADAPTER / HEAD).is_file()


def is_exported(folder: Path) -> bool:
    """Return whether `fedtune export --to hf` wrote the folder: a model with a report and no plan.
    It is no base: it was trained by the run from which it was exported. A copy of its weights alone
    does not show that."""
    folder = Path(os.path.expanduser(folder))  # as where bases are looked for
    files = ("config.json", "report.json")
    # A name that is too long for a path is no folder either: os.path says so without an error.
    is_model = all(os.path.isfile(folder / name) for name in files)
    return is_model and not os.path.exists(folder / "plan.json")


def without_places(study: Study) -> Study:
    """Return a copy of a plan that holds only the names of the coordinator's files, without their
    folders."""
    tables = {name: getattr(study, name) for name in FILED}
    changes = {
        name: table.model_copy(update={"path": Path(table.path.name)})
        for name, table in tables.items()
        if table is not None
    }
    return study.model_copy(update=changes)


def write_plan(run: Path, study: Study) -> None:
    """Write a run's plan to plan.json, which the run's signature covers and other people read. The
    paths of the plan's files on this machine go to a separate file. Errors: InfrastructureError."""
    tables = {name: getattr(study, name) for name in FILED}
    places = {name: str(table.path.absolute()) for name, table in tables.items() if table}
    if places:
        run.mkdir(parents=True, exist_ok=True)
        noted = {"folder": _identity(run), **places}
        replace(run / PLACES, json.dumps(noted, indent=1).encode())
    replace(run / "plan.json", (without_places(study).model_dump_json(indent=2) + "\n").encode())


def _with_places(study: Study, run: Path) -> Study:
    """Return a copy of a run's plan with the paths of its files on this machine. They are taken
    from the run's file of paths, if that was written for this very folder. Otherwise each file is
    expected in the run's folder, under the name that the plan gives, and must be no link, so that a
    run which somebody handed over cannot name any other file of this machine. Errors: InputError
    for a link."""
    tables = {name: table for name in FILED if (table := getattr(study, name)) is not None}
    noted: dict[str, Any] = {}
    if tables and (run / PLACES).exists():
        noted = reading.json_in(run / PLACES, "where a plan's files are", PRINTED)
        if noted.get("folder") != _identity(run):
            noted = {}
    changes = {}
    for name, table in tables.items():
        inside = run / table.path.name
        if name not in noted and inside.is_symlink():
            raise InputError(f"{inside}: is a link", "the file itself", "put the file there")
        changes[name] = table.model_copy(update={"path": Path(str(noted.get(name, inside)))})
    return study.model_copy(update=changes)


def _identity(folder: Path) -> int:
    """Return the folder's inode number, which tells the folder from any copy: whoever hands a run
    over cannot choose it. (The number of the device would change with a restart.)"""
    return folder.stat().st_ino


def load_plan(run: Path) -> Study:
    """Load the plan of the run in the folder `run`, with the paths of its files on this machine.
    Errors: InputError if the folder is no run's or the plan names a link; ConfigError if the plan
    is not valid."""
    from fedtune.core.config import study_from_json

    path = run / "plan.json"
    if not os.path.lexists(path):
        raise InputError(f"{run}: not a run folder", "plan.json in it", PRINTED)
    text = reading.text(path, "the plan of a run", PRINTED)
    try:
        study = _with_places(study_from_json(text), run)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.happened}", "the plan of a run", PRINTED) from None
    if study.base.model == BASE and (run / BASE).is_dir():
        base_table = study.base.model_copy(update={"model": str(run / BASE)})
        return study.model_copy(update={"base": base_table})
    return study
