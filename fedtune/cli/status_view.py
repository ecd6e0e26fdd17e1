"""Draw `fedtune status` from a status file and, at a site, from the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedtune.cli.console import _short, _size
from fedtune.errors import FedtuneError
from fedtune.observe.status import Snapshot
from fedtune.report.claim import rounded_up

STYLES = {"running": "green", "done": "green", "waiting": "yellow", "stopped": "red", "gone": "red"}
GONE = "its process is no more; start it again (a coordinator: with --resume)"


def view(snapshot: Snapshot, budget: RenderableType | None = None) -> Group:
    """Draw a status. Values are those that read_status let through, and are shown as text."""
    parts: list[RenderableType] = [head(snapshot)]
    if snapshot.status["sites"]:
        parts.append(sites_table(snapshot.status["sites"]))
    if budget is not None:
        parts.append(budget)
    parts.append(events_table(snapshot.status["last"]))
    return Group(*parts)


def head(snapshot: Snapshot) -> Text:
    status, line = snapshot.status, Text()
    line.append(str(status.get("study") or status["role"]), style="bold")
    line.append("  ")
    line.append(snapshot.state, style=STYLES.get(snapshot.state, ""))
    if status.get("rounds"):
        line.append(f"  round {status.get('round', 0)}/{status['rounds']}")
    elif status.get("next"):
        line.append(f"  round {status.get('round', 0)}, next at {status['next']}")
    if status.get("champion") is not None:
        line.append(f"  version {status['champion']} is released")
    if status.get("private") is False:
        line.append("  NOT PRIVATE", style="bold red")
    for name, value in (status.get("quality") or {}).items():
        line.append(f"  {name} {_short(value)}")
    if status.get("seconds") is not None:
        line.append(f"  {status['seconds']:.0f} s a round")
    if status.get("error"):
        line.append(f"  {status['error']}", style="red")
    if snapshot.state == "gone":
        line.append(f"\n{GONE}")
    line.append(f"\n{snapshot.folder}; last told {status.get('updated', '')}", style="dim")
    return line


def sites_table(sites: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("site", "status", "reason"):
        table.add_column(name)
    for name in ("missed", "ε", "sent", "received"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, site in sorted(sites.items()):
        table.add_row(
            Text(name),
            Text(str(site.get("status", ""))),
            Text(str(site.get("reason", ""))),
            str(site.get("missed", 0)),
            rounded_up(site["epsilon"]) if site.get("epsilon") is not None else "–",
            _size(site.get("bytes_up")),
            _size(site.get("bytes_down")),
        )
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
    """A site's budget as `fedtune ledger` shows it, composed anew only when the ledger changed."""

    def __init__(self, site: Path) -> None:
        self._site = site
        self._at: tuple[int, int] | None = None
        self._shown: RenderableType = Text("no ledger yet: it begins with the first study")

    def __call__(self) -> RenderableType:
        from fedtune.cli.ledger_view import budget_table
        from fedtune.config import load_site
        from fedtune.ledger.ledger import Ledger
        from fedtune.ledger.spending import heaviest

        site = load_site(self._site)
        database = site.site.state / "ledger.db"
        if not database.exists():
            return self._shown
        changed_at = (database.stat().st_mtime_ns, self._site.stat().st_mtime_ns)
        if changed_at != self._at:
            try:
                cohorts = Ledger(site.site.state).cohorts(site.data.name)
                self._shown = budget_table(heaviest(site.data.name, cohorts, site.policy))
            except FedtuneError as error:
                self._shown = Text(str(error), style="red")
            self._at = changed_at
        return self._shown
