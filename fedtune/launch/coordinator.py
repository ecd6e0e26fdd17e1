"""Run the coordinator (`fedtune server`): a study over TLS with sites on other machines.

    serve() ── starts ──> gateway (the only exposed port) <── site ── `fedtune client`
       ├── starts ──> SuperLink (loopback, node keys) <── gateway
       └── claims the run's ServerApp task and calls fedtune.server.rounds.run with its Grid

The rounds run in this process, from the installed package. The app bundle that Flower requires for
a run holds a pyproject.toml and no code, so a site could run nothing from it. A gateway that ends
is started again. If the SuperLink ends, the study stops, and --resume continues it. Several studies
of one consortium share all of this: side_by_side.py.

Layout of the coordinator's home (made at the first start; `fedtune backup` copies it):

    ca.pem              the consortium's CA; stays the same for its whole life
    server.pem          the gateway's certificate and key; renewed automatically (certs.py)
    signing.key         signs plans, orders and receipts
    address             HOST:PORT where sites connect; `fedtune admit` writes it into answers
    plan.json           the plan that sites are sent, and its signature; also written into answers
    nodes/SITE.json     the keys of every admitted site (enrol.py)
    leaves/SITE.pem     the site's newest certificate, read only to check its dates
    flower/             state of the running SuperLink and gateway; new at every start

Flower's Control API, which starts and stops runs, asks for no credentials and shares the
SuperLink's port, a random one on loopback. It is locked (api.Locked): other users of this machine
lack the secret, which is in flower/.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import secrets
import socket
import ssl
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from flwr.serverapp import Grid

from fedtune.core.config import Study
from fedtune.core.errors import ConfigError, InfrastructureError, Stopped
from fedtune.core.files.writing import remove_drafts, replace
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.processes import STOP_SECONDS, Child, alone, interruptible, is_reachable
from fedtune.core.progress import OnEvent
from fedtune.core.registry.reasons import reason_of
from fedtune.core.wire.keys import SigningKey
from fedtune.evidence import fingerprints
from fedtune.flower import allowance, api, certs, enrol
from fedtune.flower.ports import EVERYWHERE, address_of, bypass_proxy, free_port, own_name
from fedtune.runs.choice import hold_run
from fedtune.server.backup import refuse_second
from fedtune.server.schedule import SystemClock
from fedtune.server.turns import Turn

Run = Callable[..., dict[str, Any]]  # fedtune.server.rounds.run, or a stand-in
PORTS = 5  # tried for the SuperLink, one after another
READY_SECONDS, CLAIM_SECONDS = 60.0, 30.0
SIGNING_SECONDS = 7 * 86_400.0
WATCH_SECONDS = 0.5  # pause between two checks of the gateway and the registry


@dataclass(frozen=True)
class Terms:
    """The settings that the person who starts a study chooses, in addition to its plan.

    - signing: seconds to wait at the start for sites where nobody has signed the plan yet
    - anyway: whether to run a study that is not expected to gain anything
    - shares: class -> its share of the sites' units; the forecast of the gain uses it"""

    signing: float = SIGNING_SECONDS
    anyway: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)


def serve(
    study: Study,
    out: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8443,
    names: Sequence[str] = (),
    home: Path,
    resume: bool = False,
    on_event: OnEvent | None = None,
    run: Run | None = None,
    terms: Terms | None = None,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Run the study with the sites that are admitted before or while it runs. Return its report.

    - study: the study as its study.toml describes it
    - out: the folder of the run
    - home: the folder of the coordinator's keys and registry of sites
    - host, port: where the gateway listens
    - names: host names by which sites connect, which are written into the gateway's certificate
    - resume: whether to continue the run in `out`; if not, `out` must hold no run
    - on_event: called with each event's kind and data; None for nobody
    - run: called in place of server.rounds.run; None for that function
    - terms: the settings that the person who starts the study chooses; by default Terms()
    - deadline: the time at which a study that is not finished ends, in seconds since 1970

    Errors: ConfigError; InfrastructureError if the SuperLink ends, the gateway or the SuperLink
    cannot listen, SIGTERM stops the study, or the deadline passes; those of server.rounds.run;
    KeyboardInterrupt.
    """
    with naming_stops(), hold_home(home, [out]) as patience:
        prepare(home, host, port, names, patience)
        rounds = run or installed_rounds(
            home, Members(home, on_event), terms or Terms(), Turn(deadline)
        )
        with consortium(home, host, port) as link:
            if on_event:
                on_event("listening", listening([study], home, find_address(host, port, names)))
            return run_study(link, home, rounds, study, out, resume=resume, on_event=on_event)


@contextmanager
def naming_stops() -> Iterator[None]:
    """A context manager that replaces Stopped, which a signal raises in its block, by the error
    that people see: KeyboardInterrupt for SIGINT, else Terminated."""
    try:
        yield
    except Stopped as stop:
        if stop.name == "SIGINT":  # a person pressed Ctrl-C, which is no error
            raise KeyboardInterrupt from None
        raise Terminated(
            f"stopped by {stop.name} before the study was done", todo="start it again with --resume"
        ) from None


class Terminated(InfrastructureError):
    """SIGTERM ended a server before its studies were finished."""


@contextmanager
def hold_home(home: Path, runs: Sequence[Path]) -> Iterator[float]:
    """Lock a coordinator's home and its runs' folders for this process while the block runs. At the
    start, remove the incomplete files that an earlier process left, and the plan.json of an earlier
    study. A signal raises Stopped in the block. Yields the number of seconds to wait for the port:
    if an earlier server was killed, its gateway needs some time to end by itself.

    Errors: InfrastructureError if another process has locked one of the folders, or another
    coordinator serves the consortium."""
    bypass_proxy()
    refuse_second(home)
    with alone(home / "flower", "fedtune server") as killed, ExitStack() as held:
        for run in runs:
            held.enter_context(hold_run(run))
        with interruptible():
            for folder in (home, *runs):
                remove_drafts(folder)
            (home / enrol.PLAN).unlink(missing_ok=True)  # an earlier study's plan
            yield STOP_SECONDS if killed else 0.0


@contextmanager
def consortium(home: Path, host: str, port: int) -> Iterator[Link]:
    """Run the SuperLink and the gateway while the block runs, and yield the running SuperLink. Call
    `prepare` first. home: the coordinator's home. host, port: where the gateway listens.

    Errors: InfrastructureError if one of them cannot listen, or the SuperLink ends."""
    with superlink(home) as link, blaming(link.child), supervised_gateway(link, home, host, port):
        yield link


def run_study(
    link: Link,
    home: Path,
    rounds: Run,
    study: Study,
    out: Path,
    *,
    resume: bool,
    on_event: OnEvent | None,
) -> dict[str, Any]:
    """Run a study with the running SuperLink, and return the study's report. For Flower, the study
    is one of the SuperLink's runs.

    - link: the running SuperLink
    - home: the coordinator's home, whose audit log gets the study's decisions
    - rounds: the function that runs the study's rounds, with the parameters of server.rounds.run;
      made by `installed_rounds`
    - study: the study as its study.toml describes it
    - out: the folder of the run
    - resume: whether to continue the run in `out`; if not, `out` must hold no run
    - on_event: called with each event's kind and data; None for nobody

    Errors: InfrastructureError if the SuperLink ends or refuses a request; those of `rounds`."""
    heard = audit_events(home, _with_plan(study, home, on_event) if on_event else None)
    with blaming(link.child), study_grid(link, home) as grid:
        return rounds(grid, study, out, resume=resume, on_event=heard)


def prepare(
    home: Path, host: str, port: int, names: Sequence[str] = (), patience: float = 0.0
) -> None:
    """Check that the gateway's port is free, and bring the coordinator's home up to date: make its
    CA and signing key if they are missing, renew the gateway's certificate if needed, and write the
    address where sites connect.

    - home: the folder of the coordinator's keys and registry
    - host, port: where the gateway will listen
    - names: host names by which sites connect, which are added to the gateway's certificate. If
      there are none and `host` is 0.0.0.0 or ::, no address is written.
    - patience: seconds to wait for the port to become free, since the gateway of a killed server
      ends by itself

    Errors: ConfigError if this machine's clock was set back, a key or certificate cannot be read,
    or a name is not a host name; InfrastructureError if the port is still in use after `patience`,
    or the signing key cannot be read."""
    deadline = time.monotonic() + patience
    while is_reachable(own_name(host), port):
        if time.monotonic() > deadline:
            raise InfrastructureError(
                f"port {port} of {host} is taken", todo="choose another with --port"
            )
        time.sleep(0.1)
    enrol.check_clock(home)
    certs.ca(home)
    SigningKey.at(home / "signing.key")
    hosts = [] if host in EVERYWHERE else [host]
    certs.server_leaf(home, [*names, *hosts])
    if names or hosts:
        replace(home / "address", find_address(host, port, names).encode(), private=True)


def find_address(host: str, port: int, names: Sequence[str] = ()) -> str:
    """Return the address HOST:PORT by which sites connect. HOST is the first of `names`, else
    `host`. port: the gateway's port."""
    name = [*names, host][0]
    return address_of(name, port)


def listening(studies: Sequence[Study], home: Path, address: str) -> dict[str, Any]:
    """Return the fields of the event "listening": address, fingerprint, participants (the admitted
    sites), text for the operator and, if there is only one study, study (its name).

    - studies: the studies that this coordinator runs
    - home: the coordinator's home, where the admitted sites are registered
    - address: HOST:PORT by which sites connect"""
    ca = _ca(home)
    fingerprint = fingerprints.of_consortium(ca, SigningKey.at(home / "signing.key").public)
    names = sorted(enrol.registry(home))
    title = ", ".join(study.study.name for study in studies)
    least = " or ".join(map(str, sorted({study.strategy.min_sites for study in studies})))
    plan = "plan         is" if len(studies) == 1 else "plans        are"
    lines = [
        f"coordinator  of {title}, at {address}",
        f"consortium   {fingerprint}",
        "             this is OURS: read it out to each site over the phone",
        f"admitted     {', '.join(names) or 'nobody yet'}; the study needs {least}",
        f"{plan} being made, from public records; this takes minutes for some studies",
    ]
    facts = {"address": address, "fingerprint": fingerprint, "participants": names}
    facts |= {"study": title} if len(studies) == 1 else {}
    return {**facts, "text": "\n".join(lines)}


def plan_made(study: Study, home: Path) -> str:
    """Return the text that is shown as soon as plan.json exists. It says what the operator does
    next. From then on, the answers that `fedtune admit` writes for sites contain the plan. home:
    the coordinator's home, where the admitted sites are counted."""
    lines = ["plan         is made; a site's answer brings it for review"]
    if len(enrol.registry(home)) < study.strategy.min_sites:
        lines.append(
            f"next         the sites' requests, once they are here: fedtune admit *.request "
            f"--home {home}"
        )
    lines.append("waiting      for sites to connect: fedtune client site.toml, there")
    return "\n".join(lines)


@dataclass(frozen=True)
class Link:
    """A running SuperLink.

    - child: its process
    - address: HOST:PORT on loopback
    - certificate: the file of the certificate that was made for this start
    - secret: the random bytes without which the SuperLink accepts no call (api.Locked)"""

    child: Child
    address: str
    certificate: Path
    secret: bytes

    @property
    def ca(self) -> bytes:
        return self.certificate.read_bytes()


@contextmanager
def superlink(home: Path) -> Iterator[Link]:
    """Run a SuperLink on loopback while the block runs, and yield it. It admits only registered
    nodes and starts no process. home: the coordinator's home; the SuperLink's files are in its
    folder flower/.

    Its database is new at each start. The state that must survive a restart is in the run's
    folder."""
    state = home / "flower"
    for old in state.glob("state.db*"):
        old.unlink()
    secret = secrets.token_bytes(32)
    secret_file = replace(state / "executor.secret", secret, private=True)
    certificate, key = certs.loopback(state)
    # fmt: off
    options = [
        "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key),
        "--ssl-ca-certfile", str(certificate),
        "--enable-supernode-auth",
        "--isolation", "process", "--superexec-auth-secret-file", str(secret_file),
        "--database", str(state / "state.db"),
        "--disable-runtime-dependency-installation",
    ]
    # fmt: on
    child, port = _listen_on_loopback(options, state, certificate)
    with child:
        yield Link(child, f"127.0.0.1:{port}", certificate, secret)


def _listen_on_loopback(
    options: Sequence[str], state: Path, certificate: Path
) -> tuple[Child, int]:
    """Start a SuperLink on a free port, and return its process and the port. If another program
    takes the port first, try another port, at most PORTS in all. Errors: InfrastructureError.

    - options: the SuperLink's options, without host and port
    - state: the folder where it works and writes its log
    - certificate: the file of its certificate, by which the SuperLink is told from another program
      that listens on the port"""
    attempts = PORTS
    while True:
        attempts, port = attempts - 1, free_port()
        where = ["--host", "127.0.0.1", "--port", str(port)]
        child = Child("superlink", [*where, *options], home=state, log=state / "superlink.log")
        try:
            child.wait_for_port("127.0.0.1", port)
            deadline = time.monotonic() + READY_SECONDS
            while not _answers(port, certificate):  # another program took the port, and listens
                if not child.alive:
                    raise child.build_end_error()
                if time.monotonic() > deadline:
                    raise InfrastructureError(
                        f"the SuperLink does not answer on port {port} after {READY_SECONDS:.0f} s",
                        todo=f"read {child.log}",
                    )
                time.sleep(0.05)
            return child, port
        except BaseException as error:
            child.stop()
            is_taken = isinstance(error, InfrastructureError) and child.has_logged("already in use")
            if not (is_taken and attempts):
                raise


def _answers(port: int, certificate: Path) -> bool:
    """Return whether the program that listens on a loopback port has the key of `certificate`."""
    context = ssl.create_default_context(cafile=certificate)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5.0) as connection:
            context.wrap_socket(connection, server_hostname="127.0.0.1").close()
            return True
    except OSError:  # ssl.SSLError is one
        return False


@contextmanager
def supervised_gateway(link: Link, home: Path, host: str, port: int) -> Iterator[None]:
    """A context manager that runs the gateway while its block runs. If the gateway ends, it is
    started again. Sites that are admitted meanwhile are registered with the SuperLink.

    - link: the running SuperLink, to which the gateway passes the sites' requests
    - home: the coordinator's home, in which `prepare` was called
    - host, port: where the gateway listens

    Errors: InfrastructureError if the gateway cannot listen; httpx.HTTPError if the SuperLink
    refuses to register the sites that are admitted at the start."""
    state, done = home / "flower", threading.Event()
    options = [str(home), host, str(port), f"https://{link.address}", str(link.certificate)]

    def start() -> Child:
        return Child("gateway", options, home=state, log=state / "gateway.log")

    registered: set[str] = set()
    register_new(link, home, registered)
    gateway = start()

    def supervise() -> None:
        nonlocal gateway
        last_start = time.monotonic()
        next_start = 0.0
        pause = WATCH_SECONDS
        while not done.wait(WATCH_SECONDS):
            now = time.monotonic()
            with suppress(httpx.HTTPError, ConfigError, OSError):  # tried again in WATCH_SECONDS
                if not gateway.alive and now >= next_start:
                    pause = WATCH_SECONDS if now - last_start > 60 else min(2 * pause, 16.0)
                    last_start, next_start = now, now + pause
                    gateway.stop()
                    gateway = start()
                register_new(link, home, registered)

    watch = threading.Thread(target=supervise, daemon=True)
    try:
        gateway.wait_for_port(own_name(host), port)
        watch.start()
        yield
    finally:
        done.set()
        if watch.ident:
            watch.join()
        gateway.stop()


def register_new(link: Link, home: Path, registered: set[str]) -> None:
    """Register the node key of every admitted site with the SuperLink, unless the key is in
    `registered`. Add the new keys to `registered`. link: the running SuperLink. home: the
    coordinator's home, which has the registry of sites."""
    for record in enrol.registry(home).values():
        if record.node not in registered:
            key = {record.name: record.node.encode()}
            api.register(link.address, link.ca, link.secret, key)
            registered.add(record.node)


@contextmanager
def study_grid(link: Link, home: Path) -> Iterator[Grid]:
    """A context manager that starts a run at the SuperLink and yields Flower's Grid, by which the
    rounds exchange messages with the sites. To get the Grid, this process takes the run's ServerApp
    task.
    Errors: InfrastructureError if the SuperLink offers no task within CLAIM_SECONDS."""
    content = bundle()
    digest = hashlib.sha256(content).hexdigest()
    api.start_run(link.address, link.ca, link.secret, content, digest)
    runtime = api.Runtime(link.address, link.secret, link.ca)
    try:
        deadline = time.monotonic() + CLAIM_SECONDS
        while (claim := runtime.acquire([api.SERVER_APP])) is None:
            if time.monotonic() > deadline:
                raise InfrastructureError("the SuperLink gives out no task for its run")
            time.sleep(0.1)
    finally:
        runtime.close()
    child = link.child
    with api.server_grid(link.address, link.ca, claim, give_up=lambda: not child.alive) as grid:
        yield grid


def bundle() -> bytes:
    """Return the app bundle that Flower requires for a run, a zip archive. It holds names and no
    code, since every machine runs the code that is installed there."""
    project = (
        '[project]\nname = "fedtune"\nversion = "1.0.0"\n'
        '[tool.flwr.app]\npublisher = "fedtune"\n'
        "[tool.flwr.app.components]\n"
        'serverapp = "fedtune.server.app:app"\nclientapp = "fedtune.launch.in_one_process:app"\n'
        "[tool.flwr.app.config]\n"
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pyproject.toml", project)
    return buffer.getvalue()


@contextmanager
def blaming(link: Child) -> Iterator[None]:
    """A context manager that replaces errors of its block by an InfrastructureError that names the
    SuperLink: HTTP errors always, and another InfrastructureError if the SuperLink has ended. link:
    the SuperLink's process."""
    try:
        yield
    except (httpx.HTTPError, InfrastructureError) as error:
        if not link.alive:
            raise link.build_end_error() from None
        if isinstance(error, InfrastructureError):
            raise
        raise InfrastructureError(
            f"the SuperLink refused a request ({type(error).__name__})", todo=f"read {link.log}"
        ) from None


class Members:
    """Maps each node of Flower's Grid to the site that is admitted with the node's key: a call with
    the Grid returns node -> Member. It asks the SuperLink for a node's key, and the registry of
    admitted sites for the key's site. Keys of nodes that have left are remembered.

    on_event: called with "admitted", "revoked", "connected" or "disconnected" and {name, text} for
    each change in registry and SuperLink since the last call; None for nobody."""

    def __init__(self, home: Path, on_event: OnEvent | None = None) -> None:
        self._home = home
        self._keys = dict[int, str]()
        self._asked = dict[str, tuple[int, int]]()
        self._on_event, self._here = on_event, set[str]()
        self._admitted: set[str] | None = None
        allowance.write(home, self._asked)

    def __call__(self, grid: Grid) -> dict[int, enrol.Member]:
        connected = api.node_keys(grid)
        self._keys |= connected
        records = {r.node: r for r in enrol.registry(self._home).values()}
        self._notify(
            {record.name for record in records.values()},
            {records[key].name for key in connected.values() if key in records},
        )
        members = {node: records[key] for node, key in self._keys.items() if key in records}
        return {node: enrol.Member(r.name, r.signing) for node, r in members.items()}

    def _notify(self, admitted: set[str], here: set[str]) -> None:
        before = (admitted if self._admitted is None else self._admitted, self._here)
        self._admitted, self._here = admitted, here
        if self._on_event is None:
            return
        changes = (
            ("admitted", admitted - before[0]),
            ("revoked", before[0] - admitted),
            ("connected", here - before[1]),
            ("disconnected", before[1] - here),
        )
        told = f"{len(here)} of {len(admitted)} admitted sites are connected"
        for event, names in changes:
            for name in sorted(names):
                self._on_event(event, {"name": name, "text": f"{name}: {event}; {told}"})

    def expect(self, grid: Grid, nodes: Iterable[int], most: int) -> None:
        """Allow each of the sites of `nodes` to send an answer of at most `most` bytes through the
        gateway. What is allowed to other sites is not changed. grid: Flower's Grid of the nodes."""
        members = self(grid)
        for name in {members[node].name for node in nodes if node in members}:
            count, _ = self._asked.get(name, (0, 0))
            self._asked[name] = (count + 1, most)
        allowance.write(self._home, self._asked)


def audit_events(home: Path, on_event: OnEvent | None) -> OnEvent:
    """Return a function that enters a study's decisions in the coordinator's audit log, and passes
    each event on to `on_event`. The audit log gets an entry for the study's start and its end, a
    site's refusal, a dropped update, and the release of another version. home: the coordinator's
    home."""
    acts = AuditLog(home, SigningKey.at(home / "signing.key"))

    def hear(event: str, data: dict[str, Any]) -> None:
        status = data.get("status")
        if event == "start":
            acts.add("start", plan=data["plan_digest"], study=data["study"], done=data["done"])
        elif event == "site" and status in ("refused", "dropped"):
            kind, rule = ("refuse" if status == "refused" else "drop"), reason_of(data["reason"])
            acts.add(kind, rule, once=16, site=data["name"], round=data["round"])
        elif event == "version" and data.get("promoted"):
            acts.add("release", "[schedule]", version=data["champion"])
        elif event == "done":
            acts.add("finish", run=Path(data["out"]))
        if on_event:
            on_event(event, data)

    return hear


def _ca(home: Path) -> str:
    return certs.ca(home)[1].public_bytes(certs.PEM).decode()


def _with_plan(study: Study, home: Path, on_event: OnEvent) -> OnEvent:
    """Return a function that passes each event on to `on_event`. After the event "start", when
    plan.json is stored, it also sends "ready", whose text says what the operator does next
    (`plan_made`)."""

    def hear(event: str, data: dict[str, Any]) -> None:
        on_event(event, data)
        if event == "start":
            on_event("ready", {"study": study.study.name, "text": plan_made(study, home)})

    return hear


def installed_rounds(home: Path, members: Members, terms: Terms, turn: Turn) -> Run:
    """Return the function that runs a study's rounds, server.rounds.run, with the settings of this
    home's consortium.

    - home: the coordinator's home. Its key signs plans and receipts, which are stored there.
    - members: maps the nodes of the grid to the admitted sites
    - terms: the settings that the person who starts the study chose
    - turn: decides when the study may work among other studies of this coordinator, and has the
      study's deadline

    The returned function takes grid, study, out, resume and on_event, as server.rounds.run does."""
    from fedtune.server import rounds
    from fedtune.server.parts import Dependencies, Settings

    key, receipts = SigningKey.at(home / "signing.key"), home / "receipts.json"
    parts = Dependencies(
        enrolled=members,
        expect=members.expect,
        settings=Settings(
            key=key,
            receipts=receipts,
            plan=home / enrol.PLAN,
            ca=_ca(home),
            registry=lambda: {
                name: {"node": record.node, "tls": record.tls}
                for name, record in enrol.registry(home).items()
            },
            waits=True,
            signing=terms.signing,
            anyway=terms.anyway,
            shares=terms.shares,
            turn=turn,
            clock=SystemClock(turn.pause),
        ),
    )
    return functools.partial(rounds.run, parts=parts)
