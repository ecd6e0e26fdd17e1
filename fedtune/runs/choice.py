"""Choose the folder of the run that a command begins or resumes, or find a study's finished run."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.files import locks
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.run_folder import SIGNATURE, load_plan
from fedtune.report.run_files import read_report

if TYPE_CHECKING:
    from fedtune.core.config import Study

RUNS = Path("runs")
LOCK = "lock"  # a file in a run's folder that the process which trains there keeps locked


def folder_for(name: str, *, resume: bool, runs: Path = RUNS, taken: Collection[Path] = ()) -> Path:
    """Return the folder for a study's run, among RUNS/NAME, RUNS/NAME-2, -3, …: the first that does
    not exist or, with `resume`, the newest that does. Nothing is created.

    - name: the study's name, NAME
    - resume: whether to return the newest existing folder of the study, if there is any. Folders of
      a study with another name are passed over: runs/a-2 may be the second run of `a`, or the first
      of `a-2`.
    - runs: the folder RUNS of all runs
    - taken: folders that are passed over, since other studies will use them, although no plan is in
      them yet"""
    found: list[Path] = []
    fresh, number = runs / name, 1
    while fresh.exists() or fresh in taken:
        if fresh not in taken and not _is_of_another(fresh, name):
            found.append(fresh)
        number += 1
        fresh = runs / f"{name}-{number}"
    return found[-1] if resume and found else fresh


def _is_of_another(run: Path, name: str) -> bool:
    """Return whether the folder `run` holds the plan of a study with another name than `name`;
    False if no plan can be read there."""
    try:
        study = json.loads((run / "plan.json").read_bytes())["study"]["name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return bool(study != name)


def find_finished(study: Study, runs: Path = RUNS) -> Path | None:
    """Find the newest finished run of this study under `runs`; None if there is none, or the study
    has no last round. Digests that the study leaves open may have any value in the run's plan."""
    name = study.study.name
    run_name = re.compile(re.escape(name) + r"(-\d+)?")
    candidates = [run for run in runs.glob("*") if run_name.fullmatch(run.name)]
    for run in sorted(candidates, key=lambda run: (len(run.name), run.name), reverse=True):
        if is_finished(run, study):
            return run
    return None


def is_finished(run: Path, study: Study) -> bool:
    """Return whether the folder holds a finished run of this study. A run that ended before its
    last round, because its [selection] records showed no further gain, is finished too. Errors:
    InputError, ConfigError if its plan cannot be read."""
    if study.continuous or not (run / SIGNATURE).is_file():
        return False
    plan = load_plan(run)
    return with_digests_of(study, plan).digest == plan.digest


def with_digests_of(study: Study, plan: Study) -> Study:
    """Return a copy of `study` in which the number of rounds is fixed, and the digests that `study`
    leaves open are filled in from `plan`, the plan of a run. The copy equals `plan` if the run is
    one of this study."""
    from fedtune.accounting.rounds import with_rounds

    tables = _fill_digests(study.model_dump(mode="json"), plan.model_dump(mode="json"))
    return with_rounds(type(study).model_validate_json(json.dumps(tables)))


def has_begun(run: Path) -> bool:
    """Return whether a run's folder holds a checkpoint, from which --resume continues the run."""
    return (run / "checkpoint" / "run.db").exists()


def stopped_line(run: Path) -> str:
    """Return a line, after Ctrl-C stopped a run, that says what is kept of the run and how to
    continue it."""
    if has_begun(run):
        return f"stopped; {run} keeps every whole round, and the same command with --resume goes on"
    return (
        "stopped before the first round: no site has paid anything. What was computed from public "
        "text is kept on this machine, and the same command goes on from there"
    )


def _fill_digests(tables: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `tables`, a study as JSON, in which the digests that are open are filled in
    from `plan`, a plan as JSON. Digests that the study states stay as they are."""
    # Some open digests are left out of a study's JSON, and present in that of its plan.
    filled = tables | {key: None for key in plan.keys() - tables.keys() if key.endswith("digest")}
    for key, value in filled.items():
        theirs = plan.get(key)
        if isinstance(value, dict) and isinstance(theirs, dict):
            filled[key] = _fill_digests(value, theirs)
        elif value is None and key.endswith("digest"):
            filled[key] = theirs
    return filled


def already_done(study: Study, out: Path | None, *, resume: bool, runs: Path = RUNS) -> Path | None:
    """Return the folder of a finished run that leaves a command nothing to do, if the command
    starts or resumes this study; None if the command has work to do.

    - study: the study to run
    - out: the run's folder as a person named it; None if none was named
    - resume: whether the command resumes the study's newest run under `runs`
    - runs: the folder of all runs"""
    run = out or (folder_for(study.study.name, resume=True, runs=runs) if resume else None)
    if run is None:
        return find_finished(study, runs)
    return run if is_finished(run, study) else None


def finished_line(run: Path) -> str:
    """Return a line which says that a run is finished, with its ε and its date, and what can be
    done next. Errors: InputError if the report cannot be read."""
    report, plan = read_report(run), load_plan(run)
    parts = [f"finished: {run}"]
    if report.get("private"):
        parts.append(f"ε = {rounded_up(report['privacy'].get('epsilon'))}")
    parts.append(f"{datetime.fromtimestamp((run / 'report.json').stat().st_mtime, UTC):%Y-%m-%d}")
    ran = len(report.get("rounds") or ())
    if plan.selection and ran < (plan.training.rounds or 0):
        parts.append(f"ended after round {ran}, when no step lowered the selection loss")
    return (
        f"{', '.join(parts)}; read {run}/report.md. --resume has nothing left to do; another run, "
        "paid for again: --out OTHER"
    )


def new_run(
    study: Study,
    out: Path | None,
    *,
    resume: bool,
    runs: Path = RUNS,
    taken: Collection[Path] = (),
) -> Path:
    """Choose the folder of a run that starts or resumes. Nothing is created.

    - study: the study to run
    - out: the folder that a person named, which is returned as it is; None to choose one under
      `runs` by the study's name (`folder_for`)
    - resume: whether to continue the study's newest run under `runs`, if there is any
    - runs: the folder of all runs
    - taken: folders of other studies of the same command, which are not chosen

    Errors: ConfigError if no folder was named and this study is finished, since another run of it
    would be refused, or charged a second time."""
    if out is None and not resume and (run := find_finished(study, runs)):
        raise ConfigError(
            f"this study is finished: its run is {run}",
            todo=f"read {run}/report.md. For another study, change study.toml (study.name "
            "names its folder); it is paid from what `fedtune ledger SITE` shows as "
            "left. To run the same study again, and pay again for whatever must be "
            "trained again, give --out DIR",
        )
    return out or folder_for(study.study.name, resume=resume, runs=runs, taken=taken)


def check_vacant(run: Path) -> None:
    """Check that a run may begin in a folder. Errors: ConfigError if the folder holds a run
    already."""
    if any((run / name).exists() for name in ("checkpoint", "report.json")):
        raise ConfigError(
            f"{run}: a run is already there",
            "an empty folder",
            "continue that run with --resume, or choose another --out",
        )


def beginning(study: Study, run: Path, *, resume: bool, runs: Path = RUNS) -> str:
    """Return a line that says which run a command resumes, or that there is none to resume. Without
    `resume`, the line says that there is an earlier run of this study which is not finished; it is
    "" if there is none.

    - study: the study to run
    - run: the folder that `new_run` chose
    - resume: whether the command resumes a run
    - runs: the folder of all runs"""
    if resume:
        found = has_begun(run)
        return f"going on with {run}" if found else f"no run to go on with: {run} begins"
    last = folder_for(study.study.name, resume=True, runs=runs)
    if last == run or not (last / "checkpoint").is_dir() or (last / SIGNATURE).exists():
        return ""
    return (
        f"{last} is not finished: --resume goes on with it. This is another run, in {run}; what "
        "sites paid for the first stays paid"
    )


@contextmanager
def hold_run(run: Path) -> Iterator[None]:
    """A context manager that locks a run's folder for this process while its block runs. A missing
    folder is made, and removed again if nothing was written to it. Errors: InfrastructureError if
    another process trains there (the error names it), or the folder cannot be made."""
    made = [path for path in (run, *run.parents) if not path.exists()]
    try:
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InfrastructureError(
            f"{run}: cannot be made ({error.strerror})", todo="free disk space or fix the rights"
        ) from None
    try:
        with locks.hold_alone(run / LOCK, "run", run):
            yield
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()
