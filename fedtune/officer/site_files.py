"""Find and load the site files of a path."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedtune.core.config import Site, load_site
from fedtune.core.errors import ConfigError, InputError
from fedtune.core.files import reading


def sites_in(place: Path | Iterable[Path]) -> list[Path]:
    """List the paths of site files: those that are given and, for each folder that is given, its
    *.toml files and, one level down, its site*.toml files, sorted. Of a folder's files, only those
    with a [site] table count. Errors: ConfigError (a folder has no site file, or one that is
    broken)."""
    if not isinstance(place, Path):
        return [path for entry in place for path in sites_in(entry)]
    if place.is_file():
        return [place]
    site_files = [
        path
        for path in sorted([*place.glob("*.toml"), *place.glob("*/site*.toml")])
        if _is_site(path)
    ]
    if not site_files:
        raise ConfigError(f"{place}: no site file", "site.toml files, or a folder of them")
    return site_files


def load_sites(place: Path | str | Iterable[Path]) -> list[Site]:
    """Read every site of a folder: its *.toml files with a [site] table, and site*.toml one
    level down, in the order of their names; or read the files that are named.

    >>> import fedtune
    >>> study_file, site_file = fedtune.init("my-study")
    >>> [site.site.name for site in fedtune.load_sites(site_file.parent)]
    ['my-hospital']

    Errors: ConfigError if there is none, or one is broken."""
    return [load_site(path) for path in sites_in(Path(place) if isinstance(place, str) else place)]


def _is_site(path: Path) -> bool:
    try:
        return "site" in reading.toml_in(path, "a site.toml")
    except InputError:
        if path.name.startswith("site"):
            load_site(path)  # says what is wrong with it
        return False
