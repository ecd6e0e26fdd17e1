"""A whole study on one machine: the same server, the same client, the same bytes."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from fedtune.config import Study, load_site, load_study
from fedtune.errors import ConfigError

OnEvent = Callable[[str, dict[str, Any]], None]


def simulate(
    study_path: Path,
    sites: Sequence[Path],
    out: Path,
    *,
    resume: bool = False,
    on_event: OnEvent | None = None,
    engine: Literal["in-process", "ray"] = "in-process",
) -> dict[str, Any]:
    """Run a study over site files; returns the report's body.

    Sites answer one after another in this process; with engine "ray", in Flower's own runtime.
    Errors: as server.rounds.run; ConfigError where the sites cannot make up a study."""
    from server import rounds
    from server.parts import Parts

    study = load_study(study_path)
    check(study, sites)
    at_once = Parts(patience=0.0, pause=0.0)  # nobody is on the way: who fails now fails again
    if engine == "ray":
        from fedtune.flower.ray_engine import simulate_ray

        return simulate_ray(
            study, sites, out, resume=resume, on_event=on_event, parts=Parts(pause=1.0)
        )
    from fedtune.flower.grid import InProcessGrid

    grid = InProcessGrid([path.resolve() for path in sites])
    return rounds.run(grid, study, out, resume=resume, on_event=on_event, parts=at_once)


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


def sites_in(place: Path | Iterable[Path]) -> list[Path]:
    """Site files: those named, and of a folder every *.toml in it and every site*.toml one level
    down that has a [site] table, sorted. Errors: ConfigError where there is none, or one is broken.
    """
    if not isinstance(place, Path):
        return [path for each in place for path in sites_in(each)]
    if place.is_file():
        return [place]
    found = [
        path
        for path in sorted([*place.glob("*.toml"), *place.glob("*/site*.toml")])
        if _is_site(path)
    ]
    if not found:
        raise ConfigError(f"{place}: no site file", "site.toml files, or a folder of them")
    return found


def _is_site(path: Path) -> bool:
    try:
        return "site" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        if path.name.startswith("site"):
            load_site(path)  # says what is wrong with it
        return False
