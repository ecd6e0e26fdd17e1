"""Run several studies of one consortium at one coordinator, with one port and one home.

    serve_all() ── opens ──> SuperLink and gateway, as coordinator.serve does
       └── for each study: a run of the SuperLink, and server.rounds.run in its turn

With at_once = 1 a study begins when the one before it has ended. With a larger at_once that many
studies run, each in its own thread, and take turns (server/turns.py). When a study ends, the next
one begins.

| event                                                        | the studies                      |
| a study fails: refused, too few sites, its deadline, a fault | the others go on                 |
| Ctrl-C, SIGTERM, kill -9, or the SuperLink ends              | all end; --resume continues each |
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.core.config import Study
from fedtune.core.errors import ConfigError, Stopped, is_fault
from fedtune.core.progress import OnEvent, told
from fedtune.launch.coordinator import (
    Link,
    Members,
    Run,
    Terminated,
    Terms,
    consortium,
    find_address,
    hold_home,
    installed_rounds,
    listening,
    naming_stops,
    prepare,
    run_study,
)
from fedtune.server.turns import SharedTurn, Turn, Turns


@dataclass(frozen=True)
class Entry:
    """A study to run at a coordinator that runs several.

    - study: the study as its study.toml describes it
    - out: the folder of the study's run
    - observed: returns a context manager, open while the study runs. It provides a function that is
      called with each event's kind and data.
    - resume: whether to continue the run in `out`
    - deadline: the time, in seconds since 1970, at which a study that is not finished ends"""

    study: Study
    out: Path
    observed: Callable[[], AbstractContextManager[OnEvent]]
    resume: bool = False
    deadline: float = math.inf

    @property
    def name(self) -> str:
        return self.study.study.name


@dataclass(frozen=True)
class Outcome:
    """How a study ended.

    - entry: the study that was to be run
    - report: its report; None if it failed
    - error: the error that ended it; None if there is a report"""

    entry: Entry
    report: dict[str, Any] | None = None
    error: BaseException | None = None


def check_together(studies: Sequence[Study], at_once: int) -> None:
    """Check that studies can run at one coordinator: their names must differ, and no study may wait
    for the end of a study without a last round. at_once: how many studies run at a time. Errors:
    ConfigError."""
    names = [study.study.name for study in studies]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two studies are named {twice[0]}", "another study.name for each", "rename one"
        )
    if at_once < len(studies) and (endless := [s for s in studies if s.continuous]):
        raise ConfigError(
            f"{endless[0].study.name} has a [schedule] and no last round: a study that waits for "
            "its end never begins",
            todo=f"run all of them at once, with --at-once {len(studies)}",
        )


def serve_all(
    entries: Sequence[Entry],
    *,
    host: str = "127.0.0.1",
    port: int = 8443,
    names: Sequence[str] = (),
    home: Path,
    at_once: int = 1,
    on_event: OnEvent,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
    terms: Terms | None = None,
) -> list[Outcome]:
    """Run several studies at one coordinator. A study that fails does not affect the others.

    - entries: the studies, each with the folder of its run, in the order in which they begin
    - host, port: where the gateway listens
    - names: host names by which sites connect, which are written into the gateway's certificate
    - home: the folder of the coordinator's keys and registry
    - at_once: how many studies run at a time
    - on_event: called with the events of the consortium, such as sites that connect
    - on_end: called with the outcome of each study as soon as it has ended
    - terms: the settings that the person who starts the studies chooses; None for Terms()

    Returns one outcome for each study, in the order of `entries`.

    Errors: ConfigError; InfrastructureError if the SuperLink ends, if the gateway or the SuperLink
    cannot listen, or if SIGTERM arrives; KeyboardInterrupt."""
    check_together([entry.study for entry in entries], at_once)
    with naming_stops(), hold_home(home, [entry.out for entry in entries]) as patience:
        prepare(home, host, port, names, patience)
        rounds = partial(installed_rounds, home, Members(home, on_event), terms or Terms())
        with consortium(home, host, port) as link:
            address = find_address(host, port, names)
            on_event("listening", listening([entry.study for entry in entries], home, address))
            ended = _Server(link, home, rounds, on_end).run(entries, at_once)
            if not link.child.alive:
                raise link.child.build_end_error()
            return ended


class _Server:
    """Runs the studies of `serve_all` while SuperLink and gateway run.

    - link: the running SuperLink
    - home: the coordinator's home
    - rounds: takes a study's `Turn` (its turn among the studies), and returns the function that
      runs the study's rounds
    - on_end: called with the outcome of each study as soon as it has ended"""

    def __init__(
        self,
        link: Link,
        home: Path,
        rounds: Callable[[Turn], Run],
        on_end: Callable[[Outcome], None],
    ) -> None:
        self._link, self._home = link, home
        self._rounds, self._on_end = rounds, on_end
        self._ended = dict[str, Outcome]()

    def run(self, entries: Sequence[Entry], at_once: int) -> list[Outcome]:
        if at_once == 1:
            for entry in entries:
                if self._link.child.alive:
                    self._run(entry, Turn(entry.deadline))
        else:
            self._run_in_threads(entries, at_once)
        return [self._ended[entry.name] for entry in entries if entry.name in self._ended]

    def _run_in_threads(self, entries: Sequence[Entry], at_once: int) -> None:
        turns, places = Turns(), threading.Semaphore(at_once)
        threads = list[threading.Thread]()

        def work(entry: Entry, turn: SharedTurn) -> None:
            try:
                with turn:
                    self._run(entry, turn)
            except (KeyboardInterrupt, Terminated):
                pass  # the main thread has the signal
            finally:
                places.release()

        def start(entry: Entry) -> None:
            places.acquire()
            if not self._link.child.alive:
                places.release()
                return
            turn = turns.line_up(entry.deadline)
            threads.append(threading.Thread(target=work, args=(entry, turn), daemon=True))
            threads[-1].start()

        try:
            with turns.line_up():  # all of the first studies line up before one of them works,
                for entry in entries[:at_once]:  # so that their turns follow the order of `entries`
                    start(entry)
            for entry in entries[at_once:]:
                start(entry)
            # Not by Thread.join: if a signal ended it, nobody would know which threads still live.
            for _ in range(at_once):
                places.acquire()
        except Stopped as stop:
            turns.end(threads, stop)
            raise

    def _run(self, entry: Entry, turn: Turn) -> None:
        """Run a study to its end, store its outcome, and pass the outcome to `on_end`. An error
        that ends only this study is part of the outcome.

        - entry: the study
        - turn: makes the study wait while others work, and holds its deadline

        Errors: KeyboardInterrupt, Terminated, and other exceptions that end the server."""
        report, error = None, None
        try:
            with (
                entry.observed() as on_event,
                naming_stops(),
                turn.interruptible(),
                told(on_event),
            ):
                turn.check()
                rounds = self._rounds(turn)
                report = run_study(
                    *(self._link, self._home, rounds, entry.study, entry.out),
                    resume=entry.resume,
                    on_event=on_event,
                )
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException as fault:
            if not is_fault(fault):
                raise
            error = fault
        self._ended[entry.name] = outcome = Outcome(entry, report, error)
        self._on_end(outcome)
