"""Run the courier, the process of a site that uses the network. `fedtune client` starts it.

Before it imports Flower, the courier confines itself. Then it can read only code, the site file and
the site's network keys. It can write only Flower's files and a renewed certificate, which both lie
on a disk in memory. It asks the vault over a socket that it inherits, or through a spool: a folder
into which the courier writes requests, and from which it reads answers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fedtune.core import boot, isolation
from fedtune.core.config import Site, load_site
from fedtune.core.config.database import FILES, file_of, kind_of, secrets_of
from fedtune.core.config.hospital import FILE as HOSPITAL
from fedtune.core.config.site import PASSWORD_FILE
from fedtune.core.errors import FedtuneError, InfrastructureError, Stopped
from fedtune.core.files.room import LEDGER as DATABASE
from fedtune.core.processes import end_with_parent, interruptible
from fedtune.core.wire.events import Teller, pass_warnings_on
from fedtune.core.wire.spool import Spool
from fedtune.flower.membership import keys_folder
from fedtune.flower.ports import bypass_proxy

if TYPE_CHECKING:
    from flwr.app import Context

    from fedtune.core.wire.requests import Answer, Request
    from fedtune.courier.app import Ask

FOLDER = "flower"  # the folder for files of Flower's processes, in the state folder
ELSEWHERE = "records elsewhere"  # the means by which a courier in its own container is confined
OWN = {FOLDER, "keys"}  # all that a state folder holds in a courier's own container
# Where Linux keeps programs, their libraries, certificates and the resolver's settings.
SYSTEM = (
    *("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/nix/store", "/gnu/store"),
    *("/run/systemd/resolve", "/var/lib/ca-certificates"),
)
ANSWER_SECONDS = (0.05, 0.5)  # shortest and longest pause between two checks for an answer's file
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def list_readable(site: Site, spool: Spool | None = None) -> list[Path]:
    """List the paths that a site's courier may read: programs, fedtune, the site file, the
    files that the site file's table [coordinator] names, the site's network keys, and the folder of
    answers if there is a spool. spool: None if the courier asks the vault over a socket."""
    code = [Path(sys.prefix), Path(sys.base_prefix)]
    code += [Path(entry) for entry in sys.path if entry.endswith("-packages")]
    code += [Path(boot.PACKAGES, "fedtune"), Path(boot.PACKAGES, "client")]
    named = [site.file] if site.file else []
    if table := site.coordinator:
        named += [path for path in (table.answer, table.proxy_ca) if path]
    answers = [spool.answers] if spool else []
    return [*map(Path, SYSTEM), *code, *named, keys_folder(site), *answers]


def list_writable(site: Site, spool: Spool | None = None) -> list[Path]:
    """List the paths that a site's courier may write: Flower's files in the state folder, the
    folder of requests if there is a spool, and some devices. spool: None if the courier asks the
    vault over a socket."""
    requests = [spool.requests] if spool else []
    return [site.site.state / FOLDER, *requests, *map(Path, DEVICES)]


def list_private(site: Site) -> Iterator[Path]:
    """Yield the paths that a site's courier must not read:

    - the site's state and ledger, and its hospital's settings
    - its records, and the records of [evaluation] and [acceptance]
    - the files of passwords and other secrets for the databases of these records, and the files
      that their consent tables name
    - a model that the site trained by itself, for comparison, and which no ε covers"""
    yield site.site.state
    if site.hospital:
        yield from (site.home / DATABASE, site.home / HOSPITAL)
    if site.site.ledger:
        yield site.site.ledger
    if site.acceptance and site.acceptance.alone:
        yield site.acceptance.alone
    for table in filter(None, (site.data, site.evaluation, site.acceptance)):
        if table.url is None:
            yield table.path
        elif kind_of(table.url) in FILES:
            yield file_of(table.url)
        if table.url:
            yield from secrets_of(table.url)
        if password := table.options.get(PASSWORD_FILE):
            yield Path(str(password))
        if table.consent:
            yield from filter(None, (table.consent.opt_outs, table.consent.salt_file))


def open_to_courier(site: Site, spool: Spool | None = None) -> list[Path]:
    """List the site's private files that cannot be hidden from its courier, since they lie in a
    folder that the courier must read. spool: None if the courier asks the vault over a socket."""
    shared = [path.resolve() for path in list_readable(site, spool) if path != keys_folder(site)]
    own = [path.resolve() for path in list_private(site)]
    return [path for path in own if any(path.is_relative_to(folder) for folder in shared)]


def describe_open_files(site: Site, spool: Spool | None = None) -> list[str]:
    """Return a text, for the person at the site, about each private file that lies in a folder
    which the courier must read. spool: None if the courier asks the vault over a socket."""
    read = open_to_courier(site, spool)
    return [f"{path} lies where the courier reads its code" for path in read]


def confine(site: Site, spool: Spool | None = None) -> isolation.Confinement:
    """Confine this process to the files that a site's courier may read and write, then test this by
    trying to read the private ones. Return the confinement that is in force; its `missing` lists in
    words what stays open. spool: None if the courier asks the vault over a socket."""
    is_elsewhere = not _try_to_read(site).missing
    read, write = list_readable(site, spool), list_writable(site, spool)
    own = isolation.own_view([*read, *write], [site.site.state / FOLDER])
    found = isolation.only_files(read, write, [Path(boot.PACKAGES)])
    found = own & found
    if is_elsewhere:  # in a container of its own there is no private file to hide by Landlock
        kept = (isolation.NO_LANDLOCK, isolation.NO_VIEW)
        left = tuple(each for each in found.missing if each not in kept)
        found = isolation.Confinement((*found.means, ELSEWHERE), left, found.reasons)
    shown = isolation.Confinement(missing=tuple(describe_open_files(site, spool)))
    return found & shown & _try_to_read(site)


def _try_to_read(site: Site) -> isolation.Confinement:
    """Try to read each of the site's private files. Return a confinement whose `missing` (the ways
    that stay open) names each file that could be read."""
    reached = []
    for path in list_private(site):
        with suppress(OSError):
            if path == site.site.state:
                if not {*os.listdir(path)} - OWN:
                    continue
            elif path.is_dir():
                os.listdir(path)
            else:
                os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            reached.append(f"the courier can read {path}")
    return isolation.Confinement(missing=tuple(reached))


def main(options: list[str]) -> NoReturn:
    """Run a site's courier until a signal arrives or, with ONCE, the coordinator has gone. Then end
    the process.

    options: SITE REQUESTS EVENTS ONCE PATIENCE, which are:

    - SITE: the site file
    - REQUESTS: the descriptor of the socket to the vault, or the folder of a spool
    - EVENTS: the descriptor to which events are sent, for the process that started this one
    - ONCE: "once", or "" to run without end
    - PATIENCE: for how many seconds to try again while the coordinator does not accept this site"""
    path, requests, events, once, patience = options
    site = load_site(Path(path), alone=True)
    os.environ["TMPDIR"] = str(site.site.state / FOLDER)
    spool = None if requests.isdigit() else Spool(Path(requests))
    means = confine(site, spool)
    end_with_parent()
    tell = Teller(Connection(int(events)))
    pass_warnings_on(tell)
    tell("isolation", means.facts())
    if means.missing and site.policy.isolation == "required":
        sys.exit(0)  # the process that started this one reports the reason
    bypass_proxy()
    code = 0
    try:
        with interruptible():
            ask = by_file(spool) if spool else by_socket(Connection(int(requests)))
            _run(site, Path(path), ask, tell, once == "once", float(patience))
    except Stopped as stop:
        tell("stopped", {"reason": f"stopped by {stop.name}", "text": f"stopped by {stop.name}"})
    except FedtuneError as error:
        tell.error(error)
        code = error.exit_code
    else:
        tell("ended", {"text": "the coordinator has finished"})
    sys.exit(code)


def by_socket(vault: Connection) -> Ask:
    """Return a function that sends a request to the vault at the other end of a socket, and returns
    the answer."""

    def ask(_: Context, request: Request, seconds: float) -> Answer:
        from fedtune.core.wire.requests import receive_answer, send

        send(vault, request)
        return receive_answer(vault)

    return ask


def by_file(spool: Spool) -> Ask:
    """Return a function that asks the vault through a spool: the function writes a request to a
    file, waits for the file with the answer, and returns the answer. Before this, remove all
    requests that an earlier courier left in the spool, since nobody waits for their answers."""
    from fedtune.flower.polling import Poll

    spool.withdraw_all()

    def ask(_: Context, request: Request, seconds: float) -> Answer:
        """Write a request, wait for its answer, and withdraw the request in any case. Errors:
        InfrastructureError if no answer came within `seconds`, the time that the coordinator
        waits."""
        ends, poll = time.monotonic() + seconds, Poll(*ANSWER_SECONDS)
        name = spool.ask(request)
        try:
            while (answer := spool.answer_to(name)) is None:
                if time.monotonic() > ends:
                    raise InfrastructureError("the vault has not answered in time")
                poll.pause()
            return answer
        finally:
            spool.withdraw(name)

    return ask


def _run(site: Site, path: Path, ask: Ask, tell: Teller, once: bool, patience: float) -> None:
    """Connect to the coordinator, and answer its messages until the work is done.

    - site: the settings of this site, with its network keys and its table [coordinator]
    - path: the site file, for the errors' texts
    - ask: sends a request to the vault, and returns the answer
    - tell: sends an event to the process that started this one
    - once: whether the work is done when the coordinator has gone; else this runs without end
    - patience: seconds for which to try again while the coordinator does not accept this site"""
    from fedtune.courier.app import client_app
    from fedtune.courier.executor import Executor
    from fedtune.flower.forwarder import Forwarder
    from fedtune.flower.link import link

    state = site.site.state / FOLDER

    def keep(certificate: bytes) -> None:
        """Send a renewed certificate to the process that stores it on the site's disk. The courier
        cannot write there."""
        tell("renewed", {"certificate": certificate.decode()})

    with Forwarder(replace(link(site, path), own=state), state, on_renewed=keep) as forwarder:
        Executor(client_app(ask), tell, once).run_supernodes(state, forwarder, patience)
