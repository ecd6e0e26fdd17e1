"""Report a run's or site's events to its operator, in a log, a status file, metrics and trackers.
None of these holds anything private.

    with observer("coordinator", folder, then=watch, metrics_port=9464) as seen:
        serve(..., on_event=seen)

Nothing here sends a message to a site or to the coordinator. A sink (a log, a status file, metrics,
a tracker) cannot stop a study, since its first error is logged and later ones are ignored. In
strict mode (FEDTUNE_STRICT=1, as in tests) the error is raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fedtune.core.errors import InfrastructureError, InputError, Refused
from fedtune.core.progress import OnEvent
from fedtune.core.registry.reasons import OTHER, reason_of
from fedtune.observe.log import (
    SCREEN,
    JsonLog,
    NotLoggable,
    Role,
    cleaned,
    logger,
    strict_here,
)
from fedtune.observe.status import FILE, LOCK, StatusFile
from fedtune.observe.trackers import Tracker

__all__ = ["JsonLog", "NotLoggable", "Observer", "OnEvent", "StatusFile", "observer"]

LOG, PLAN = "log.jsonl", "plan.json"
EARLY = 200  # events kept for a run folder that does not exist yet


class Observer:
    """Passes each event to every sink, and then to `then`. As a context manager it also passes
    "stopped" to the sinks, if the block raises an error or ends without "done" or "stopped".

    - sinks: called with each event's name and fields; those with a method `close` are closed when
      the block ends. An error of a sink is logged, and the study goes on.
    - then: called with each event after the sinks, but not with the "stopped" that this class
      itself passes to the sinks at the end of the block; None calls nothing
    - late: sinks whose folder the run has not created yet. They receive the earlier events at
      "start", so that a run that never began leaves no files.
    - run: the run's folder; its log and status are removed if a refusal or a wrong input ended the
      run before it began. None removes nothing."""

    def __init__(
        self,
        sinks: Sequence[Any],
        then: OnEvent | None = None,
        late: Sequence[Any] = (),
        run: Path | None = None,
    ) -> None:
        self._run = run
        self._sinks = list(sinks)
        self._late = list(late)
        self._then = then
        self._early: list[tuple[str, dict[str, Any]]] = []
        self._ended = False
        self._warned: set[str] = set()

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        self._ended = self._ended or event in ("done", "stopped")
        for sink in self._sinks:
            self._pass(sink, event, data)
        if self._late:
            self._early = [*self._early, (event, data)][-EARLY:]
            if event == "start":
                for sink in self._late:
                    for pair in self._early:
                        self._pass(sink, *pair)
                self._sinks = [*self._sinks, *self._late]
                self._late = []
                self._early = []
        if self._then:
            self._then(event, data)

    def _pass(self, sink: Any, event: str, data: dict[str, Any]) -> None:
        try:
            sink(event, data)
        except Exception as error:
            if strict_here():
                raise
            name = getattr(sink, "name", type(sink).__name__)
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("%s: %s; the study goes on", name, type(error).__name__)

    def __enter__(self) -> Observer:
        for sink in self._sinks:
            if isinstance(sink, StatusFile):
                sink.write()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        then, self._then = self._then, None  # the console reports the end in its own way
        if kind is not None or not self._ended:
            self("stopped", _end(error))
        self._then = then
        for sink in (*self._sinks, *self._late):
            if hasattr(sink, "close"):
                sink.close()
        if isinstance(error, Refused | InputError) and self._run is not None:
            _forget(self._run)


def _end(error: BaseException | None) -> dict[str, Any]:
    """Return the fields of a "stopped" event: "error", the class of the error that ended the run.
    If this is Refused or InfrastructureError, and its text contains one of fedtune's fixed reasons
    (PHRASES), also return the reason. If a signal stopped the run, return only the signal as the
    reason. If `error` is None, return {}."""
    if error is None:
        return {}
    if isinstance(error, KeyboardInterrupt):
        return {"reason": "stopped by SIGINT"}
    reason = reason_of(str(error)) if isinstance(error, Refused | InfrastructureError) else OTHER
    told = {} if reason in ("", OTHER) else {"reason": reason}
    return told if reason == "stopped by SIGTERM" else {"error": type(error).__name__, **told}


class _Tracked:
    """A sink that passes events on to a tracker, with only those fields that the log may hold.
    Events that are only for the screen (SCREEN), such as steps of a progress bar, are left out."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self.name = tracker, type(tracker).__name__

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        if event not in SCREEN:
            record = cleaned(event, data, strict=strict_here())
            self._tracker.on_event(record.pop("event"), record)

    def close(self) -> None:
        try:
            self._tracker.close()
        except Exception as error:
            if strict_here():
                raise
            logger.warning("%s: %s when it was closed", self.name, type(error).__name__)


def _forget(run: Path) -> None:
    """Remove the log, the status file and the folder of a run that ended before it had a plan.json.
    A folder with other files stays."""
    with suppress(OSError):
        if not (run / PLAN).exists():
            for name in (LOG, FILE, LOCK):
                (run / name).unlink(missing_ok=True)
            run.rmdir()  # fails if the folder holds anything else


def observer(
    role: Role,
    folder: Path,
    *,
    then: OnEvent | None = None,
    metrics_port: int | None = None,
    more: Sequence[OnEvent] = (),
    site: Path | None = None,
    ledger: Path | None = None,
    early: bool = False,
    trackers: Sequence[Tracker] = (),
) -> Observer:
    """Build the Observer of a coordinator or a site, with all sinks that the parameters ask for.

    - role: who writes: a coordinator or a site; the log and the status file name it
    - folder: the run's folder, or the site's state folder
    - then: also called with each event, such as the console's Watch
    - metrics_port: the port at which metrics are served; None to serve none
    - more: further sinks, such as the status of the coordinator's home
    - site: the site.toml whose budget the metrics show
    - ledger: the folder of the site's ledger, if it is not `folder`. The log and the status file
      take no disk space while the site is answering an order (any request of the coordinator except
      one for admission), since the ledger may need this space for the order.
    - early: whether to write to the run's folder before the run begins
    - trackers: the trackers of a coordinator's run

    Errors: with `metrics_port`, ConfigError if the package that serves metrics is not installed,
    and InfrastructureError if the port cannot be opened."""
    files = [
        JsonLog(folder / LOG, role=role, ledger=ledger),
        StatusFile(folder, role=role, ledger=ledger),
    ]
    is_late = role == "coordinator" and not early
    sinks: list[Any] = [*map(_Tracked, trackers), *([] if is_late else files)]
    sinks += more
    if metrics_port is not None:
        from fedtune.observe.metrics import Metrics

        sinks.append(Metrics(role, port=metrics_port, site=site))
    return Observer(sinks, then, late=files if is_late else (), run=folder if is_late else None)
