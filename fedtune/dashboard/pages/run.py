"""Build the page of a run, while the run trains and when it is finished: progress, quality, and the
cost for each site."""

from __future__ import annotations

import math
import shlex
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.core.errors import FedtuneError, InputError
from fedtune.core.registry.metrics import metric as known_metric
from fedtune.core.registry.reasons import HELD, WAITING, reason_of
from fedtune.core.registry.rounding import number, percent
from fedtune.core.run_folder import ANSWERS, load_plan
from fedtune.dashboard.pages import Notice, Page
from fedtune.dashboard.pages.answers import answers_in
from fedtune.evidence.told import FOLDER as TOLD
from fedtune.evidence.told import read_told
from fedtune.observe.log import LOGGABLE
from fedtune.observe.rounds import Rounds
from fedtune.observe.status import FILE, GONE, LOCK, Snapshot, read_status, standing
from fedtune.report.claim import THREE_EPSILONS, best_guess, protects, shared_line
from fedtune.report.classes import HEAD as CLASSES
from fedtune.report.classes import class_lines, class_rows
from fedtune.report.gain import advice, headline, is_start_released, over_start
from fedtune.report.held_out import write_shown
from fedtune.report.preference import alarms as preference_alarms
from fedtune.report.quality import intervals
from fedtune.report.run_files import read_report

NOTHING: dict[str, Any] = {}


class RunPage(Page):
    """The dashboard's page of a run."""

    kind = "run"
    parts = (*Page.parts, "answers")
    slow = ("verified", "versions")

    def __init__(self, path: Path, trust: str = "") -> None:
        super().__init__(path, trust)
        self.rounds, self._reading = Rounds(path), threading.Lock()

    @property
    def title(self) -> str:
        return self.path.resolve().name

    def files(self) -> Iterable[Path]:
        names = [FILE, LOCK, "metrics.jsonl", "report.json", "plan.json", ANSWERS]
        return [self.path / name for name in (*names, "versions/index.json", TOLD)]

    def slow_files(self) -> Iterable[Path]:
        names = ("report.json", "signature.json", "evidence.json", "versions/index.json")
        return [self.path / name for name in names]

    def read_context(self) -> dict[str, Any]:
        snapshot: Snapshot | None = None
        report, notices = NOTHING, list[Notice]()
        with suppress(FedtuneError):
            snapshot = read_status(self.path)
        if (self.path / "report.json").exists():
            try:
                report = read_report(self.path)
            except InputError as error:
                notices.append(Notice("warn", str(error)))
        plan = self._plan()
        quality = _quality(snapshot, report, plan)
        sites = sites_of(snapshot, report)
        privacy = _privacy(sites, report, plan)
        notices += alarms(snapshot, report, sites)
        return {
            "snapshot": snapshot,
            "status": snapshot.status if snapshot else NOTHING,
            "report": report,
            "plan": plan,
            "quality": quality,
            "privacy": privacy,
            "sites": sites,
            "notices": notices,
            "newest": list(self.rounds.newest)[::-1],
            "count": len(self.rounds),
            "bytes": {
                way: sum(site[f"bytes_{way}"] or 0 for site in sites) for way in ("up", "down")
            },
            "answers": answers_in(self.path),
            "told": read_told(self.path),
            "held_out": write_shown(report),
            "facts": _facts(plan, report),
            "commands": self._commands(snapshot, report, plan),
            "three_epsilons": THREE_EPSILONS,
            "gone": GONE,
        }

    def series(self) -> dict[str, Any]:
        """Return what the page's script needs to draw the curves by round: "rounds" (the numbers of
        the rounds), "quality", "selection" and "epsilon" (curve's name -> curve), and further
        values by name. Each curve is a list with one number for each round, or None where nothing
        was measured in the round."""
        self.read_rounds()
        rounds, shown = self.rounds, self.read_context()
        quality = {name: _plain(values) for name, values in rounds.quality.items()}
        metric = shown["quality"].get("metric")
        epsilon = {name: _plain(values) for name, values in rounds.epsilon.items()}
        if not epsilon and len(rounds):
            epsilon = {"largest": _plain(rounds.largest), "smallest": _plain(rounds.smallest)}
        return {
            "rounds": list(rounds.number),
            "metric": metric,
            "quality": quality,
            "selection": {name: _plain(values) for name, values in rounds.selection.items()},
            "base": shown["quality"].get("base") or {},
            "start": shown["quality"].get("starts") or {},
            "intervals": {
                # The curve is that of the trained model, even if the public start is released.
                name: bounds | ({"after": bounds["trained"]} if "trained" in bounds else {})
                for name, bounds in (shown["quality"].get("intervals") or {}).items()
            },
            "bounded": [name for name in quality if known_metric(name).bounded],
            "epsilon": epsilon,
            "planned": shown["privacy"].get("planned"),
        }

    def read_rounds(self) -> None:
        with self._reading:
            self.rounds.refresh()

    def _plan(self) -> dict[str, Any]:
        with suppress(FedtuneError):
            return load_plan(self.path).model_dump(mode="json")
        return {}

    def _commands(
        self, snapshot: Snapshot | None, report: dict[str, Any], plan: dict[str, Any]
    ) -> list[dict[str, str]]:
        run = shlex.quote(str(self.path))
        if report:
            out = shlex.quote(f"{self.title}-model")
            return [
                *ask(self.path, plan),
                {"does": "Prove its ε from what the sites signed", "line": f"fedtune verify {run}"},
                {
                    "does": "Write a model for transformers",
                    "line": f"fedtune export {run} --out {out}",
                },
                {
                    "does": "Write a dossier for an ethics board",
                    "line": f"fedtune release {run} --out {shlex.quote(self.title + '-dossier')}",
                },
            ]
        if snapshot and snapshot.state in ("stopped", "gone"):
            line = f"fedtune server study.toml --out {run} --resume"
            return [{"does": "Go on after its last whole round", "line": line}]
        return [{"does": "The same in a terminal", "line": f"fedtune status {run}"}]


def ask(run: Path, plan: dict[str, Any]) -> list[dict[str, str]]:
    """Return the entry for `fedtune answers` in the page's list of commands. This command puts the
    same prompts to the base and to the trained model. The result is a list of one dict with "does",
    a text for people, and "line", the command line. Return [] if the answers exist already, or the
    plan has no [evaluation]. run: the run's folder; plan: the content of its plan.json."""
    if not plan.get("evaluation") or (run / ANSWERS).exists():
        return []
    line = f"fedtune answers {shlex.quote(str(run))}"
    return [{"does": "Ask base and model the same prompts, shown here", "line": line}]


def sites_of(snapshot: Snapshot | None, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each site, sorted by name, with the site's values in the run's status and in
    its report. A value that is in neither is None.

    - snapshot: the run's status; None if it cannot be read
    - report: the content of report.json; {} if there is none yet"""
    by_status = snapshot.status["sites"] if snapshot else {}
    by_report = (report.get("privacy") or {}).get("sites") or {}
    absences = report.get("absences") or {}
    rows = []
    for name in sorted(by_status.keys() | by_report.keys()):
        status, told = by_status.get(name, {}), by_report.get(name, {})
        spent, planned = told.get("epsilon", status.get("epsilon")), status.get("planned")
        rows.append(
            {
                "name": name,
                "standing": standing(status),
                "reason": reason_of(str(status.get("reason") or "")),
                "connected": status.get("connected"),
                "missed": status.get("missed", (absences.get(name) or {}).get("rounds", 0)),
                "epsilon": number(spent),
                "planned": number(planned),
                "sigma": number(told.get("noise_multiplier")),
                "rate": number(told.get("sampling_rate")),
                "steps": number(told.get("steps")),
                "bytes_up": status.get("bytes_up"),
                "bytes_down": status.get("bytes_down"),
            }
        )
    return rows


def alarms(
    snapshot: Snapshot | None, report: dict[str, Any], sites: list[dict[str, Any]]
) -> list[Notice]:
    """List the alarms of a run: no privacy, a worse model, a stop, and problems of sites.

    - snapshot: the run's status; None if it cannot be read
    - report: the content of report.json; {} if there is none yet
    - sites: the rows of the sites, from `sites_of`"""
    found, quality = [], report.get("quality") or {}
    if report.get("private") is False or (snapshot and snapshot.status.get("private") is False):
        found.append(
            Notice("bad", "NOT PRIVATE: no noise was added; the adapter may reveal records")
        )
    for line in headline(quality):
        if " worse than " in line.text:
            found.append(Notice("bad", f"{line.text[:1].upper()}{line.text[1:]}"))
    found += [Notice("warn", f"{line[:1].upper()}{line[1:]}") for line in class_lines(quality)]
    if more := advice(report):
        found.append(Notice("warn", f"{more[:1].upper()}{more[1:]}"))
    found += [Notice("warn", alarm) for alarm in preference_alarms(quality)]
    if snapshot and snapshot.state == "gone":
        found.append(Notice("bad", f"Killed: {GONE}"))
    elif snapshot and snapshot.state == "stopped":
        why = ", ".join(filter(None, (snapshot.status.get(k) for k in ("error", "reason"))))
        found.append(
            Notice("bad", f"Stopped before the study was done: {why or 'no reason given'}")
        )
    for site in sites:
        if site["reason"].startswith("policy.max_epsilon"):
            found.append(Notice("bad", f"{site['name']} is out of budget ({site['reason']})"))
        elif site["standing"].startswith(WAITING):
            does = "let an answer go" if HELD in site["reason"] else "sign the plan"
            found.append(Notice("warn", f"{site['name']} waits for a person there to {does}"))
        elif "refused" in site["standing"]:
            found.append(Notice("warn", f"{site['name']} refused the plan ({site['reason']})"))
        elif "clock" in site["reason"] or "certificate" in site["reason"]:
            found.append(Notice("bad", f"{site['name']}: {site['reason']}"))
        if site["epsilon"] and site["planned"] and site["epsilon"] > site["planned"] + 1e-6:
            found.append(Notice("warn", f"{site['name']} reported more ε than was planned"))
    return found


def _quality(
    snapshot: Snapshot | None, report: dict[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    """Return the values of the page's part on quality, by name. "rows" has a row for each metric,
    with the figures and intervals of the base and of the trained model. While the run continues,
    the trained model is that of the newest measured round. Return {} for a run without a metric.

    - snapshot: the run's status; None if it cannot be read
    - report: the content of report.json; {} if there is none yet
    - plan: the content of plan.json; {} if it cannot be read"""
    quality = report.get("quality") or {}
    metric = quality.get("metric") or (plan.get("evaluation") or {}).get("metric")
    if metric is None:
        return {}
    before, after = quality.get("before"), quality.get("after")
    before = before if isinstance(before, dict) else {metric: before}
    after = after if isinstance(after, dict) else {metric: after}
    newest = (snapshot.status.get("quality") if snapshot else None) or {}
    after = after if report else newest
    names = [name for name in dict.fromkeys([metric, *after, *before]) if name in LOGGABLE]
    rows = [
        {
            "name": name,
            "before": number(before.get(name)),
            "after": number(after.get(name)),
            "better": "higher" if known_metric(name).higher_is_better else "lower",
            "intervals": intervals(quality, name),
        }
        for name in names
    ]
    return {
        "metric": metric,
        "rows": rows,
        "headline": headline(quality),
        "over_start": over_start(quality),
        "classes": class_rows(quality),
        "class_head": CLASSES,
        "starts": {k: n for k, v in (quality.get("start") or {}).items() if (n := number(v))},
        "records": (quality.get("gain") or {}).get("records"),
        "base": {row["name"]: row["before"] for row in rows if row["before"] is not None},
        "intervals": {row["name"]: row["intervals"] for row in rows},
        "released": "public text alone" if is_start_released(quality) else "",
    }


def _privacy(
    sites: list[dict[str, Any]], report: dict[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    """Return the values of the page's part on privacy, by name: the largest ε of a site so far, the
    planned ε, δ, the unit, and texts that explain them. Return {"off": True} for a run without
    privacy.

    - sites: the rows of the sites, from `sites_of`
    - report: the content of report.json; {} if there is none yet
    - plan: the content of plan.json; {} if it cannot be read"""
    table = plan.get("privacy")
    told = report.get("privacy") or {}
    if table == "off" or report.get("private") is False:
        return {"off": True}
    table = table if isinstance(table, dict) else {}
    spent = [site["epsilon"] for site in sites if site["epsilon"] is not None]
    planned = [site["planned"] for site in sites if site["planned"] is not None]
    unit = told.get("unit") or table.get("unit") or "record"
    epsilon = number(told.get("epsilon")) if told else max(spent, default=None)
    return {
        "epsilon": epsilon,
        "planned": max(planned, default=number(table.get("epsilon"))),
        "delta": told.get("delta", table.get("delta")),
        "unit": unit,
        "protects": protects(unit),
        "guess": percent(best_guess(told)) if told else "",
        "shared": shared_line(told),
    }


def _facts(plan: dict[str, Any], report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the public facts about a run, such as base and objective, as pairs of label and value.
    A fact is left out if neither plan.json nor report.json has it. plan, report: the contents of
    these two files."""
    base = report.get("base") or plan.get("base") or {}
    adapter = plan.get("lora") or {}
    pairs = [
        ("Study", (plan.get("study") or {}).get("name") or report.get("study")),
        ("Plan", report.get("plan_digest")),
        ("Base", base.get("name") or base.get("model")),
        ("Objective", (plan.get("objective") or {}).get("name")),
        ("Strategy", (plan.get("strategy") or {}).get("name")),
        ("LoRA rank", adapter.get("rank")),
        ("fedtune", report.get("fedtune")),
    ]
    return [(label, str(value)) for label, value in pairs if value]


def _plain(values: Iterable[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
