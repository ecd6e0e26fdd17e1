"""Run several studies of one coordinator. Each event is printed on a line that begins with the
study's name. The studies' deadlines are parsed here too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedtune.cli.console import warn_not_private
from fedtune.cli.exit_codes import ErrorWithResult
from fedtune.cli.status_view import studies_table
from fedtune.cli.watch import Watch
from fedtune.core.errors import (
    ConfigError,
    InfrastructureError,
    Refused,
    describe,
    escape_controls,
)
from fedtune.observe import Observer, observer
from fedtune.observe.home_status import HomeStatus
from fedtune.observe.status import read_status
from fedtune.report.run_files import read_report
from fedtune.runs.choice import already_done, beginning, finished_line, new_run
from fedtune.server.schedule import format_utc

if TYPE_CHECKING:
    from fedtune.core.config import Study
    from fedtune.launch.side_by_side import Outcome

STOPPED = "stopped; each study keeps every whole round, and the same command with --resume goes on"


def deadlines_of(given: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Parse the values of --deadline, each TIME or STUDY=TIME. Return each study's name -> its
    deadline in seconds since 1970, or infinity if it has none.

    A TIME alone holds for every study that has no deadline of its own. names: the studies' names.
    Errors: ConfigError."""
    found = dict[str, float]()
    for text in given:
        name, _, moment = text.rpartition("=")
        try:
            at = datetime.fromisoformat(moment)
        except ValueError:
            at = None
        if at is None or at.tzinfo is None or (name and name not in names):
            raise ConfigError(
                f"--deadline {text[:80]}: cannot be used",
                "TIME or STUDY=TIME, with a study's name and a time with its offset, as in "
                "2026-12-24T18:00Z",
            )
        found[name] = at.timestamp()
    return {name: found.get(name, found.get("", math.inf)) for name in names}


def format_deadline(deadline: float) -> str:
    """Format a deadline, given in seconds since 1970, as a time in UTC; "" for infinity, i.e. no
    deadline."""
    return format_utc(deadline) if deadline < math.inf else ""


class Named(Console):
    """A console that begins each line with a study's name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(f"{self._name:<12}", *objects, **options)


def run_several(
    studies: Sequence[tuple[Study, Path]],
    home: Path,
    deadlines: Mapping[str, float],
    serve: Callable[..., list[Outcome]],
    *,
    resume: bool,
) -> dict[str, Any]:
    """Run the studies of one `fedtune server` command and print what happens. Return {"studies": …}
    with a dict for each study: its name, whether it is done or failed, its run folder, and its
    report or its error.

    - studies: each with the folder in which its run is made
    - home: the coordinator's home
    - deadlines: each study's name -> its deadline in seconds since 1970, or infinity
    - serve: a function that runs several studies side by side: `serve_all` without the arguments
      that this function gives it, which are the studies, `on_event` and `on_end`
    - resume: whether studies that were begun go on

    Errors: ConfigError; ErrorWithResult, with the same dict, if a study failed; the errors of
    `serve_all`."""
    from fedtune.launch.side_by_side import Entry

    status, result, entries = HomeStatus(home), dict[str, dict[str, Any]](), list[Entry]()
    for study, runs in studies:
        name = study.study.name
        screen = Named(name)
        if done := already_done(study, None, resume=resume, runs=runs):
            screen.print(finished_line(done), highlight=False, markup=False)
            result[name] = {"outcome": "done", "run": str(done), "report": read_report(done)}
            continue
        taken = [entry.out for entry in entries]
        folder = new_run(study, None, resume=resume, runs=runs, taken=taken)
        if line := beginning(study, folder, resume=resume, runs=runs):
            screen.print(line, highlight=False, markup=False)
        if not study.private:
            warn_not_private(screen)
        row = status.study(name, format_deadline(deadlines[name]))
        opened = partial(observer, "coordinator", folder, then=Watch(screen, name), more=[row])
        entries.append(Entry(study, folder, opened, resume, deadlines[name]))
    failed: list[Outcome] = []

    def end(outcome: Outcome) -> None:
        entry, error = outcome.entry, outcome.error
        result[entry.name] = {"outcome": "done", "run": str(entry.out), "report": outcome.report}
        if error is not None:
            failed.append(outcome)
            result[entry.name] |= {"outcome": "failed", "error": describe(error)}
        said = f"FAILED: {describe(error)}" if error else f"finished: {entry.out}"
        style = "bold red" if error else None
        Named(entry.name).print(escape_controls(said), style=style, highlight=False, markup=False)

    if entries:
        try:
            with Observer([status], then=Watch(Console(), "starting a coordinator")) as seen:
                serve(entries, on_event=seen, on_end=end)
                seen("done", {})
        except KeyboardInterrupt:
            raise KeyboardInterrupt(STOPPED) from None
        Console().print(studies_table(read_status(home).studies))
    told = {
        "studies": [{"study": study.study.name, **result[study.study.name]} for study, _ in studies]
    }
    if failed:
        refused = all(isinstance(outcome.error, Refused) for outcome in failed)
        raise ErrorWithResult(
            told,
            (Refused if refused else InfrastructureError)(
                f"{len(failed)} of {len(studies)} studies failed: "
                f"{', '.join(outcome.entry.name for outcome in failed)}",
                "every study with its report",
                "correct what each line above names; with --resume only these studies go on",
            ),
        )
    return told
