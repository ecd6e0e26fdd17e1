"""Build the page of a coordinator: the consortium's members and certificates, the coordinator's
studies, and the run that it serves."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.core.errors import FedtuneError
from fedtune.dashboard.pages import Notice, Page
from fedtune.dashboard.pages.run import NOTHING, RunPage, alarms, ask, sites_of
from fedtune.dashboard.pages.runs import runs_in
from fedtune.flower import certs, enrol
from fedtune.observe.status import FILE, GONE, LOCK, Snapshot, read_status, reasons
from fedtune.runs.choice import RUNS

SOON_DAYS = 7  # a certificate with fewer days left raises an alarm; it is renewed when 10 are left


class CoordinatorPage(Page):
    """The dashboard's page of a coordinator's home, the folder with its keys and members. The
    coordinator's runs are found beside this folder, or in runs/ beside it. If the coordinator
    serves several studies, the page lists them, and each run has its own page."""

    kind = "coordinator"
    parts = RunPage.parts
    slow = ("acts",)

    def __init__(self, path: Path, trust: str = "") -> None:
        super().__init__(path, trust)
        self._pages: dict[Path, RunPage] = {}

    @property
    def title(self) -> str:
        return str(self._status().get("study") or self.path.resolve().name)

    def files(self) -> Iterable[Path]:
        names = (FILE, LOCK, "nodes", "leaves", "audit.jsonl")
        run = self.run()
        return [*(self.path / name for name in names), *(run.files() if run else ())]

    def slow_files(self) -> Iterable[Path]:
        return [self.path / "audit.jsonl"]

    def run(self) -> RunPage | None:
        """Return the page of the newest run of the study that this coordinator serves; None if the
        coordinator serves several studies, or this study has no run."""
        return self._run_pages().get(self._status().get("plan_digest"))

    def _run_pages(self) -> dict[str | None, RunPage]:
        """Return the page of each plan's newest run, by the plan's digest. The runs are looked for
        beside the home, and in runs/ beside the home."""
        beside = self.path.resolve().parent
        runs = [run for folder in (beside, beside / RUNS) for run in runs_in(folder)]
        newest = dict[str | None, RunPage]()
        for run in sorted(runs, key=lambda run: run.stat().st_mtime):
            if run != self.path.resolve() and (digest := _digest(run)):
                if run not in self._pages:
                    self._pages[run] = RunPage(run, self.trust)
                newest[digest] = self._pages[run]
        return newest

    def child(self, name: str) -> Page | None:
        runs = self._run_pages()
        own = {self._status().get("plan_digest"), *map(_plan_of, self._studies().values())}
        return next((runs[plan] for plan in own & runs.keys() if runs[plan].title == name), None)

    def _studies(self) -> dict[str, Snapshot]:
        snapshot = self._snapshot()
        return snapshot.studies if snapshot else {}

    def _rows(self) -> list[dict[str, Any]]:
        """Return a row for each study of this coordinator, the newest first: "name", "study" (its
        status), "link" (the name of its run's page, None if there is none) and "why" (the reasons
        why it was stopped, [] if it was not)."""
        rows, runs = [], self._run_pages()
        for name, study in reversed(self._studies().items()):
            run = runs.get(_plan_of(study))
            link = run.title if run else None
            rows.append({"name": name, "study": study, "link": link, "why": reasons(study)})
        return rows

    def series(self) -> dict[str, Any] | None:
        run = self.run()
        return run.series() if run else None

    def read_rounds(self) -> None:
        if run := self.run():
            run.read_rounds()

    def read_context(self) -> dict[str, Any]:
        snapshot, run = self._snapshot(), self.run()
        shown = run.read_context() if run else {}
        report = shown.get("report") or NOTHING
        members, notices = self._members(sites_of(snapshot, report))
        notices += shown.get("notices") or alarms(snapshot, report, sites_of(snapshot, report))
        home = shlex.quote(str(self.path))
        commands = [
            {"does": "Admit sites, by the fingerprint that each reads out",
             "line": f"fedtune admit *.request --home {home}"},
            {"does": "Go on after a stop",
             "line": f"fedtune server study.toml --home {home} --resume"},
            {"does": "End a site's part, also in the middle of a run",
             "line": f"fedtune revoke NAME --home {home}"},
        ]  # fmt: skip
        if run and report:
            commands += ask(run.path, shown["plan"])
        if shown.get("plan", {}).get("schedule") and run:
            line = f"fedtune versions {shlex.quote(str(run.path))} --rollback N"
            commands.append({"does": "Put an earlier version into use", "line": line})
        return {
            "notices": notices,
            "gone": GONE,
            **{k: v for k, v in shown.items() if k not in ("commands", "notices", "snapshot")},
            "snapshot": snapshot,
            "status": snapshot.status if snapshot else NOTHING,
            "members": members,
            "studies": self._rows(),
            "commands": commands,
            "run_path": run.path if run else None,
        }

    def _members(self, sites: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Notice]]:
        """Return two lists: a row for each site that takes part in the run, was admitted or was
        revoked; and the notices about certificates that expire soon. In a row, "days" says after
        how many days the site's certificate expires; it is None if this is not known. sites: the
        rows of the sites in the run (`sites_of`)."""
        rows, notices = {site["name"]: {**site, "days": None} for site in sites}, list[Notice]()
        empty = sites_of(None, {"privacy": {"sites": {"": {}}}})[0]
        for name, record in enrol.registry(self.path).items():
            leaf, row = None, rows.setdefault(name, {**empty, "name": name, "days": None})
            with suppress(FedtuneError):
                leaf = enrol.leaf_of(self.path, record)
            row["admitted"] = record.admitted
            if leaf is not None:
                row["days"] = (leaf.not_valid_after_utc - certs.read_clock()).days
                if row["days"] < SOON_DAYS:
                    text = f"{name}: its certificate ends in {row['days']} days"
                    notices.append(Notice("bad" if row["days"] < 0 else "warn", text))
        for record in enrol.list_revoked(self.path):
            row = rows.setdefault(record.name, {**empty, "name": record.name, "days": None})
            row["revoked"] = record.revoked
        return [rows[name] for name in sorted(rows)], notices

    def _snapshot(self) -> Snapshot | None:
        with suppress(FedtuneError):
            return read_status(self.path)
        return None

    def _status(self) -> dict[str, Any]:
        snapshot = self._snapshot()
        return snapshot.status if snapshot else {}


def _plan_of(study: Snapshot) -> str | None:
    return study.status.get("plan_digest")


def _digest(run: Path) -> str | None:
    with suppress(FedtuneError):
        return read_status(run).status.get("plan_digest")
    return None
