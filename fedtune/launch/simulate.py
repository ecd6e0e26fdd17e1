"""Simulate a study on one machine, with a deployment's code for server, client and messages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
    address: str = "",
    processes: int = 1,
    rounds: int | None = None,
    key: SigningKey | None = None,
    anyway: bool = False,
    shares: Mapping[str, float] | None = None,
) -> Run:
    """Run a whole study on this machine, with the server, client and ledgers of a deployment.

    Args:
        study: the study as its study.toml describes it.
        sites: the sites that take part, at least strategy.min_sites.
        out: the run's folder; default: runs/NAME, by the study's name.
        resume: continue the run in `out` after its last complete round.
        on_event: called in this process with each event's kind and data, such as ("round", {…}).
        engine: "in-process", or "ray": the processes run on the nodes of a Ray cluster.
        address: the address of a running Ray cluster, "auto" or "HOST:PORT". All of its nodes must
            see the run's and the sites' folders. Default: a cluster on this machine that ends with
            the run.
        processes: the number of sites that train at the same time, in processes that share the
            base's weights.
        rounds: for a study with a [schedule], the round after which to stop. The simulation does
            not wait for slots: its clock starts at schedule.start, else at the present time.
        key: signs the run; by default a key that is made for this run and stored nowhere.
        anyway: run a study that is not expected to gain anything over public records alone.
        shares: class -> its share of the sites' units, for classes that [public] lacks; the
            forecast of the gain uses it.

    A site's file is read again before each round. A site that was made or changed in memory is
    first written to site.toml in its state folder. A site whose data is declared public or
    generated pays from a ledger of this run, ledgers/SITE in the run's folder, which also holds a
    copy of the site's file.

    Errors: ConfigError if these sites cannot run the study, or another home pays for their records;
    DataError if a site's records do not fit it; PolicyRefused if declared data was ever charged as
    private; Refused, before any training, if too few sites have budget left; ModelError;
    InfrastructureError, also if a site pays from its own ledger and its vault is running."""
    from fedtune.homes.known_homes import check_simulated
    from fedtune.homes.opening import check_ledger_stands
    from fedtune.launch.budgets import (
        count_charges,
        explain_refusal,
        remember,
        say_what_was_free,
    )

    study = validate_study(study)
    check(study, sites)
    for site in sites:
        check_simulated(site)
        check_ledger_stands(site.home)
    check_rounds(study, rounds)
    if address and engine != "ray":
        raise ConfigError("--address is for --engine ray", "both options, or neither")
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
        for site in sites:  # first, so that a refusal comes before anything is loaded
            declare(site)
        register_teacher(study)
        for site in sites:  # all files are this user's: report errors in them before the run
            step(f"reading the records of {site.site.name}")
            dataset = check_data(site, study)
            if on_event:
                _describe_records(site, study, dataset, on_event)
        _describe_queries(study, len(sites), on_event)
        try:
            # Locks are taken only now, so that files with an error leave no state folder behind.
            with _paying(sites), _declared(sites, out) as paying:
                files = list(map(site_file, paying))
                settings = Settings(
                    key=key or SigningKey(),
                    pause=1.0,
                    clock=SimulatedClock(find_start(study)),
                    upto=rounds,
                    skip=False,
                    anyway=anyway,
                    shares=shares or {},
                )
                at = (engine, address, processes, _peers(study, sites))
                before = count_charges(sites)
                _run(study, files, out, resume, on_event, settings, at)
                with suppress(FedtuneError):  # the run is finished, whatever its ledgers say now
                    said = say_what_was_free(out, sites, before)
                    if on_event and said and not resume:
                        on_event("records", {"name": "coordinator", "text": said})
                return Run(out)
        except Refused as refusal:
            raise explain_refusal(refusal, study, sites) from None
        finally:
            if (out / "plan.json").exists():
                remember(sites, out)


@contextmanager
def _paying(sites: Sequence[Site]) -> Iterator[None]:
    """A context manager that holds, while its block runs, the lock of each site that pays from its
    own ledger, so that neither the site's vault nor a restore can use that ledger. Errors:
    InfrastructureError that names who holds a lock."""
    from fedtune.core.vault.process import locked

    with ExitStack() as held:
        for site in sites:
            if not site.data.declared:
                held.enter_context(locked(site, "vault or simulation of this site"))
        yield


def _run(
    study: Study,
    files: list[Path],
    out: Path,
    resume: bool,
    on_event: OnEvent | None,
    settings: Settings,
    at: tuple[str, str, int, str],
) -> None:
    """Run the rounds of a study with sites on this machine or a Ray cluster.

    - study: the study
    - files: the sites' files
    - out: the run's folder
    - resume: whether to continue the run in `out`
    - on_event: called with each event's kind and data; None for nobody
    - settings: the coordinator's settings; their `patience` and `pause` are replaced by 0
    - at: (engine, address, processes, peers): "in-process" or "ray"; the Ray cluster's address; the
      number of the sites' processes; the sites' signing keys (`_peers`)

    Errors: those of server.rounds.run. If the run fails and every site that failed did so because
    of its files or records (InputError), the first of these errors is raised instead."""
    from fedtune.server import rounds as server_rounds
    from fedtune.server.parts import Dependencies

    # A site in this process that fails once fails again, so there is nothing to wait for.
    at_once = Dependencies(settings=replace(settings, patience=0.0, pause=0.0))
    with _grid(files, out, *at) as (grid, site_errors):
        try:
            server_rounds.run(grid, study, out, resume=resume, on_event=on_event, parts=at_once)
        except InfrastructureError:
            if bad := _bad_files(files, site_errors):
                raise bad from None
            raise


def check_budgets(study: Study, sites: Sequence[Site], out: Path) -> list[Paid]:
    """Check that the sites' budgets allow the study, before anything is loaded or computed from
    public text. Return a Paid for each site that has paid before: the ε so far and after this run.

    out: the run's folder. Errors: Refused if too few sites have the budget; the error lists what
    the budgets were spent on."""
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


def find_start(study: Study) -> float | None:
    """Return the time at which a simulation's clock begins: schedule.start in seconds since 1970,
    so that every simulation of the plan has its rounds at the same times. Return None, which stands
    for the present time, if the plan names no start."""
    start = study.schedule.start_timestamp if study.schedule else 0.0
    return start or None  # 1970, if the plan names no start


def _steps(on_event: OnEvent | None) -> Callable[[str], None]:
    """Return a function that is called with a text for each step of the preparation, before the run
    begins. It sends the text to `on_event` as an event "step", for this machine's screen only. If
    `on_event` is None, the function does nothing."""
    if on_event is None:
        return lambda text: None
    notify = on_event
    return lambda text: notify("step", {"text": text})


def _peers(study: Study, sites: Sequence[Site]) -> str:
    """Return the signing keys of all sites, separated by spaces; "" without secure aggregation. In
    a simulation all keys are made on this machine, so a site accepts them as the keys of its peers,
    unless its policy.peers names others."""
    if study.secure_aggregation is None:
        return ""
    from fedtune.core.ledger.ledger import signing_key
    from fedtune.homes.opening import open_ledger

    return " ".join(signing_key(site, open_ledger(site.home)).public for site in sites)


@contextmanager
def _declared(sites: Sequence[Site], out: Path) -> Iterator[list[Site]]:
    """Provide the list of sites for the run: each site whose data is declared public or generated
    is replaced by a copy that pays from a ledger of this run. If the run never begins, these
    ledgers are removed. out: the run's folder, in whose folder ledgers/ these ledgers lie. Errors:
    InfrastructureError."""
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
    """Send an event "records", for this machine's screen only, that says how many of a site's rows
    are used and left out.

    - site: the site, whose name and declared size are stated
    - study: the study for which the records were read
    - dataset: the site's records, as `check_data` read them for this study
    - on_event: called with the event"""
    from fedtune.core.vault.reading import describe, shown

    name, line = site.site.name, describe(dataset, study, site.site.declared_size)
    shown.add(line)
    on_event("records", {"name": name, "text": f"{name}: {line}"})


def _describe_queries(study: Study, sites: int, on_event: OnEvent | None) -> None:
    """Send events "records", for this machine's screen only, that say how much noise the answers of
    a private evaluation will have.

    - study: the plan; one without queries sends no event
    - sites: the number of sites
    - on_event: called with each event; None for nobody"""
    from fedtune.accounting.costs import query_lines

    if on_event:
        for line in query_lines(study, sites):
            on_event("records", {"name": "coordinator", "text": line})


def _bad_files(files: Sequence[Path], errors: Mapping[str, FedtuneError]) -> FedtuneError | None:
    """Return the first error, in the order of `files`, if every error is an InputError; None if
    there is no error or if one is of another class. errors: site file -> the error with which the
    site failed."""
    found_errors = [error for path in files if (error := errors.get(str(path)))]
    all_inputs = all(isinstance(error, InputError) for error in found_errors)
    return found_errors[0] if found_errors and all_inputs else None


def site_file(site: Site) -> Path:
    """Return the path of the site file that the simulation reads for `site`. It is the file from
    which `site` was loaded, if loading it again gives the same site. Otherwise write `site` to
    site.toml in its state folder, and return that path. Errors: InfrastructureError."""
    if site.file is not None:
        with suppress(ConfigError):
            if load_site(site.file) == site:
                return site.file
    return save(site, site.site.state.absolute() / "site.toml")


def check_rounds(study: Study, rounds: int | None) -> None:
    """Check that `rounds`, the round after which to stop, is given for a study without a last
    round, and is None for every other study. Errors: ConfigError."""
    if study.continuous and rounds is None:
        raise ConfigError(
            "a study with a [schedule] has no last round", "--rounds N, to stop after round N here"
        )
    if rounds is not None and not study.continuous:
        raise ConfigError(
            "--rounds is for studies with a [schedule]", "training.rounds in study.toml"
        )


@contextmanager
def _grid(
    files: list[Path], out: Path, engine: str, address: str, processes: int, peers: str
) -> Iterator[tuple[Grid, dict[str, FedtuneError]]]:
    """A context manager that opens the Grid (Flower's connection of a server to its clients) of the
    sites while its block runs.

    - files: the sites' files
    - out: the run's folder; its folder `processes` gets the logs of the sites' processes
    - engine: "in-process" or "ray"
    - address: the address of a running Ray cluster; "" to start one on this machine
    - processes: the number of processes of the sites. With 1, and without Ray, all sites work in
      this process.
    - peers: the sites' signing keys (`_peers`)

    Yields the grid, and site file -> the error with which the site failed."""
    from fedtune.core.vault.worker import drop_if_changed

    for path in files:
        drop_if_changed(path)
    if engine == "ray" or processes > 1:
        from fedtune.launch.process_pool import ProcessGrid
        from fedtune.launch.ray import RayGrid

        logs = out / "processes"
        several = (files, processes, logs, peers)
        try:
            with RayGrid(*several, address) if engine == "ray" else ProcessGrid(*several) as pool:
                yield pool, pool.site_errors
        except FedtuneError:
            if not (out / "plan.json").exists():  # the run never began: remove its logs
                shutil.rmtree(logs, ignore_errors=True)
            raise
    else:
        from fedtune.flower.grid import InProcessGrid
        from fedtune.launch.in_one_process import app, site_errors

        site_errors.clear()
        yield InProcessGrid(files, app, peers=peers), site_errors


def check(study: Study, sites: Sequence[Site]) -> None:
    """Check that there are at least strategy.min_sites sites, and that no two of them have the same
    name or the same ledger. Errors: ConfigError."""
    names: dict[str, Site] = {}
    states: dict[Path, Site] = {}
    for site in sites:
        name, state = site.site.name, site.home.absolute()
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
