"""Show a running study: a progress bar and permanent lines; without a terminal, plain lines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from fedtune.cli.pace import RoundsPace, StepPace
from fedtune.core.progress import Step, listening
from fedtune.core.registry.rounding import rounded_up
from fedtune.report.figures import duration, format_short, size_text

LINE_SECONDS = 30.0  # pause between two plain lines of one step
WIDE = 110  # columns of a screen on which a bar fits beside the words
QUIET_SECONDS = 10.0  # without a line for so long, a site's step of a round is printed too
COLUMNS = (
    2  # figures of a round on the screen: the metric and the loss; the rest is in metrics.jsonl
)
LINKS = ("admitted", "revoked", "connected", "disconnected")  # with a site's name at a coordinator


@dataclass(frozen=True)
class Cell:
    """A cell in the table of rounds, with the heading of its column and the column's width."""

    head: str
    text: str
    width: int = 9


class Watch:
    """Draws the events of a run (`on_event`); use it as a context manager. Without a terminal, the
    text of the bar is printed as a line when it changes, and again at most every LINE_SECONDS while
    it stays the same.

    hold: whether the sites' refusals are kept back until a round or the run ends; at the run's end,
    those whose reason the run's error states are left out.

    Site names and reasons come from other machines, so they are shown as plain text."""

    def __init__(self, console: Console, title: str, *, hold: bool = False) -> None:
        self.console, self._title = console, title
        self._columns: list[str] | None = None  # of the table of rounds; None before its header
        self._hold = hold
        self._held: list[tuple[str, str]] = []  # line, reason
        self._last, self._at = "", 0.0  # the last plain line, and when
        self._done = 0  # rounds before this command's first
        self._rounds, self._step = RoundsPace(), StepPace()
        self._lines: dict[str, float] = {}  # when each long step was last printed
        self._budget: float | None = None  # ε of the whole plan
        # A narrow screen has no bar, and cuts words, but never the share done or the time left.
        words = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        bar = [BarColumn(bar_width=24)] if console.width >= WIDE else []
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=words),
            *bar,
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task(escape(title), total=None, count="")

    def __enter__(self) -> Watch:
        self._bar.start()
        self._print_line(self._title)
        self._heard = listening(self._long)
        self._heard.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._heard.__exit__(kind, error, trace)
        self._bar.stop()
        self._release_held(str(error))

    def _long(self, step: Step) -> None:
        """Show a report of a long step. Without a terminal, print it only if nothing was printed
        for QUIET_SECONDS, and the same step not for LINE_SECONDS."""
        now, text = time.monotonic(), step.text
        self._rounds.hear(step, now)
        seconds = self._step.estimate_remaining(step, now)
        share = "" if step.share is None else f"{step.share:.0%}"
        share += f", {duration(seconds)} left" if seconds else ""
        said = max(self._at + QUIET_SECONDS, self._lines.get(text, -LINE_SECONDS) + LINE_SECONDS)
        if now >= said:
            self._lines[text] = now
            self._print_line(text, share)
        self._bar.update(
            self._task, description=escape(text), total=step.total or None, completed=step.done,
            count=share,
        )  # fmt: skip

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        if event == "site":
            self._site(data)
        elif event == "round":
            self._release_held("")
            self._round(data)
        elif event in ("answered", "refused", "failed"):
            self._show_answer(event, data)
        elif event == "records":
            text = " ".join(str(data.get("text")).split())
            self._stay(text, style="bold yellow" if "WARNING: " in text else None)
        elif event == "done":
            pass  # the closing lines say so
        elif event in ("listening", "ready") or (event in LINKS and "name" in data):
            self._stay(str(data.get("text") or event))
        elif event == "planned":
            self._show_plan(data)
        elif event == "begin":
            self._rounds.begin(time.monotonic())
        elif event == "start":
            self._done, self._rounds = int(data.get("done") or 0), RoundsPace()
            self._bar.update(self._task, total=data.get("rounds"), completed=self._done)
        else:
            self._other(event, data)

    def _other(self, event: str, data: dict[str, Any]) -> None:
        """Show an event that has no form of its own: its "text" (else its name) and, if it has
        "done" and "total", how much is done."""
        text = str(data.get("text") or event)
        done, total = data.get("done"), data.get("total")
        count = f"{done:,}/{total:,}" if done is not None and total else ""
        self._print_line(text, f"{done / total:.0%}" if done is not None and total else "")
        self._bar.update(
            self._task, description=escape(text), total=total, completed=done or 0, count=count
        )

    def _site(self, data: dict[str, Any]) -> None:
        name, status, reason = (str(data.get(k) or "") for k in ("name", "status", "reason"))
        if reason or status in ("refused", "failed", "dropped", "missing"):
            line = f"{name}: {status}" + (f": {reason}" if reason else "")
            self._held.append((" ".join(line.split()), reason))
            if not self._hold:
                self._release_held("")
        else:
            line = f"{name}: {status}"
            if time.monotonic() - self._at >= QUIET_SECONDS:
                self._print_line(f"round {data['round']}: {line}" if "round" in data else line)
            self._bar.update(self._task, description=escape(line))

    def _release_held(self, error_text: str) -> None:
        """Print the sites' refusals that were kept back, except those whose reason is part of
        `error_text`, the text of the run's error."""
        held, self._held = self._held, []
        for line, reason in dict.fromkeys(held):
            if not (error_text and reason and reason in error_text):
                self.console.print(line, style="yellow", markup=False, soft_wrap=True)

    def _print_line(self, text: str, share: str = "") -> None:
        """Without a terminal, print a line of progress. share: the part that is done, in per cent
        and never as a count, since a service's log must not keep counts of a site's records."""
        if self.console.is_terminal:
            return
        now = time.monotonic()
        if text != self._last or now - self._at >= LINE_SECONDS:
            self._last, self._at = text, now
            line = " ".join(f"{text} {share}".split())
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _stay(self, text: str, style: str | None = None) -> None:
        """Print text that stays on the screen; on a terminal it stands above the bar, whose words
        keep changing."""
        for line in text.split("\n"):
            self.console.print(
                line.rstrip(), style=style, markup=False, highlight=False, soft_wrap=True
            )
        self._last, self._at = "", time.monotonic()

    def _show_plan(self, data: dict[str, Any]) -> None:
        """Print who takes part, which round is next, and what the plan costs."""
        rounds, names = data.get("rounds"), [str(name) for name in data.get("participants") or ()]
        budget = max((data.get("planned") or {}).values(), default=None)
        self._budget = budget
        of = f" of {rounds}" if rounds else ""
        cost = "" if budget is None else f"; planned: ε = {rounded_up(budget)}"
        self._stay(
            f"{data.get('study')}: {', '.join(names)} take part; round {self._done + 1}{of} is "
            f"next{cost}"
        )

    def _describe_time_left(self, left: int, data: dict[str, Any]) -> str:
        """Return as text the time that the `left` remaining rounds will take, or "" if it is
        unknown. The text begins with ≤ if public records choose each step, since they may end the
        study before its last round."""
        seconds = self._rounds.end_round(left, time.monotonic())
        bound = "≤ " if data.get("selection") else ""
        return f"{bound}{duration(seconds)}" if seconds else ""

    def _show_answer(self, event: str, data: dict[str, Any]) -> None:
        """Print a line that stays, about what a site did; then let the bar say that it waits for
        work."""
        bad = data.get("status") in ("refused", "failed", "waiting") or event != "answered"
        bad = bad or data.get("signed") is False
        line = " ".join(str(data.get("text") or event).split())
        self._at = time.monotonic()
        style = "yellow" if bad else None
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
        self._last = ""
        self._bar.update(self._task, description="waiting for work", total=None, count="")

    def _round(self, data: dict[str, Any]) -> None:
        quality, spent = data.get("quality") or {}, data.get("epsilon") or {}
        quality = {f"sel. {n}": v for n, v in (data.get("selection") or {}).items()} or quality
        columns = list(quality)[:COLUMNS] or self._columns or []  # "–" where nothing was measured
        done, total = int(data.get("round", 0)), int(data.get("rounds") or 0)
        left = self._describe_time_left(max(0, total - done), data)
        trained = data.get("participants") or []
        count = len(trained) if isinstance(trained, list | tuple | set) else int(trained)
        budget = "" if self._budget is None else rounded_up(self._budget)
        cells = [Cell("round", f"{done:>3}/{total:<3}" if total else str(done), 7)]
        cells += [Cell(name[:13], format_short(quality.get(name)), 14) for name in columns]
        cells += [
            Cell("ε", rounded_up(max(spent.values(), default=None))),
            Cell("planned" if budget else "", budget),
            Cell("trained", str(count)),
            Cell("sent", size_text(data.get("bytes"))),
            Cell("left", left),
        ]
        # On a narrow screen, figures that metrics.jsonl holds too are left out, but never ε.
        for name in ("sent", "trained", "", "planned", *(name[:13] for name in columns[:0:-1])):
            if sum(cell.width for cell in cells) > self.console.width:
                cells = [cell for cell in cells if cell.head != name]
        if columns != self._columns:
            self._columns = columns
            head = "".join(f"{cell.head:>{cell.width}}" for cell in cells)
            self.console.print(head, style="bold")
        row = "".join(f"{cell.text:>{cell.width}}" for cell in cells)
        self.console.print(row.rstrip(), highlight=False)
        self._at = time.monotonic()
        shown = f"{done}/{total}" if total else f"{done}"
        self._bar.update(
            self._task, total=total or None, completed=done, count=shown, description="training"
        )
