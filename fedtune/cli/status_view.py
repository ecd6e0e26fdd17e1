"""Draw `fedtune status` from a status file and, at a site, from the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedtune.core import isolation
from fedtune.core.errors import FedtuneError, escape_controls
from fedtune.core.registry.rounding import rounded_up
from fedtune.evidence.told import Told, lines
from fedtune.observe.status import BY, GONE, Snapshot, reasons, standing
from fedtune.report.claim import THREE_EPSILONS
from fedtune.report.figures import duration, format_short, size_text
from fedtune.report.held_out import Shown

STYLES = {"running": "green", "done": "green", "waiting": "yellow", "stopped": "red", "gone": "red"}


def view(
    snapshot: Snapshot,
    budget: RenderableType | None = None,
    site: Path | None = None,
    told: Sequence[Told] = (),
    held_out: Shown | None = None,
) -> Group:
    """Draw for a terminal the status of a run, a coordinator or a site. The values of the status
    passed the checks of `read_status`, and are shown as plain text.

    - snapshot: the status as it was read from its file
    - budget: the site's budget, already drawn, for a site's status
    - site: the site.toml, for a site's status
    - told: figures that sites reported of a run's model
    - held_out: figures of the model on the sites' held-out records"""
    parts: list[RenderableType] = [head(snapshot)]
    if site is not None and (line := unsigned_line(snapshot, site)):
        parts.append(Text(line, style="bold yellow"))
    if site is not None and snapshot.held and not snapshot.over:
        line = f"an answer waits until a person here lets it go: fedtune let-go {site}"
        parts.append(Text(line, style="bold yellow"))
    studies = snapshot.studies
    if len(studies) > 1 or (studies and "study" not in snapshot.status):
        parts.append(studies_table(studies))
    if snapshot.status["sites"]:
        sites = snapshot.status["sites"]
        parts.append(sites_table(sites))
        if any({"epsilon", "planned"} <= site.keys() for site in sites.values()):
            figure = "paid" if snapshot.status["role"] == "site" else "reported"
            parts.append(Text(f"ε: {figure} of planned. {THREE_EPSILONS}", style="dim"))
    if budget is not None:
        parts.append(budget)
    parts.append(events_table(snapshot.status["last"]))
    if held_out is not None:
        parts.append(held_out_table(held_out))
        parts += [Text(escape_controls(line)) for line in held_out.lines]
    parts += [Text(escape_controls(line)) for line in lines(told)]
    return Group(*parts)


def head(snapshot: Snapshot) -> Text:
    status, line = snapshot.status, Text()
    line.append(str(status.get("study") or status["role"]), style="bold")
    line.append("  ")
    style = "red" if snapshot.failed and not snapshot.over else STYLES.get(snapshot.state, "")
    line.append(snapshot.words, style=style)
    if status.get("rounds"):
        line.append(f"  round {status.get('round', 0)}/{status['rounds']}")
    elif status.get("next"):
        line.append(f"  round {status.get('round', 0)}, next at {status['next']}")
    if status.get("champion") is not None:
        line.append(f"  version {status['champion']} is released")
    if status.get("private") is False:
        line.append("  NOT PRIVATE", style="bold red")
    for name, value in (status.get("quality") or {}).items():
        line.append(f"  {name} {format_short(value)}")
    if status.get("seconds") is not None:
        line.append(f"  {status['seconds']:.0f} s a round")
        if left := snapshot.seconds_left:
            line.append(f", about {duration(left)} left")
    for key in ("error", "reason"):
        if status.get(key) and status[key] not in BY:
            line.append(f"  {status[key]}", style="red")
    if snapshot.state == "gone":
        line.append(f"\n{GONE}")
    if status.get("address"):
        coordinator = "coordinator " if status["role"] == "site" else ""
        line.append(f"\n{coordinator}at {status['address']}")
    if status.get("fingerprint"):
        line.append(f", consortium {status['fingerprint']}")
    if status.get("confined"):
        line.append(f"\n{confined_text(status)}", style="bold red" if status.get("open") else "")
    line.append(f"\n{snapshot.folder}; last told {status.get('updated', '')}", style="dim")
    return line


def confined_text(status: Mapping[str, Any]) -> str:
    """Describe in one text by which means each half of a site (vault, courier) was confined when it
    last started, and how many ways to the outside stayed open. status: a status file's content."""
    halves = sorted(status["confined"].items())
    told = "; ".join(f"{half}: {isolation.describe(walls)}" for half, walls in halves)
    still_open = f"; {status['open']} OPEN, as its start and `fedtune doctor` say"
    return told + (still_open if status.get("open") else "")


def unsigned_line(snapshot: Snapshot, path: Path) -> str:
    """Return a line that says that nobody at a site has signed the plan that its client was sent,
    and how to read the plan. Return "" if somebody has signed it, or no client runs."""
    from fedtune.core.config import load_site

    status = snapshot.status
    if snapshot.over or status.get("signed") is not False or not status.get("plan_digest"):
        return ""
    plan = load_site(path).site.plan_file(status["plan_digest"])
    review = f"fedtune review {plan} --site {path}"
    if snapshot.unsigned:
        return f"nothing of this plan runs before a person here signs it: {review} --sign"
    return f"nobody here has signed this plan, which runs by policy.admission: {review}"


def _epsilon_of(site: dict[str, Any]) -> str:
    """Return as text a site's ε so far and the ε of the whole plan. With secure aggregation, a
    second line has the fallback ε, which the site's own noise alone gives."""
    spent, planned, fallback = (site.get(key) for key in ("epsilon", "planned", "fallback"))
    told = "–" if spent is None else rounded_up(spent)
    told += "" if planned is None else f" of {rounded_up(planned)}"
    return told if fallback is None else f"{told}\n{rounded_up(fallback)} whatever happens"


def sites_table(sites: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("site", "status", "reason"):
        table.add_column(name, overflow="fold")
    for name in ("missed", "ε", "sent", "received"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, site in sorted(sites.items()):
        table.add_row(
            Text(name),
            Text(standing(site)),
            Text(str(site.get("reason", ""))),
            str(site.get("missed", 0)),
            _epsilon_of(site),
            size_text(site.get("bytes_up")),
            size_text(site.get("bytes_down")),
        )
    return table


def studies_table(studies: Mapping[str, Snapshot]) -> Table:
    """Draw the studies of a coordinator's home, the oldest first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("study", overflow="fold")
    table.add_column("outcome", overflow="fold")
    for name in ("round", "ε", "deadline"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, study in studies.items():
        status = study.status
        rounds = str(status.get("round", 0))
        rounds += f"/{status['rounds']}" if status.get("rounds") else ""
        cost = "not private" if status.get("private") is False else _epsilon_of(status)
        table.add_row(
            Text(name),
            Text(", ".join([study.words, *reasons(study)]), style=STYLES.get(study.state, "")),
            rounds,
            cost,
            str(status.get("deadline") or "–"),
        )
    return table


def held_out_table(shown: Shown) -> Table:
    """Draw a table of the model's figures on the sites' held-out records, by class, group and
    site."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(escape_controls(shown.title)))
    for name in shown.head:
        table.add_column(escape_controls(name), overflow="fold")
    for row in shown.rows:
        table.add_row(*(Text(escape_controls(text)) for text in row))
    return table


def events_table(last: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for event in last:
        fields = {k: v for k, v in event.items() if k not in ("time", "event")}
        told = "  ".join(f"{key} {value}" for key, value in fields.items())
        table.add_row(
            Text(str(event.get("time", "")), style="dim"),
            Text(str(event.get("event", ""))),
            Text(told),
        )
    return table


class BudgetView:
    """A site's budget as `fedtune ledger` shows it. It is computed again only if the ledger,
    site.toml or a column of patients has changed."""

    def __init__(self, site: Path) -> None:
        self._site = site
        self._at: tuple[object, ...] | None = None
        self._shown: RenderableType = Text()

    def __call__(self) -> RenderableType:
        from fedtune.cli.ledger_view import budget_table
        from fedtune.core.config import load_site
        from fedtune.core.config.patient_columns import patient_columns
        from fedtune.core.ledger.spending import find_heaviest_budget
        from fedtune.homes.opening import find_ledger

        site = load_site(self._site)
        database = site.home / "ledger.db"
        written_at = database.stat().st_mtime_ns if database.exists() else 0
        columns = patient_columns(site)
        changed_at = (written_at, self._site.stat().st_mtime_ns, columns)
        if changed_at != self._at:
            try:
                if ledger := find_ledger(site.home):
                    name, cohorts = site.data.name, ledger.cohorts(site.data.name)
                    unit = "patient" if site.data.columns.patient else "record"
                    spent = ledger.spending(name, columns)
                    unknown = {each.seq for each in spent if not each.is_known_for(unit)}
                    heaviest = find_heaviest_budget(name, cohorts, site.policy)
                    self._shown = budget_table(replace(heaviest, known=not unknown))
                else:
                    self._shown = Text("no ledger yet: it begins with the first study")
            except FedtuneError as error:
                self._shown = Text(str(error), style="red")
            self._at = changed_at
        return self._shown
