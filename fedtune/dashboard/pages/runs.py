"""Build the page of a folder of runs: the result and the ε of each run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedtune.dashboard.pages import Page
from fedtune.dashboard.pages.run import RunPage

# Files by which a coordinator's home, and a run's folder, are recognised.
HOME, RUN = ("signing.key", "nodes"), ("plan.json", "status.json")
MOST = 500  # largest number of runs in the table


def runs_in(folder: Path) -> Iterator[Path]:
    """Yield the runs in a folder, sorted by name. A coordinator's home is left out, although it has
    a plan.json, too."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        is_home = any((path / name).exists() for name in HOME)
        if not is_home and any((path / name).is_file() for name in RUN):
            yield path


class RunsPage(Page):
    """The dashboard's page of a folder of runs."""

    kind = "runs"
    parts = ("top",)

    def __init__(self, path: Path, trust: str = "") -> None:
        super().__init__(path, trust)
        self._pages: dict[str, RunPage] = {}

    @property
    def title(self) -> str:
        return self.path.resolve().name

    def files(self) -> Iterable[Path]:
        for run in runs_in(self.path):
            yield from (run / name for name in ("status.json", "status.lock", "report.json"))

    def read_context(self) -> dict[str, Any]:
        pages = [self._page(run.name) for run in [*runs_in(self.path)][:MOST]]
        return {"runs": [{"name": page.title, **page.read_context()} for page in pages if page]}

    def child(self, name: str) -> Page | None:
        return self._page(name)

    def _page(self, name: str) -> RunPage | None:
        if name not in self._pages:
            if name not in {run.name for run in runs_in(self.path)}:
                return None  # no such run; this also refuses a name that leads out of the folder
            self._pages[name] = RunPage(self.path / name, self.trust)
        return self._pages[name]
