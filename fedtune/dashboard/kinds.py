"""Decide what a path is (a run, a site, a dossier, ...), and build the page that shows it."""

from __future__ import annotations

import os
from pathlib import Path

from fedtune.core.errors import InputError
from fedtune.core.files import reading
from fedtune.dashboard.pages import Page
from fedtune.dashboard.pages.coordinator import CoordinatorPage
from fedtune.dashboard.pages.release import ReleasePage
from fedtune.dashboard.pages.run import RunPage
from fedtune.dashboard.pages.runs import HOME, RUN, RunsPage, runs_in
from fedtune.dashboard.pages.site import SitePage

EXPECTED = "a run, a folder of runs, a coordinator's home, a site.toml or its folder, a dossier"


def page_of(path: Path, trust: str = "") -> Page:
    """Build the page for `path`, by the first line of this table that fits. trust: the consortium's
    fingerprint, by which a page verifies the signatures of a dossier or a run; "" if it is not
    known.

    | path                                          | page of          |
    | site.toml, or a folder with one               | a site           |
    | a folder with release.json or dossier.json    | a dossier        |
    | a folder with signing.key or nodes/           | a coordinator    |
    | a folder with plan.json or status.json        | a run            |
    | a folder that contains runs                   | a folder of runs |
    No file is read here, so an invalid site.toml raises its error only when the page reads it.
    Errors: InputError for anything else."""
    if why := reading.refuse_path(path):
        raise InputError(f"{str(path)[:80]}: {why}", EXPECTED)
    if not path.exists():
        raise InputError(f"{path}: not there", EXPECTED, "check the path")
    if path.is_file() and path.suffix == ".toml":
        return SitePage(path)

    def has(*names: str) -> bool:
        return any(os.path.lexists(path / name) for name in names)

    if has("site.toml"):
        return SitePage(path / "site.toml")
    if has("release.json", "dossier.json"):
        return ReleasePage(path, trust)
    if has(*HOME):
        return CoordinatorPage(path, trust)
    if has(*RUN):
        return RunPage(path, trust)
    if path.is_dir() and any(True for _ in runs_in(path)):
        return RunsPage(path, trust)
    raise InputError(
        f"{path}: holds nothing that the dashboard shows",
        EXPECTED,
        "name the folder that a run printed",
    )
