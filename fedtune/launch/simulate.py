"""A whole study on one machine: the same server, the same client, the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.config import Study, load_site, load_study
from fedtune.config.sites import sites_in
from fedtune.errors import ConfigError, FedtuneError, InfrastructureError, InputError

if TYPE_CHECKING:
    from flwr.serverapp import Grid

__all__ = ["check", "simulate", "sites_in"]

OnEvent = Callable[[str, dict[str, Any]], None]


def simulate(
    study_path: Path,
    sites: Sequence[Path],
    out: Path,
    *,
    resume: bool = False,
    on_event: OnEvent | None = None,
    engine: Literal["in-process", "ray"] = "in-process",
    processes: int = 1,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Run a study over site files; returns the report's body.

    Sites answer one after another in this process; with `processes`, at once in so many of them,
    which share the base's weights; with engine "ray", in Flower's own runtime.
    rounds: of a study without a last one, the round to stop after; no time is waited.
    Errors: as fedtune.server.rounds.run; ConfigError where the sites cannot make up a study."""
    from fedtune.client.site import check_data
    from fedtune.models.teacher import own_teacher
    from fedtune.server import rounds as machine
    from fedtune.server.parts import Dependencies
    from fedtune.server.schedule import Quick

    study = load_study(study_path)
    check(study, sites)
    check_rounds(study, rounds)
    own_teacher(study)
    for path in sites:  # here the sites are the user's own: say now what is wrong with their files
        check_data(load_site(path), study)
    # Nobody is on the way: who fails now fails again.
    at_once = Dependencies(patience=0.0, pause=0.0, clock=Quick(), upto=rounds, skip=False)
    if engine == "ray":
        from fedtune.launch.ray import simulate_ray

        return simulate_ray(
            study,
            sites,
            out,
            resume=resume,
            on_event=on_event,
            parts=Dependencies(pause=1.0, clock=Quick(), upto=rounds, skip=False),
            processes=processes,
        )
    files = [path.resolve() for path in sites]
    with _grid(files, processes, out) as (grid, trouble):
        try:
            return machine.run(grid, study, out, resume=resume, on_event=on_event, parts=at_once)
        except InfrastructureError:
            # Here the sites are the user's own: say what is wrong with their files.
            own = [error for path in files if (error := trouble.get(str(path)))]
            if own and all(isinstance(error, InputError) for error in own):
                raise own[0] from None
            raise


def check_rounds(study: Study, rounds: int | None) -> None:
    """Errors: ConfigError unless the study ends, or is ended by `rounds`."""
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
    files: list[Path], processes: int, out: Path
) -> Iterator[tuple[Grid, dict[str, FedtuneError]]]:
    """The sites' grid, and where it keeps their own errors by site file."""
    if processes > 1:
        from fedtune.launch.process_pool import ProcessGrid

        logs = out / "processes"
        try:
            with ProcessGrid(files, processes, logs) as pool:
                yield pool, pool.trouble
        except FedtuneError:
            if not (out / "plan.json").exists():  # a run that never began leaves nothing
                shutil.rmtree(logs, ignore_errors=True)
            raise
    else:
        from fedtune.client.app import app, trouble
        from fedtune.flower.grid import InProcessGrid

        trouble.clear()
        yield InProcessGrid(files, app), trouble


def check(study: Study, sites: Sequence[Path]) -> None:
    """Errors: ConfigError (a site file is wrong, two share a name, fewer than min_sites)."""
    files: dict[str, Path] = {}
    for path in sites:
        name = load_site(path).site.name
        if name in files:
            raise ConfigError(f"{files[name]} and {path}: both are called {name}", "its own name")
        files[name] = path
    if len(files) < study.strategy.min_sites:
        raise ConfigError(
            f"{len(files)} sites given", f"at least strategy.min_sites = {study.strategy.min_sites}"
        )
