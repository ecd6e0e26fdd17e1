"""The command that checks this machine for problems."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fedtune.cli.exit_codes import ErrorWithResult, command
from fedtune.cli.pace import StepPace
from fedtune.cli.study import SET
from fedtune.core.errors import ConfigError, escape_controls
from fedtune.core.progress import Step, listening, report
from fedtune.report.figures import duration

SLOW_SECONDS = 5.0  # without a terminal, a check that takes longer gets a line
AGAIN_SECONDS = 30.0  # pause between two such lines of one check


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(doctor)


DOCTOR_FILE = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A site's site.toml, or the coordinator's study.toml."),
]
DOCTOR_STUDY = Annotated[
    Path | None,
    typer.Option(
        "--study",
        metavar="STUDY",
        help="At a site: also check this study: its base, whether the policy allows its plan, "
        "and whether the records fit it; and run the self-test of the guarantee.",
    ),
]
DOCTOR_HOME = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="At the coordinator: its home. Default: the folder named coordinator beside FILE.",
    ),
]
DOCTOR_HOST = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="At the coordinator: the address on which `fedtune server` is to listen. "
        "Default: 127.0.0.1.",
    ),
]
DOCTOR_PORT = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=65535,
        metavar="N",
        help="At the coordinator: the port on which `fedtune server` is to listen. Default: 8443.",
    ),
]
DOCTOR_NAMES = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="At the coordinator: a name by which sites call this machine; may be repeated. "
        "Default: the one in the address that sites were given.",
        show_default=False,
    ),
]


def doctor(
    file: DOCTOR_FILE,
    study: DOCTOR_STUDY = None,
    home: DOCTOR_HOME = None,
    host: DOCTOR_HOST = None,
    port: DOCTOR_PORT = None,
    names: DOCTOR_NAMES = None,
    settings: SET = None,
) -> dict[str, Any]:
    """Check this machine for problems before a study meets them, and say what to do about each.

    **At a site** (site.toml): records against the declared size, ledger, keys and certificate, the
    connection to the coordinator, the host names in its certificate, its clock; with --study also
    the base, the memory, whether the policy allows the plan, and the self-test.

    **At the coordinator** (study.toml): plan, base, CA and certificate, its host names, clock,
    port, and the registry of sites. Give it the same options as `fedtune server`.

    **At both**: versions, disk, memory, and who can read the secrets. No record leaves this
    machine."""
    options = {"--study": study, "--home": home, "--host": host, "--port": port, "--name": names}
    coordinator = _kind(file) == "study"
    for option, value in options.items():
        if value is not None and (option == "--study") == coordinator:
            side = "a site" if option == "--study" else "the coordinator"
            raise ConfigError(
                f"{option} is for {side}, and {file} is not {side}'s file",
                todo=f"leave {option} out, or name the other file",
            )
    if settings and not (coordinator or study):
        raise ConfigError(
            "--set is given, but no study.toml is read", todo="name the study with --study"
        )
    console = Console()
    console.print(f"checking {file}", markup=False, highlight=False, soft_wrap=True)
    results = []
    with Checking(console) as checking:
        report("loading the libraries")
        if coordinator:
            from fedtune.server.doctor import Place
            from fedtune.server.doctor import examine as examine_coordinator

            place = Place(
                home or file.parent / "coordinator", host or "127.0.0.1", port or 8443, names or []
            )
            findings = examine_coordinator(file, place, settings or ())
        else:
            from fedtune.core.config import load_site
            from fedtune.officer.doctor import examine
            from fedtune.officer.review import find_coordinator, is_outline, read_plan

            site = load_site(file)
            plan = read_plan(study, site, settings or ()) if study else None
            outline = bool(study and plan and is_outline(study, plan))
            sender = find_coordinator(site, study) if study else ""
            findings = examine(file, plan, outline=outline, coordinator=sender)
        for finding in findings:
            checking.end_check()
            results.append(finding)
            mark = "[green]ok  [/green]" if finding.good else "[red]BAD [/red]"
            console.print(
                f"{mark} {finding.name}: {escape(escape_controls(finding.says))}", highlight=False
            )
    if bad := sum(not finding.good for finding in results):
        counted = "1 check" if bad == 1 else f"{bad} checks"
        error = ConfigError(
            f"{counted} failed", todo="correct what is marked BAD above, and run the checks again"
        )
        raise ErrorWithResult({"findings": results}, error)
    return {"findings": results}


class Checking:
    """Shows which check runs, and its progress. A terminal shows both at all times. Elsewhere a
    line is printed once a check has run for SLOW_SECONDS, and then every AGAIN_SECONDS."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = ""
        self._pace = StepPace()
        self._status = console.status("")
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Checking:
        self._listening = listening(self._hear)
        self._listening.__enter__()
        self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end_check()
        self._status.stop()
        self._listening.__exit__(None, None, None)

    def end_check(self) -> None:
        """Note that a check has ended, so that no more lines about it are printed."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
            self._timer = None

    def _hear(self, step: Step) -> None:
        seconds = self._pace.estimate_remaining(step, time.monotonic())
        share = "" if step.share is None else f" {step.share:.0%}"
        self._line = f"{step.text}{share}" + (f", {duration(seconds)} left" if seconds else "")
        self._status.update(escape(self._line))
        with self._lock:
            if self._timer is None and not self._console.is_terminal:
                self._timer = self._begin(SLOW_SECONDS)

    def _begin(self, seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, lambda: self._print(timer))
        timer.daemon = True
        timer.start()
        return timer

    def _print(self, timer: threading.Timer) -> None:
        with self._lock:
            if self._timer is not timer:
                return  # the check has ended
            line = f"     {self._line} …"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._timer = self._begin(AGAIN_SECONDS)


def _kind(file: Path) -> str:
    """Return whose settings a file holds: "site" if it has a table [site], "study" if it has a
    table [study]. Errors: ConfigError if it has neither."""
    from fedtune.core.files import reading

    expected, todo = "a site.toml or a study.toml", "`fedtune init DIR` writes one of each"
    tables = reading.toml_in(file, expected, todo, ConfigError)
    for kind in ("site", "study"):
        if kind in tables:
            return kind
    raise ConfigError(f"{file}: neither a site.toml nor a study.toml", "a [site] or [study] table")
