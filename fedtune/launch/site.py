"""Run a site (`fedtune client`): start its two processes, the halves vault and courier, and show
their events to the person at the screen.

    gateway <── courier: Flower, TLS ── socket ──> vault: records, ledger, keys
                    └────────── events ──> join(): this process <── events ──┘

A parent process controls its child's environment, and neither half may control the other. So this
process starts both: first the vault, then the courier. Each confines itself before it does anything
else (isolation.py). If one half ends, this process ends the other and starts both again, however
often that happens; it gives up only halves that never come up (`Again`)."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from cryptography import x509

from fedtune.core import isolation
from fedtune.core.config import Site, load_site
from fedtune.core.config.checked import checked_file, load_checked
from fedtune.core.errors import (
    ConfigError,
    FedtuneError,
    InfrastructureError,
    PolicyRefused,
    error_of,
    facts_of,
)
from fedtune.core.files.room import between_orders
from fedtune.core.files.writing import remove_drafts, replace
from fedtune.core.ledger.audit_log import LONGEST, REPEATS, AuditLog, NotAuditable
from fedtune.core.ledger.files import KEY
from fedtune.core.processes import Child, alone, private_folder
from fedtune.core.progress import OnEvent, report
from fedtune.core.registry.reasons import WAITING
from fedtune.core.vault.process import HOME
from fedtune.core.wire import events
from fedtune.core.wire.keys import SigningKey
from fedtune.courier.process import FOLDER
from fedtune.flower.enrol import RENEWED
from fedtune.flower.link import Link
from fedtune.flower.link import link as read_link
from fedtune.flower.membership import keys_folder, read_reviewed_plan
from fedtune.homes.known_homes import check_not_put_back, note_head
from fedtune.launch.apart import ConnectedCourier, CourierLeft, VaultSocket
from fedtune.launch.event_reader import EventReader
from fedtune.launch.until_stopped import until_stopped
from fedtune.observe.from_courier import from_courier, log_again

log = logging.getLogger("fedtune.client")
EVENTS_AT_ONCE = 100  # events of one half that are shown before those of the other
LONG = 60.0  # seconds after which a run of the halves counts as long
FEW = 3  # the number of short runs in a row that may end before the halves are up
PAUSE = 60  # most seconds between the end of a short run and the next start
SAYS = {
    "vault": "records are read without a network",
    "courier": "what speaks to the network reads no record",
}
NOTED_EACH = 60.0  # seconds after which the ledger's newest entry is noted outside its folder
RENEWALS = 60.0  # seconds between two certificates of a site; as in flower/peers.py
# Events that Allowance does not limit: they are shown once, or not at all.
FREELY = frozenset({"isolation", "renewed", "error", "ended"})
BURST = 2**16  # characters of a courier's events that may be shown at once
PER_SECOND = 128  # characters that may be shown in addition, each second
OF_A_LINE = 100  # characters that are counted for the time and name beside an event
LATE = 5.0  # seconds after which the vault's facts are shown without the courier's


def join(
    site_path: Path,
    *,
    once: bool = False,
    watch: bool = False,
    processes: int = 1,
    on_event: OnEvent | None = None,
    patience: float = 90.0,
    socket_path: Path | None = None,
) -> None:
    """Take part in the coordinator's studies until a signal arrives; reconnect as often as needed.

    Before the site connects, `check_before_joining` checks its site file, data sheet and records.
    If the site file declares data public or generated, that function also signs the declaration.
    Halves that are started again work with the tables that were checked then: of what a person
    changes in the site file meanwhile, only the policy counts.

    - site_path: the site's site.toml
    - once: whether to return when a coordinator that gave this site work has gone
    - watch: whether to take part only in studies without a last round
    - processes: the number of processes that share each step
    - on_event: called with each event's name and facts; None for nobody
    - patience: seconds for which to try again while the coordinator refuses this site. After a
      crash Flower refuses the site for about 60 s, until the old session has expired.
    - socket_path: a socket for a courier that was started elsewhere (launch/apart.py);
      with None this function starts the courier

    Events, each with a text for people: "isolation" {confined, open}, "joined", "answered" {kind
    and the vault's facts}, "refused" {kind}, "failed" {kind, error}, "waiting" {address; for a
    finished study also study, done}, "connected" (after an interruption), "reconnecting" {seconds},
    "stopped" {reason}.

    Errors:
    - those of `check_before_joining`
    - PolicyRefused if policy.isolation requires more than this machine supports
    - InfrastructureError if the coordinator still refuses this site after `patience`, or the halves
      end again and again before they are up
    - KeyboardInterrupt at Ctrl-C; after SIGTERM the function returns without an error"""
    site = load_site(site_path)
    shown = Shown(site, on_event or ignore)
    with (
        until_stopped(shown.notify),
        alone(site.site.state / FOLDER, "fedtune client"),
        ExitStack() as theirs,
    ):
        remove_drafts(site.site.state)
        check(site, site_path.resolve())
        link = read_link(site, site_path)
        text = f"site {site.site.name}: connecting to the coordinator at {link.address}"
        shown.notify("waiting", {"address": link.address, "text": text})
        opened = theirs.enter_context(VaultSocket(socket_path)) if socket_path else None
        again = Again(shown)
        while again.wanted:
            check_not_put_back(site.home)  # it may not be mounted any more
            with Halves(
                site=site,
                path=site_path.resolve(),
                place=place_of(link, watch),
                link=link,
                processes=processes,
                once=once,
                patience=patience,
                vault_socket=opened,
            ) as halves:
                ended = halves.watch(shown)
                if ended is None and isinstance(halves.courier, ConnectedCourier):
                    halves.courier.dismiss()
            again.wanted = again.after(ended)  # neither half runs: the coordinator sees no site


def place_of(link: Link, watch: bool) -> dict[str, Any]:
    """Return the settings that a vault receives in addition to its site file, by name:
    "coordinator", the coordinator's public signing key; "watch", as given here; and "reviewed", the
    digest of the plan that the coordinator's answer brought for review ("" if it brought none that
    can be used).

    - link: the site's connection to its coordinator
    - watch: whether the site takes part only in studies without a last round"""
    reviewed_plan = read_reviewed_plan(link.answer)
    return {"coordinator": link.answer.coordinator, "watch": watch, "reviewed": reviewed_plan}


def check(site: Site, path: Path) -> None:
    """Run `check_before_joining` in a separate process, so that a person at the site can correct
    errors before the site connects. That process stores the tables that it checked, with which
    every vault of this start works.

    site: the site as this process loaded it. path: the site file. Errors: those of
    `check_before_joining`; ConfigError if the process checked other tables than those of `site`;
    InfrastructureError if the process fails for another reason."""
    state = site.site.state
    with ExitStack() as theirs, ExitStack() as ours:
        of_child, tells = connection_for(ours, theirs)
        options, log_file = [str(path), str(tells)], state / "vault.log"
        child = Child("checks", options, home=state / HOME, log=log_file, keep=[tells])
        ours.enter_context(child)
        theirs.close()  # so that the connection ends when the child does
        with suppress(EOFError, OSError):
            while True:
                event, facts = events.receive(of_child)
                if event == "error":
                    raise error_of(facts)
                _say_again(event, facts)
        child.wait()
    if load_checked(checked_file(site), path) != site:
        raise ConfigError(
            f"{path}: was changed while it was checked",
            "one state of the file, and of hospital.toml, until the site has joined",
            "start this site again",
        )


@dataclass
class Halves:
    """The processes vault and courier of a site; a context manager that starts and ends both.

    - site, path: the site and its file
    - place: the settings that the vault receives in addition to its site file (`place_of`)
    - link: the site's connection to its coordinator
    - processes: the number of processes that share each step
    - once: whether the courier ends when a coordinator that gave this site work has gone
    - patience: seconds for which to try again while the coordinator refuses this site
    - vault_socket: the socket for a courier that was started elsewhere; with None the courier is
      started here"""

    site: Site
    path: Path
    place: dict[str, Any]
    link: Link
    processes: int
    once: bool
    patience: float
    vault_socket: VaultSocket | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Halves:
        state = self.site.site.state
        private_folder(self.link.keys / RENEWED)
        with ExitStack() as theirs, self._open as ours:
            ours.callback(note_head, self.site.home)  # each time that both have ended
            connected = ours.enter_context(self.vault_socket.wait()) if self.vault_socket else None
            asks, answers = (theirs.enter_context(end) for end in socket.socketpair())
            told_by_vault, tells_vault = connection_for(ours, theirs)
            told_by_courier, tells_courier = connection_for(ours, theirs)
            self.of_vault = EventReader(told_by_vault)
            self.of_courier = EventReader(told_by_courier)
            options = [str(self.path), str(answers.fileno()), str(tells_vault)]
            options += [str(self.processes), json.dumps(self.place)]
            options += [str(checked_file(self.site))]
            keep = [answers.fileno(), tells_vault]
            log_file = state / "vault.log"
            vault = Child("vault", options, home=state / HOME, log=log_file, keep=keep)
            self.vault = ours.enter_context(vault)
            self.courier: Child | ConnectedCourier
            if connected is None:
                options = [str(self.path), str(asks.fileno()), str(tells_courier)]
                options += ["once" if self.once else "", str(self.patience)]
                keep = [asks.fileno(), tells_courier]
                home = state / FOLDER
                courier = Child("courier", options, home=home, log=home / "courier.log", keep=keep)
                self.courier = ours.enter_context(courier)
            else:
                self.courier = connected.hand_over(
                    asks=asks.fileno(), tells=tells_courier, once=self.once, patience=self.patience
                )
            self._open = ours.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def watch(self, shown: Shown) -> InfrastructureError | None:
        """Show the events of both processes through `shown` until one of the two ends. Return None
        once the courier reports that its work is done. Return an error if a process ends without
        such a report.

        Errors: the error that the courier reported; PolicyRefused if a process is not confined as
        the policy requires."""
        listeners = [self.vault_socket.listener] if self.vault_socket else []
        noted = time.monotonic()
        while True:
            if time.monotonic() - noted > NOTED_EACH:
                note_head(self.site.home)
                noted = time.monotonic()
            of_vault, of_courier = self.of_vault.fileno(), self.of_courier.fileno()
            ready = wait([of_vault, of_courier, *listeners], 0.5)
            if self.vault_socket and self.vault_socket.listener in ready:
                self.vault_socket.refuse_courier()
            # The vault first: it sends its facts about an answer before the courier has the answer.
            take_events(self.of_vault, shown.from_vault, self.path)
            if of_courier in ready and take_events(self.of_courier, shown.from_courier):
                return None
            shown.flush(LATE)
            for half in (self.vault, self.courier):
                if not half.alive:
                    take_events(self.of_vault, shown.from_vault, self.path)
                    if take_events(self.of_courier, shown.from_courier):
                        return None
                    return half.build_end_error()


def take_events(connection: EventReader, show: Any, fetching: Path | None = None) -> bool:
    """Pass the events of one half that have arrived to `show`, at most EVENTS_AT_ONCE. Return True
    once `show` returns True, which means that the half has done its work; else False.

    - connection: the reader of the half's events
    - show: called with each event's name and facts
    - fetching: the vault's site file; if it is given, a base that the vault asks for is fetched"""
    try:
        for _ in range(EVENTS_AT_ONCE):  # not all, so that the other half's events are shown too
            if not connection.poll(0):
                break
            event, facts = events.receive(connection)
            if event == "fetch" and fetching:
                connection.send_bytes(json.dumps(_fetch(fetching, str(facts["base"]))).encode())
            elif show(event, facts):
                return True
    except (EOFError, OSError):  # the process has ended or is about to, which the caller notices
        time.sleep(0.05)
    except ValueError:
        show("", {})
    return False


def _fetch(path: Path, base: str) -> dict[str, str]:
    """Fetch a base for the vault, if site.base or policy.bases names it. Return {}, or the error as
    facts of an event. path: the site file. base: the base's name."""
    from fedtune.core.bases.find import find_base, known_digest

    try:
        site, digest = load_site(path), known_digest(base)
        listed = site.policy.bases == "any" or digest in site.policy.bases
        if base != site.site.base and not (digest and listed):
            raise PolicyRefused(f"{base} is neither site.base nor in policy.bases")
        find_base(base, digest)
    except FedtuneError as error:
        return facts_of(error)
    return {}


class Again:
    """Decides whether a site's halves are started again after one of them has ended.

    The halves are up once the vault takes requests and the coordinator has accepted the courier
    (`Shown.are_up`). They are always started again in three cases:
    - they were up: a coordinator's message may have ended them, and no message may end the client
    - they ran for more than LONG seconds
    - they ended because a courier that was started elsewhere has left

    The client gives up only if more than FEW other runs in a row end before the halves are up.
    After each run of at most LONG seconds in a row, the pause is a second longer, up to PAUSE."""

    def __init__(self, shown: Shown) -> None:
        self._shown, self.wanted = shown, True
        self._began, self._short, self._failed = time.monotonic(), 0, 0

    def after(self, ended: InfrastructureError | None) -> bool:
        """Return whether the caller shall start the halves again; before it returns True, wait for
        0 to PAUSE seconds. ended: the result of `Halves.watch`; None means that the halves' work is
        done, and gives False. Errors: `ended` itself, after more than FEW short runs in a row that
        ended before the halves were up."""
        if ended is None:
            return False
        lasted = time.monotonic() - self._began > LONG
        self._short = 0 if lasted else self._short + 1
        self._failed = 0 if lasted or self._shown.are_up else self._failed + 1
        if isinstance(ended, CourierLeft):  # a courier elsewhere may come back as often as it likes
            self._short, self._failed = min(self._short, FEW), min(self._failed, FEW)
        if self._failed > FEW:
            raise ended
        self._shown.flush(0)
        self._shown.begin()
        pause = min(self._short, PAUSE)
        text = f"{ended.happened}; starting both again"
        self._shown.notify("reconnecting", {"seconds": float(pause), "text": text})
        time.sleep(pause)
        self._began = time.monotonic()
        return True


class Allowance:
    """Limits the total length of the courier's events that are shown, to BURST characters and
    PER_SECOND more each second.

    Shown text may be stored on any disk of the machine, as in a container's log, and a courier
    should not be able to fill the disk."""

    def __init__(self) -> None:
        self._left = float(BURST)
        self._since = time.monotonic()
        self._left_out = 0

    def permits(self, facts: dict[str, Any]) -> bool:
        """Return whether an event may be shown. If so, log the number of events left out since the
        last shown one. facts: the event's facts, whose texts are counted."""
        now = time.monotonic()
        self._left = min(BURST, self._left + (now - self._since) * PER_SECOND)
        self._since = now
        size = len(json.dumps(facts)) + OF_A_LINE
        if size > self._left:
            self._left_out += 1
            return False
        self._left -= size
        if self._left_out:
            log.warning("%d events of the courier were not shown: it sent too many", self._left_out)
            self._left_out = 0
        return True


class Shown:
    """Shows the events of the halves to the person at the site.

    For each answer the vault sends its facts, and then the courier sends the number of bytes; both
    are shown as one event. halves: the halves whose events are shown: both, or the one that this
    process started (launch/spooled.py)."""

    def __init__(
        self, site: Site, notify: OnEvent, halves: Sequence[str] = ("vault", "courier")
    ) -> None:
        self._site = site
        self.notify = notify
        self._halves = halves
        # The vault's facts that wait for the courier's, each with the time of its arrival.
        self._facts: deque[tuple[float, dict[str, Any]]] = deque()
        self._last: dict[str, Any] = {}  # the facts of the newest answer
        self._confined: dict[str, dict[str, Any]] = {}  # half -> how it is confined
        self._up: set[str] = set()  # the halves that said that they are up
        self._renewed: float | None = None  # the time at which a certificate was last accepted
        self._certificate: bytes | None = None  # a certificate that is not stored yet
        self._allowance = Allowance()

    def begin(self) -> None:
        """Prepare for halves that are started again: each will report anew how it is confined, and
        that it is up."""
        self._confined.clear()
        self._up.clear()

    @property
    def are_up(self) -> bool:
        """Whether each half that this process started has come up since: the vault takes requests,
        and the coordinator has accepted the courier."""
        return self._up.issuperset(self._halves)

    def from_vault(self, event: str, facts: dict[str, Any]) -> bool:
        """Show an event of the vault. Always returns False, since only the courier says when the
        work is done. Errors: PolicyRefused if a half is not confined as the policy requires."""
        if event == "answered":
            self._facts.append((time.monotonic(), facts))
            if "courier" not in self._halves:
                self.flush(0)
        elif event == "isolation":
            self._isolation("vault", facts)
        elif event == "ready":
            self._up.add("vault")
        elif not event:
            log.warning("the vault sent something that is no event: left out")
        elif not _say_again(event, facts):
            self.notify(event, facts)
        return False

    def from_courier(self, event: str, facts: dict[str, Any]) -> bool:
        """Show an event of the courier. Return True if the event says that the courier's work is
        done. Errors: the error that the courier reports; PolicyRefused if a half is not confined as
        the policy requires."""
        if event == "joined":  # whether or not it is shown
            self._up.add("courier")
        told = from_courier(event, facts)
        is_counted = event in FREELY or (event == "answered" and self._facts)
        if not is_counted and not self._allowance.permits(told or {}):
            return False
        if told is None:
            log.warning("the courier sent an event that it may not send: left out")
        elif event == "answered":
            self._join_facts(told)
        elif event == "isolation":
            self._isolation("courier", told)
        elif event == "log":
            log_again(told)
        elif event == "renewed":
            self._keep(told)
        elif event == "error":
            raise error_of(told)
        elif event == "ended":
            self.flush(0)
            return True
        elif event == "stopped":  # by a signal of somebody else: started again
            self.flush(0)
        elif event == "waiting" and told.pop("gone", False):
            self.notify("waiting", told | self._describe_finish())
        else:
            self.notify(event, told)
        return False

    def _keep(self, told: dict[str, Any]) -> None:
        """Store a renewed certificate where the courier reads it at its next start. It is written
        as soon as the vault is answering no request, and at most once in RENEWALS seconds, since
        the courier must not decide when this process writes to the disk. told: the facts of the
        courier's event; its "certificate" is the certificate as PEM text."""
        now = time.monotonic()
        if self._renewed is not None and now - self._renewed < RENEWALS:
            return
        self._renewed = now
        self._certificate = str(told.get("certificate", "")).encode()
        self._write_certificate()

    def _write_certificate(self) -> None:
        home = self._site.home
        # A courier's own container has no ledger, and its state folder is not writable.
        beside = between_orders(home) if os.access(home, os.W_OK) else nullcontext(True)
        try:
            with beside as is_now:
                if not is_now or self._certificate is None:
                    return
                text, self._certificate = self._certificate, None
                x509.load_pem_x509_certificate(text)
                replace(keys_folder(self._site) / RENEWED / "tls.crt", text, private=True)
        except (ValueError, InfrastructureError):
            log.warning("a renewed certificate cannot be kept; it is asked for again")

    def flush(self, seconds: float) -> None:
        """Show the vault's facts that have waited `seconds` or longer for the courier's facts. Then
        store a renewed certificate that could not be written before, because the vault was
        answering a request."""
        while self._facts and time.monotonic() - self._facts[0][0] >= seconds:
            self._show(self._facts.popleft()[1])
        if self._certificate is not None:
            self._write_certificate()

    def _join_facts(self, told: dict[str, Any]) -> None:
        facts = self._facts.popleft()[1] if self._facts else {}
        site = facts.get("site", self._site.site.name)
        moved: dict[str, Any] = {
            way: {site: told[way]} for way in ("bytes_up", "bytes_down") if way in told
        }
        self._show({"kind": told.get("kind", ""), "text": told.get("text", ""), **facts, **moved})

    def _show(self, facts: dict[str, Any]) -> None:
        unmoved = {name: fact for name, fact in facts.items() if not name.startswith("bytes_")}
        if facts.get("status") == WAITING and unmoved == self._last:
            return  # nobody has signed the plan or released the answer yet: shown before
        self._last = unmoved
        self.notify("answered", facts)

    def _describe_finish(self) -> dict[str, Any]:
        """Return the further fields of a "waiting" event if the coordinator has gone because its
        study is finished; else {}."""
        last = self._last
        rounds, status = last.get("rounds"), last.get("status")
        whole = last.get("round") == rounds and status in ("trained", "answered")
        if not (rounds and (whole or status == "finished")):
            return {}
        text = f"study {last['study']} is finished; waiting for another; Ctrl-C ends"
        return {"study": last["study"], "done": rounds, "text": text}

    def _isolation(self, half: str, facts: dict[str, Any]) -> None:
        """Note how one half is confined. When all halves that this process started have reported,
        show their reports and, if the vault is one of them, enter them in the audit log. A half
        reports once, before it does anything else. Further reports are left out, since through them
        a courier could choose when and how much the audit log grows.

        - half: "vault" or "courier"
        - facts: its report: lists of texts on what confines it, what stays open to it, and why

        Errors: PolicyRefused if the policy requires more; those of `_enter_isolation`."""
        if half in self._confined:
            log.warning("the %s reports a second time how it is confined: left out", half)
            return
        words = {n: [str(w) for w in facts.get(n, [])] for n in ("means", "missing", "reasons")}
        missing = words["missing"]
        if missing and self._site.policy.isolation == "required":
            raise PolicyRefused(
                f'policy.isolation = "required", but the {half} is not fully confined: '
                f"{'; '.join(missing)}",
                "a machine where the vault has no network and the courier reads no record",
                'use one, or set policy.isolation = "preferred" and accept what stays open',
            )
        self._confined[half] = {"walls": words["means"] + words["reasons"], "missing": missing}
        if len(self._confined) == len(self._halves):
            confined = {half: each["walls"] for half, each in self._confined.items()}
            still_open = sum(len(each["missing"]) for each in self._confined.values())
            text = isolation_text(self._confined)
            shown = {"confined": confined, "open": still_open, "text": text}
            self.notify("isolation", shown)
            if "vault" in self._halves:
                self._enter_isolation(confined, still_open)

    def _enter_isolation(self, confined: dict[str, list[str]], still_open: int) -> None:
        """Enter in the site's audit log how the halves are confined. No entry is made if one of the
        newest REPEATS entries says the same, or if the only space left on the disk is that which is
        reserved for the ledger: a courier that was started elsewhere, as in another container,
        may reconnect as often as it likes and send a different report each time.

        - confined: half -> texts on what confines it
        - still_open: the number of accesses that remain open to the halves

        Errors: LedgerError; InfrastructureError if the disk refuses."""
        site = self._site
        walls = {half: isolation.describe(each) for half, each in confined.items()}
        acts = AuditLog(site.home, SigningKey.at(site.home / KEY))  # made at enrolment
        if not site.room.has_space(LONGEST):
            log.warning("isolate is not in the audit log: the disk has no space; to do: free space")
            return
        try:
            acts.add("isolate", "policy.isolation", once=REPEATS, open=still_open, **walls)
        except NotAuditable as error:
            log.warning("isolate is not in the audit log: the words of %s are not allowed", error)


def isolation_text(confined: dict[str, dict[str, Any]]) -> str:
    """Return a text that says how each half is confined and which accesses remain open to it.
    confined: half -> {"walls": texts on what confines it, "missing": texts on what remains open}.
    """
    said, missing = [], []
    for half, text in SAYS.items():
        if half in confined:
            said.append(f"{text} ({isolation.describe(confined[half]['walls'])})")
            missing += [f"{half}: {each}" for each in confined[half]["missing"]]
    return "; ".join(said) + (f". OPEN: {'; '.join(missing)}" if missing else "")


def connection_for(ours: ExitStack, theirs: ExitStack) -> tuple[Connection, int]:
    """Open a connection on which a child process sends its events. Return this process's end, and
    the descriptor of the child's end.

    - ours: when this stack is closed, it closes this process's end
    - theirs: when this stack is closed, it closes this process's copy of the child's end"""
    here, there = socket.socketpair()
    theirs.enter_context(there)
    return ours.enter_context(Connection(here.detach())), there.fileno()


def _say_again(event: str, facts: dict[str, Any]) -> bool:
    """If an event of a child process is a log line or a progress report, log it or report it in
    this process too, and return True. For any other event do nothing, and return False."""
    if event == "log":
        log_again(facts)
    elif event == "step":
        report(str(facts["text"]), int(facts["done"]), int(facts["total"]))
    else:
        return False
    return True


def ignore(_name: str, _facts: dict[str, Any]) -> None:
    pass
