"""Run a site whose halves share a folder and no socket: `fedtune vault` and `fedtune courier
--spool`.

    fedtune vault SITE --spool DIR ──── its own child: the vault. With vault.run, for each request
        │                               a command that starts a vault, such as a scheduler's
        │  DIR/requests, DIR/answers (core/wire/spool.py)
        │
    fedtune courier SITE --spool DIR ── its own child: the courier

DIR is the spool: the folder through which the halves pass requests and answers as files.

| event                           | what follows                                                   |
| the courier ends, killed or not | the next courier withdraws the requests that this one left     |
|                                 | open; their answers are deleted                                |
| the vault ends, killed or not   | the next vault answers the open requests; it reads answers     |
|                                 | that were charged already from the ledger                      |
| no vault answers a request      | the courier waits as long as the coordinator does              |

Guarantee: the courier's files can only start this site's vault. The name of a request, 64
hexadecimal digits, is the only text of the courier that becomes part of a command."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from fedtune.core.config import Site, load_site
from fedtune.core.config.checked import checked_file, load_checked
from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.files.writing import remove_drafts
from fedtune.core.processes import (
    STOP_SECONDS,
    Child,
    alone,
    begin_log,
    keep_output,
    private_folder,
)
from fedtune.core.progress import OnEvent
from fedtune.core.vault.process import HOME
from fedtune.core.wire.spool import Spool
from fedtune.courier.process import FOLDER
from fedtune.flower.enrol import RENEWED
from fedtune.flower.link import link as read_link
from fedtune.homes.known_homes import check_not_put_back, note_head
from fedtune.launch.event_reader import EventReader
from fedtune.launch.site import (
    NOTED_EACH,
    Again,
    Shown,
    check,
    connection_for,
    place_of,
    take_events,
)
from fedtune.launch.until_stopped import until_stopped

RUN_LOG = "vault-run.log"  # in the state folder: the output of the last command
LOOK = 0.5  # seconds between two checks for requests
PATIENCE = 90.0  # seconds for which a refused courier tries again, as in `launch.site.join`
AGAIN_SECONDS = (2.0, 10.0, 60.0, 300.0)  # pauses after a command that wrote no answer


def carry(site_path: Path, folder: Path, *, once: bool, on_event: OnEvent) -> None:
    """Run the courier of a site whose vault answers in a spool, until a signal arrives.

    - site_path: the site's site.toml
    - folder: the spool: the folder that courier and vault share
    - once: whether to return when a coordinator that gave this site work has gone
    - on_event: called with each event's name and facts

    The courier reads site.toml, the coordinator's answer, the site's network keys and the spool's
    answers. It writes to its own folder and the spool's requests; a renewed certificate is stored
    too. The events are those that `launch.site.join` lists.

    Errors: ConfigError or Refused because of the answer or the keys; PolicyRefused if
    policy.isolation requires more than this machine supports; InfrastructureError if the
    coordinator still refuses this site after PATIENCE seconds, or the courier ends again and again
    before the coordinator has accepted it; KeyboardInterrupt at Ctrl-C."""
    site, spool = load_site(site_path, alone=True), Spool.at(folder)
    link, home = read_link(site, site_path), site.site.state / FOLDER
    private_folder(link.keys / RENEWED)
    shown = Shown(site, on_event, halves=("courier",))
    with until_stopped(on_event), alone(home / "courier", "fedtune courier"):
        text = f"site {site.site.name}: connecting to the coordinator at {link.address}"
        on_event("waiting", {"address": link.address, "text": text})
        again = Again(shown)
        while again.wanted:
            rest = ["once" if once else "", str(PATIENCE)]
            with _child("courier", site_path, spool, rest, home, home / "courier.log") as half:
                again.wanted = again.after(half.watch(shown.from_courier))


def answer_requests(
    site_path: Path, folder: Path, *, watch: bool = False, processes: int = 1, on_event: OnEvent
) -> None:
    """Answer the requests in a spool until a signal arrives. Check the site first, as
    `launch.site.join` does.

    - site_path: the site's site.toml. If it has vault.run, that command starts a vault for each
      request; else one vault answers all.
    - folder: the spool: the folder that courier and vault share
    - watch: whether to take part only in studies without a last round
    - processes: the number of processes that share each step
    - on_event: called with each event's name and facts

    Events: those of the vault in `launch.site.join`. Errors: those of the checks; ConfigError if
    the folder cannot be used, or vault.run names no program; PolicyRefused if policy.isolation
    requires more than this machine supports; InfrastructureError if the vault ends again and again
    before it takes requests; KeyboardInterrupt at Ctrl-C."""
    site, spool = load_site(site_path), Spool.at(folder)
    shown = Shown(site, on_event, halves=("vault",))
    with until_stopped(on_event), alone(site.site.state / FOLDER, "fedtune client"):
        remove_drafts(site.site.state)
        check(site, site_path.resolve())
        read_link(site, site_path)  # so that errors in it are reported at the start
        on_event("waiting", {"text": f"waiting for requests in {spool.path}"})
        if site.vault:
            _start_for_each(site, site_path.resolve(), spool, watch, processes, on_event)
        again = Again(shown)
        while again.wanted:
            with _vault(site, site_path, spool, watch, processes) as half:
                again.wanted = again.after(half.watch(shown.from_vault))


def answer_request(
    site_path: Path,
    folder: Path,
    name: str,
    checked: Path,
    *,
    watch: bool = False,
    processes: int = 1,
    on_event: OnEvent,
) -> None:
    """Answer one request in a spool, and return. The command in vault.run does this, after
    `answer_requests` has checked the site. Of the site file as it is now, only the policy counts.

    - site_path: the site's site.toml
    - folder: the spool: the folder that courier and vault share
    - name: the request's name, 64 hexadecimal digits
    - checked: the file with the tables that `answer_requests` checked
    - watch: whether to take part only in studies without a last round
    - processes: the number of processes that share each step
    - on_event: called with each event's name and facts

    Errors: InfrastructureError if there is no such request, or no answer could be written;
    ConfigError if `checked` cannot be read; the other errors of `answer_requests`."""
    site, spool = load_checked(checked, site_path), Spool.at(folder)
    shown = Shown(site, on_event, halves=("vault",))
    with (
        until_stopped(on_event),
        _vault(site, site_path, spool, watch, processes, name) as half,
    ):
        ended = half.watch(shown.from_vault)
        if ended and half.child.status != 0:
            raise ended


@dataclass(frozen=True)
class _Half:
    """The running process of one half of a site.

    - child: the process
    - told: the reader of its events
    - fetching: for a vault, the site file, by which the process that started the vault fetches
      bases that the vault asks for; None for a courier
    - home: for a vault, the folder of the ledger that pays, whose newest entry is noted each minute
      outside that folder"""

    child: Child
    told: EventReader
    fetching: Path | None
    home: Path | None = None

    def watch(self, show: Any) -> InfrastructureError | None:
        """Pass the process's events to `show` until the process ends, or until `show` returns True,
        which means that the work is done. Return None if the work is done, and an error if the
        process ended before."""
        noted = time.monotonic()
        while True:
            if self.home and time.monotonic() - noted > NOTED_EACH:
                note_head(self.home)
                noted = time.monotonic()
            wait([self.told.fileno()], 0.5)
            ended = not self.child.alive
            if take_events(self.told, show, self.fetching):
                return None
            if ended:
                return self.child.build_end_error()


@contextmanager
def _vault(
    site: Site, path: Path, spool: Spool, watch: bool, processes: int, name: str = ""
) -> Iterator[_Half]:
    """A context manager that runs a vault while its block runs, and yields it. The vault answers
    the requests in a spool. At the end, the ledger's newest entry is noted outside its folder.

    - site, path: the site, with the tables that were checked, and its file
    - spool: the spool
    - watch: whether to take part only in studies without a last round
    - processes: the number of processes that share each step
    - name: the only request to answer; "" answers all until the vault is stopped

    Errors: ConfigError if the ledger that pays is not there any more."""
    check_not_put_back(site.home)  # it may be unmounted by now, or on another machine
    note_head(site.home)
    state, place = site.site.state, place_of(read_link(site, path), watch)
    rest = [str(processes), json.dumps(place), str(checked_file(site)), *filter(None, [name])]
    try:
        with _child("vault", path, spool, rest, state / HOME, state / "vault.log") as half:
            yield replace(half, home=site.home)
    finally:
        note_head(site.home)


@contextmanager
def _child(
    program: Literal["vault", "courier"],
    path: Path,
    spool: Spool,
    rest: Sequence[str],
    home: Path,
    log: Path,
) -> Iterator[_Half]:
    """A context manager that runs one half of a site while its block runs, and yields it.

    - program: which half
    - path: the site file
    - spool: the spool in which the half works
    - rest: the further options of the program
    - home: the folder for what the program itself stores (FLWR_HOME)
    - log: the file for its output"""
    with ExitStack() as theirs, ExitStack() as ours:
        connection, tells = connection_for(ours, theirs)
        options = [str(path.resolve()), str(spool.path), str(tells), *rest]
        child = ours.enter_context(Child(program, options, home=home, log=log, keep=[tells]))
        theirs.close()  # so that the connection ends when the child does
        yield _Half(child, EventReader(connection), path.resolve() if program == "vault" else None)


def _start_for_each(
    site: Site, path: Path, spool: Spool, watch: bool, processes: int, notify: OnEvent
) -> None:
    """Run the command vault.run for one request after another, without end. If a request has no
    answer afterwards, try this request again later, after the other requests, as long as the
    courier waits for the answer.

    - site, path: the site, which has vault.run, and its file, in whose folder the command runs
    - spool: the spool in which the requests lie
    - watch: whether the vault takes part only in studies without a last round
    - processes: the number of the vault's processes that share each step
    - notify: called with the events "connected" before a command, and "reconnecting" after one that
      brought no answer

    Errors: ConfigError if vault.run names no program."""
    assert site.vault
    command = site.vault.command
    if shutil.which(command[0]) is None and not (path.parent / command[0]).is_file():
        raise ConfigError(f"vault.run: {command[0]}: no such program", "one that can be started")
    words = ["vault", str(path), "--spool", str(spool.path), *(["--watch"] if watch else [])]
    words += ["--processes", str(processes), "--checked", str(checked_file(site)), "--request"]
    tried, later = Counter[str](), dict[str, float]()
    while True:
        waiting = spool.waiting()
        for name in [each for each in waiting if later.get(each, 0.0) <= time.monotonic()]:
            check_not_put_back(site.home)  # the ledger's disk may be unmounted by now
            notify("connected", {"text": f"a request: `{command[0]}` starts the vault for it"})
            how = _run([*command, *words, name], path.parent, site.site.state / RUN_LOG)
            note_head(site.home)
            if name not in spool.waiting():
                continue
            seconds = AGAIN_SECONDS[min(tried[name], len(AGAIN_SECONDS) - 1)]
            tried[name] += 1
            later[name] = time.monotonic() + seconds
            text = f"`{command[0]}` {how} and wrote no answer; next try in {seconds:.0f} s; its"
            notify("reconnecting", {"seconds": seconds, "text": f"{text} output is in {RUN_LOG}"})
        for gone in set(later) - set(waiting):
            del later[gone], tried[gone]
        spool.remove_answered()
        time.sleep(LOOK)


def _run(command: list[str], folder: Path, log: Path) -> str:
    """Run a command, and return a text that says how it ended. If this process is stopped, stop the
    command too. folder: the current folder of the command. log: the file for its output."""
    begin_log(log)
    try:
        started = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return f"could not be started ({error.strerror})"
    keep_output(started, log)
    try:
        return f"ended with exit status {started.wait()}"
    finally:
        if started.poll() is None:
            started.terminate()
            with suppress(subprocess.TimeoutExpired):
                started.wait(STOP_SECONDS)
            started.kill()
            started.wait()
