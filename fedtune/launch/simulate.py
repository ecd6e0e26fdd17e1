"""Simulate a study on one machine, with the server, client and messages of a deployment."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.core.config import Site, Study, load_site, save, validate_study
from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError, InputError, Refused
from fedtune.core.files.writing import remove_drafts
from fedtune.core.progress import OnEvent
from fedtune.core.run_folder import LEDGERS
from fedtune.core.wire.keys import SigningKey
from fedtune.runs.choice import check_vacant, hold_run, new_run

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from fedtune.core.data.dataset import Dataset
    from fedtune.officer.budget_check import Paid
    from fedtune.runs.run import Run
    from fedtune.server.parts import Settings


def simulate(
    study: Study,
    sites: Sequence[Site],
    out: Path | str | None = None,
    *,
    resume: bool = False,
    on_event: OnEvent | None = None,
    engine: Literal["in-process", "ray"] = "in-process",
    processes: int = 1,
    rounds: int | None = None,
    key: SigningKey | None = None,
    anyway: bool = False,
    shares: Mapping[str, float] | None = None,
) -> Run:
    """Run a whole study on this machine, with the server, client and ledgers of a deployment.

    Args:
        out: the run's folder; default: runs/NAME, by the study's name.
        resume: continue the run in `out` after its last whole round.
        on_event: called with ("round", {…}) and the like, in this process.
        engine: "ray" is Flower's own simulation runtime.
        processes: how many sites train at once, in processes that share the base's weights.
        rounds: of a study with a [schedule], the round to stop after; no time is waited.
        key: signs the run; without it one that is made for this run, and kept nowhere.
        anyway: run a study that is not expected to gain anything over public records alone.
        shares: of the sites' units by class, for that forecast, of classes that [public] lacks.

    A site reads its file again before each round. One that was made or changed in memory is written
    to site.toml in its state folder first. A site whose data is declared public or generated pays
    from a ledger of this run, ledgers/SITE in its folder, by a copy of its file that lies there.

    Errors: ConfigError where the sites cannot make up the study, DataError where a site's records
    do not suit it, PolicyRefused where declared data was ever charged as private, and what a run
    may raise: Refused, at once where the sites' budgets do not reach; ModelError,
    InfrastructureError."""
    from fedtune.launch.budgets import explain_refusal, remember

    study = validate_study(study)
    check(study, sites)
    check_rounds(study, rounds)
    _check_engine(study, engine, processes)
    out = new_run(study, None if out is None else Path(out), resume=resume)
    if not resume:
        check_vacant(out)
    check_budgets(study, sites, out)
    step = _steps(on_event)
    step("loading the libraries")
    from fedtune.core.vault.declared import declare
    from fedtune.officer.reading import check_data
    from fedtune.runs.run import Run
    from fedtune.runs.teacher_admission import register_teacher
    from fedtune.server.parts import Settings
    from fedtune.server.schedule import SimulatedClock

    with hold_run(out):
        for folder in (out, *(site.site.state for site in sites)):
            remove_drafts(folder)
        for site in sites:  # before anything is loaded, or connected
            declare(site)
        register_teacher(study)
        for site in sites:  # the sites are the user's own: report errors in their files now
            step(f"reading the records of {site.site.name}")
            dataset = check_data(site, study)
            if on_event:
                _describe_records(site, study, dataset, on_event)
        _describe_queries(study, len(sites), on_event)
        try:
            with _declared(sites, out) as paying:
                files = list(map(site_file, paying))
                settings = Settings(
                    key=key or SigningKey(),
                    pause=1.0,
                    clock=SimulatedClock(),
                    upto=rounds,
                    skip=False,
                    anyway=anyway,
                    shares=shares or {},
                )
                run = (study, files, out, resume, on_event, engine, processes, settings)
                _run(*run, _peers(study, sites))
                return Run(out)
        except Refused as refusal:
            raise explain_refusal(refusal, study, sites) from None
        finally:
            if (out / "plan.json").exists():
                remember(sites, out)


def _run(
    study: Study,
    files: list[Path],
    out: Path,
    resume: bool,
    on_event: OnEvent | None,
    engine: str,
    processes: int,
    settings: Settings,
    peers: str,
) -> None:
    from fedtune.server import rounds as server_rounds
    from fedtune.server.parts import Dependencies

    common: dict[str, Any] = {"resume": resume, "on_event": on_event}
    if engine == "ray":
        from fedtune.launch.ray import simulate_ray

        common["parts"] = Dependencies(settings=settings)
        simulate_ray(study, files, out, processes=processes, peers=peers, **common)
        return
    # In this process a site that fails now fails again: no waiting for sites, no pauses.
    at_once = Dependencies(settings=replace(settings, patience=0.0, pause=0.0))
    with _grid(files, processes, out, peers) as (grid, site_errors):
        try:
            server_rounds.run(grid, study, out, parts=at_once, **common)
        except InfrastructureError:
            if bad := _bad_files(files, site_errors):
                raise bad from None
            raise


def check_budgets(study: Study, sites: Sequence[Site], out: Path) -> list[Paid]:
    """Check what the study costs each site's records, in a second and before anything is loaded
    or computed from public text. Returns what they have paid so far, for sites that have paid.

    out: the run's folder. Errors: Refused if too few sites are left, with what their budgets
    were spent on."""
    from fedtune.launch.budgets import explain_refusal
    from fedtune.officer.budget_check import check_budget
    from fedtune.server.too_few import too_few

    paid: list[Paid] = []
    refused, least = dict[str, str](), study.strategy.min_sites
    for site in sites:
        try:
            if found := check_budget(study, site, out):
                paid.append(found)
        except Refused as refusal:
            refused[site.site.name] = f"refused: {refusal}"
    if refused and len(sites) - len(refused) < least:
        error = too_few(Refused, len(sites) - len(refused), refused, least)
        raise explain_refusal(error, study, sites)
    return paid


def _steps(on_event: OnEvent | None) -> Callable[[str], None]:
    """Return a function that shows on this machine's screen what is done before a run begins."""
    if on_event is None:
        return lambda text: None
    notify = on_event
    return lambda text: notify("step", {"text": text})


def _peers(study: Study, sites: Sequence[Site]) -> str:
    """Return the sites' signing keys, which pin each other in a simulation: all of them are made
    on this machine. If a site's policy.peers names keys, only these count for it."""
    if study.secure_aggregation is None:
        return ""
    from fedtune.core.ledger.ledger import Ledger

    return " ".join(Ledger(site.site.state).key.public for site in sites)


@contextmanager
def _declared(sites: Sequence[Site], out: Path) -> Iterator[list[Site]]:
    """Provide the sites; a site with declared data is replaced by a copy that pays from this
    run's ledger. A run that never began leaves none. Errors: InfrastructureError."""
    from fedtune.core.vault.declared import paid_by_run

    paying, new = list[Site](), not (out / "plan.json").exists()
    try:
        for site in sites:
            if site.data.declared:
                folder = out / LEDGERS / site.site.name
                site = paid_by_run(site, folder)
                saved = save(site, folder / "site.toml")
                site = load_site(saved)
            paying.append(site)
        yield paying
    except BaseException:
        if new and not (out / "plan.json").exists():
            shutil.rmtree(out / LEDGERS, ignore_errors=True)
            with suppress(OSError):
                out.rmdir()
        raise


def _describe_records(site: Site, study: Study, dataset: Dataset, on_event: OnEvent) -> None:
    """Send what happens to a site's rows as "records", an event for this screen only."""
    from fedtune.core.vault.reading import describe, shown

    name, line = site.site.name, describe(dataset, study, site.site.declared_size)
    shown.add(line)
    on_event("records", {"name": name, "text": f"{name}: {line}"})


def _describe_queries(study: Study, sites: int, on_event: OnEvent | None) -> None:
    """Send how much of a private evaluation's answer will be noise, for this screen only."""
    from fedtune.accounting.costs import query_lines

    if on_event:
        for line in query_lines(study, sites):
            on_event("records", {"name": "coordinator", "text": line})


def _bad_files(files: Sequence[Path], errors: Mapping[str, FedtuneError]) -> FedtuneError | None:
    """Return the first site's error, if every site's error is about its files."""
    found_errors = [error for path in files if (error := errors.get(str(path)))]
    all_inputs = all(isinstance(error, InputError) for error in found_errors)
    return found_errors[0] if found_errors and all_inputs else None


def site_file(site: Site) -> Path:
    """Return the file that a site's worker reads: the one from which it was loaded, if
    unchanged, else site.toml in the site's state folder, written now. Errors:
    InfrastructureError."""
    if site.file is not None:
        with suppress(ConfigError):
            if load_site(site.file) == site:
                return site.file
    return save(site, site.site.state.absolute() / "site.toml")


def check_rounds(study: Study, rounds: int | None) -> None:
    """Check that the study ends, by itself or after `rounds`. Errors: ConfigError."""
    if study.continuous and rounds is None:
        raise ConfigError(
            "a study with a [schedule] has no last round", "--rounds N, to stop after round N here"
        )
    if rounds is not None and not study.continuous:
        raise ConfigError(
            "--rounds is for studies with a [schedule]", "training.rounds in study.toml"
        )


def _check_engine(study: Study, engine: str, processes: int) -> None:
    """Check that a site's messages reach the process that keeps its draws: Ray hands them to any
    of its workers. Errors: ConfigError."""
    if study.secure_aggregation and engine == "ray" and processes > 1:
        raise ConfigError(
            f"[secure_aggregation] under Ray with {processes} processes: a ready site keeps "
            "its draw in the memory of one process, and Ray asks any of them for the masked words",
            "one process under Ray, or the in-process engine, which keeps each site in one process",
            f"leave --engine ray out: --processes {processes} alone trains as many sites at once",
        )


@contextmanager
def _grid(
    files: list[Path], processes: int, out: Path, peers: str
) -> Iterator[tuple[Grid, dict[str, FedtuneError]]]:
    """Provide the sites' grid, and a table of their errors by site file."""
    from fedtune.core.vault.worker import drop_if_changed

    for path in files:
        drop_if_changed(path)
    if processes > 1:
        from fedtune.launch.process_pool import ProcessGrid

        logs = out / "processes"
        try:
            with ProcessGrid(files, processes, logs, peers) as pool:
                yield pool, pool.site_errors
        except FedtuneError:
            if not (out / "plan.json").exists():  # a run that never began leaves nothing
                shutil.rmtree(logs, ignore_errors=True)
            raise
    else:
        from fedtune.flower.grid import InProcessGrid
        from fedtune.launch.in_one_process import app, site_errors

        site_errors.clear()
        yield InProcessGrid(files, app, peers=peers), site_errors


def check(study: Study, sites: Sequence[Site]) -> None:
    """Check that the sites suffice and share neither name nor ledger. Errors: ConfigError."""
    names: dict[str, Site] = {}
    states: dict[Path, Site] = {}
    for site in sites:
        name, state = site.site.name, site.site.state.absolute()
        if other := names.get(name):
            both = f"{_where(other)} and {_where(site)}: both are called {name}"
            raise ConfigError(both, "a name of its own for each site")
        if other := states.get(state):
            raise ConfigError(
                f"{_where(other)} and {_where(site)}: both keep their ledger in {state}",
                "site.state: a folder of its own for each site",
            )
        names[name], states[state] = site, site
    if len(names) < study.strategy.min_sites:
        raise ConfigError(
            f"{len(names)} sites given", f"at least strategy.min_sites = {study.strategy.min_sites}"
        )


def _where(site: Site) -> str:
    return str(site.file or f"site {site.site.name}")
