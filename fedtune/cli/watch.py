"""A run while it goes on: a bar and the lines that stay; without a terminal, plain lines."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fedtune.progress import listening
from fedtune.report.claim import rounded_up
from fedtune.report.figures import duration, short, size_text

LINE_SECONDS = 30.0  # between two plain lines of one step
QUIET_SECONDS = 10.0  # without any line: then also a site's step of a round
COLUMNS = (
    2  # figures of a round on the screen: the metric and the loss; the rest is in metrics.jsonl
)
LINKS = ("admitted", "revoked", "connected", "disconnected")  # with a name: at a coordinator


class Watch:
    """Draws the events of a run (`on_event`); use as a context manager. Where no terminal is, the
    bar's words are lines, each once and at most every LINE_SECONDS as they go on.

    hold: refusals wait for the end of the run, which may say them itself.
    Site names and reasons come from other machines: they are shown as plain text."""

    def __init__(self, console: Console, title: str, *, hold: bool = False) -> None:
        self.console, self._title = console, title
        self._columns: list[str] | None = None  # of the table of rounds; None: no header yet
        self._hold = hold
        self._held: list[tuple[str, str]] = []  # line, reason
        self._last, self._at = "", 0.0  # the last plain line, and when
        self._done, self._began = 0, 0.0  # the rounds before those timed; when these began, else 0
        self._first = True  # whether the first round here is yet to end
        self._step_at = ("", 0, 0.0)  # a long step, what was done of it when it was heard of, when
        self._lines: dict[str, float] = {}  # when each long step was last a plain line
        self._budget: float | None = None  # ε of the whole plan
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
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

    def _long(self, text: str, done: int, total: int) -> None:
        """A report of a long step: in a pipe a line where there was none for QUIET_SECONDS."""
        now = time.monotonic()
        if text != self._step_at[0] or done < self._step_at[1]:
            self._step_at = (text, done, now)
        _, first, began = self._step_at
        left = ""
        if now - began >= QUIET_SECONDS and first < done < total:  # long enough for a pace
            left = f", {duration((now - began) / (done - first) * (total - done))} left"
        said = max(self._at + QUIET_SECONDS, self._lines.get(text, -LINE_SECONDS) + LINE_SECONDS)
        if now >= said:
            self._lines[text] = now
            self._print_line(text, f"{done / total:.0%}{left}")
        self._bar.update(
            self._task, description=escape(text), total=total, completed=done,
            count=f"{done:,}/{total:,}{left}",
        )  # fmt: skip

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        if event == "site":
            self._site(data)
        elif event == "round":
            self._release_held("")
            self._round(data)
        elif event in ("answered", "refused", "failed"):
            self._answered(event, data)
        elif event == "records":
            self._stay(" ".join(str(data.get("text")).split()))
        elif event == "done":
            pass  # the closing lines say so
        elif event == "listening" or (event in LINKS and "name" in data):
            self._stay(str(data.get("text") or event))
        elif event == "planned":
            self._planned(data)
        elif event == "begin":
            self._began = self._began or time.monotonic()
        elif event == "start":
            self._done, self._began, self._first = int(data.get("done") or 0), 0.0, True
            self._bar.update(self._task, total=data.get("rounds"), completed=self._done)
        else:
            self._step(event, data)

    def _step(self, event: str, data: dict[str, Any]) -> None:
        """Any other step: {"text", "done", "total"}, each optional."""
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
        """Print the lines held back, except those whose reason `error_text` contains."""
        held, self._held = self._held, []
        for line, reason in dict.fromkeys(held):
            if not (error_text and reason and reason in error_text):
                self.console.print(line, style="yellow", markup=False, soft_wrap=True)

    def _print_line(self, text: str, share: str = "") -> None:
        """share: in per cent, since a service's log keeps no count of a site's records."""
        if self.console.is_terminal:
            return
        now = time.monotonic()
        if text != self._last or now - self._at >= LINE_SECONDS:
            self._last, self._at = text, now
            line = " ".join(f"{text} {share}".split())
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _stay(self, text: str) -> None:
        """Print what stays on a terminal too."""
        for line in text.split("\n"):
            self.console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
        self._last, self._at = "", time.monotonic()

    def _planned(self, data: dict[str, Any]) -> None:
        """Say who takes part, which round is next, and what the plan costs."""
        rounds, names = data.get("rounds"), [str(name) for name in data.get("participants") or ()]
        budget = max((data.get("planned") or {}).values(), default=None)
        self._budget = budget
        of = f" of {rounds}" if rounds else ""
        cost = "" if budget is None else f"; planned: ε = {rounded_up(budget)}"
        self._stay(
            f"{data.get('study')}: {', '.join(names)} take part; round {self._done + 1}{of} is "
            f"next{cost}"
        )

    def _left(self, done: int, total: int) -> str:
        """The time that the rounds to come will take, as long as those timed did on average. The
        first round here reads the records through the frozen layers and those after it do not: what
        follows from it alone is a bound."""
        now, ran = time.monotonic(), done - self._done
        if not total or ran < 1 or done >= total or not self._began:
            return ""
        left = duration((now - self._began) / ran * (total - done))
        if self._first:
            self._done, self._began, self._first = done, now, False
            return f"< {left}"
        return left

    def _answered(self, event: str, data: dict[str, Any]) -> None:
        """What a site did: a line that stays, and the bar waits again."""
        bad = data.get("status") in ("refused", "failed") or event != "answered"
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
        if columns != self._columns:
            self._columns = columns
            head = "".join(f"{n[:13]:>14}" for n in columns)
            of = "planned" if self._budget is not None else ""
            self.console.print(
                f"{'round':>7}{head}{'ε':>9}{of:>9}{'trained':>9}{'sent':>9}{'left':>9}",
                style="bold",
            )
        done, total = int(data.get("round", 0)), int(data.get("rounds") or 0)
        numbers = "".join(f"{short(quality.get(n)):>14}" for n in columns)
        epsilon = max(spent.values(), default=None)
        budget = "" if self._budget is None else rounded_up(self._budget)
        trained = data.get("participants") or []
        count = len(trained) if isinstance(trained, list | tuple | set) else int(trained)
        count_of = f"{done:>3}/{total:<3}" if total else f"{done:>7}"
        self.console.print(
            f"{count_of}{numbers}{rounded_up(epsilon):>9}{budget:>9}{count:>9}"
            f"{size_text(data.get('bytes')):>9}{self._left(done, total):>9}".rstrip(),
            highlight=False,
        )
        self._at = time.monotonic()
        shown = f"{done}/{total}" if total else f"{done}"
        self._bar.update(
            self._task, total=total or None, completed=done, count=shown, description="training"
        )
