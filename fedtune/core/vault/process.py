"""Run the vault: the process of a site that holds its records; `fedtune client` starts it.

The vault has no network. It answers the courier over the socket that it inherits, or through the
files of a spool (a folder that both can use), and opens no other socket, except to a database over
TCP that holds the records. `isolation.no_network` describes how this is enforced. The vault reads
records, keeps the ledger and the keys, and sends its progress to the process that started it."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.core import isolation
from fedtune.core.config import Site, load_site
from fedtune.core.config.checked import load_checked
from fedtune.core.config.database import is_over_tcp, kind_of
from fedtune.core.errors import InfrastructureError, Stopped, describe, is_fault
from fedtune.core.files import locks
from fedtune.core.processes import STOP_SECONDS, alone, end_with_parent, interruptible
from fedtune.core.progress import listening
from fedtune.core.wire.events import Teller, pass_warnings_on
from fedtune.core.wire.requests import FAILED, Answer, Request, RequestError, receive_request, send
from fedtune.core.wire.spool import Spool, decode_request

if TYPE_CHECKING:
    from fedtune.core.vault.answers import Place

log = logging.getLogger("fedtune.client")
HOME = "ranks"  # folder in the state folder: the vault's lock, and files of its other processes
LOOK = 0.2  # seconds between two looks into a spool
LAST_MOMENTS = 2 * STOP_SECONDS  # seconds that a vault may take to end after its client


def families(site: Site, processes: int) -> list[int]:
    """Return the socket families (socket.AF_INET and others) that a site's vault may open: none,
    except for a database server that holds the records, or for the processes that share the vault's
    steps.

    processes: how many processes share each step, the vault included."""
    tables = filter(None, (site.data, site.evaluation))
    urls = [table.url for table in tables if table.url]
    if any(map(is_over_tcp, urls)):
        return [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX]
    teams = processes > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1
    by_socket = any(kind_of(url) == "postgresql" for url in urls)
    return [socket.AF_UNIX] if teams or by_socket else []


def confine(site: Site, processes: int) -> isolation.Confinement:
    """Cut this process off the network, then test this by trying to reach one. Return what confines
    the process now; the field `missing` lists in words what stays open, such as a network that was
    reached.

    processes: how many processes share each step, the vault included."""
    return isolation.no_network(families(site, processes)) & _try_networks()


def _try_networks() -> isolation.Confinement:
    """Try to reach a network over IPv4 and over IPv6. Return a Confinement whose field `missing`
    names each of the two that could be reached; its other fields are empty."""
    reached = []
    for family, where in ((socket.AF_INET, ("127.0.0.1", 9)), (socket.AF_INET6, ("::1", 9))):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)
            reached.append(f"the vault can reach {where[0]}")
    return isolation.Confinement(missing=tuple(reached))


def main(options: list[str]) -> None:
    """Answer requests until the courier has ended, or a signal comes. End at once if the process is
    not confined and policy.isolation is "required".

    Guarantee: the records that are read, the ledger that pays and all that the coordinator is told
    follow from the tables in CHECKED. The site file gives the policy alone (`with_new_policy`).

    options: SITE REQUESTS EVENTS PROCESSES PLACE CHECKED [NAME], which are:

    - SITE: the site file
    - REQUESTS: the descriptor of the connection to the courier, or the folder of a spool
    - EVENTS: the descriptor to which events are sent, for the process that started this one
    - PROCESSES: how many processes share each step
    - PLACE: as JSON, the fields of `Place` (how the site takes part) other than the site file
    - CHECKED: the file of the tables that were checked when a person started this site
    - NAME: the one request of the spool to answer; without it all are answered

    Errors: ConfigError if the site file or CHECKED cannot be read."""
    path, requests, events, processes, given, checked, *name = options
    site = load_checked(Path(checked), Path(path))
    required = load_site(Path(path), alone=True).policy.isolation == "required"
    means = confine(site, int(processes))
    end_with_parent()
    tell = Teller(Connection(int(events)))
    pass_warnings_on(tell)
    tell("isolation", means.facts())
    if means.missing and required:
        return  # who started it says why
    from fedtune.core.bases.find import fetching_elsewhere

    with (
        suppress(Stopped),
        interruptible(),
        _alone(site),
        listening(tell.step),
        fetching_elsewhere(tell.fetch),
    ):
        from fedtune.core.vault.worker import start_worker

        start_worker(path, site)
        rest = tell, int(processes), json.loads(given)
        if requests.isdigit():
            serve(Path(path), Connection(int(requests)), *rest)
        elif name:
            serve_request(Path(path), Spool(Path(requests)), *rest, name[0])
        else:
            serve_spool(Path(path), Spool(Path(requests)), *rest)


@contextmanager
def _alone(site: Site) -> Iterator[None]:
    """A context manager: hold the locks of a site's vault during the block. If a vault whose client
    was killed still holds them, wait up to LAST_MOMENTS for its end. Errors: InfrastructureError if
    it does not end."""
    deadline = time.monotonic() + LAST_MOMENTS
    while True:
        with ExitStack() as held:
            try:
                held.enter_context(locked(site, "the vault of a client that has ended"))
            except InfrastructureError:
                if time.monotonic() > deadline:
                    raise
            else:
                yield
                return
        time.sleep(0.1)


@contextmanager
def locked(site: Site, who: str) -> Iterator[None]:
    """A context manager: during the block, hold the lock of a site's vault and, if the site is a
    membership of a hospital, the lock of this membership. who: the words by which the error names
    another process that holds a lock. Errors: InfrastructureError if another process holds one."""
    with ExitStack() as held:
        held.enter_context(alone(site.site.state / HOME, who))
        if site.hospital:
            held.enter_context(vault_of(site.home, site.hospital.membership))
        yield


def vault_of(home: Path, membership: str) -> AbstractContextManager[bool]:
    """Return a context manager that holds, during the block, the lock of a membership's vault. A
    running vault holds this lock, so that nobody restores the hospital's ledger meanwhile. The
    lock is in `home`, the folder of this ledger, wherever the membership's site file lies. The
    context manager yields True if the last process that held the lock was killed. Errors:
    InfrastructureError that names the running vault."""
    lock = home / f"vault-{membership}.lock"
    return locks.hold_alone(lock, f"vault of membership {membership!r}", home)


def serve(
    path: Path, courier: Connection, tell: Teller, processes: int, given: dict[str, object]
) -> None:
    """Answer the courier's requests until the courier has ended, or sends a message whose end
    cannot be found. A message that can be read but is no request is answered with a failure.

    - path: the site file
    - courier: this process's end of the connection to the courier
    - tell: sends events about the work to the process that started this one
    - processes: how many processes of the site share each step, this one included
    - given: the fields of `Place` (how the site takes part) other than the site file, by name"""
    from fedtune.core.vault.answers import Place
    from fedtune.core.vault.rank_process import team

    place = Place(site=str(path), **given)  # type: ignore[arg-type]
    with team(path, processes), suppress(EOFError, OSError):
        tell("ready", {})
        while True:
            reply = _reply(partial(receive_request, courier), place, tell)
            _pass_back(partial(send, courier), reply)


def serve_spool(
    path: Path, spool: Spool, tell: Teller, processes: int, given: dict[str, object]
) -> None:
    """Answer the requests of a spool, the oldest first, until a signal comes. A request whose
    answer cannot be written is answered again later: from the ledger, with the same bytes.

    - path: the site file
    - spool: the folder of requests and answers that this process shares with the courier
    - tell: sends events about the work to the process that started this one
    - processes: how many processes of the site share each step, this one included
    - given: the fields of `Place` (how the site takes part) other than the site file, by name"""
    from fedtune.core.vault.answers import Place
    from fedtune.core.vault.rank_process import team

    place, said = Place(site=str(path), **given), ""  # type: ignore[arg-type]
    spool.remove_drafts()
    with team(path, processes):
        tell("ready", {})
        while True:
            try:
                for name in spool.waiting():
                    if (content := spool.take(name)) is not None:
                        reply = _reply(partial(decode_request, content), place, tell)
                        _pass_back(partial(spool.put, name), reply)
                spool.remove_answered()
                said = ""
            except InfrastructureError as error:
                if str(error) != said:
                    log.warning("%s", said := str(error))
            time.sleep(LOOK)


def serve_request(
    path: Path, spool: Spool, tell: Teller, processes: int, given: dict[str, object], name: str
) -> None:
    """Answer one request of a spool. This process was started for this one request, and knows no
    plan. So if the request orders a round, first answer the stored request that brought the order's
    plan, and drop that answer.

    - path: the site file
    - spool: the folder of requests and answers that this process shares with the courier
    - tell: sends events about the work to the process that started this one
    - processes: how many processes of the site share each step, this one included
    - given: the fields of `Place` (how the site takes part) other than the site file, by name
    - name: the name of the request's file in the spool

    Errors: InfrastructureError if the request is missing, or its answer cannot be written."""
    from fedtune.core.vault.answers import Place, answer
    from fedtune.core.vault.kept_plans import find_plan_request, keep_plan_request
    from fedtune.core.vault.rank_process import team

    place = Place(site=str(path), **given)  # type: ignore[arg-type]
    site = place.worker().site
    spool.remove_drafts()
    content = spool.take(name)
    if content is None:
        raise InfrastructureError(f"{spool.requests}: no request {name} that can be answered")
    with team(path, processes):
        try:
            request = decode_request(content)
        except RequestError as error:
            log.warning("%s", error)
            reply = failure()
        else:
            if asked := find_plan_request(site, request):
                answer(place, asked)
            reply = answer_and_tell(place, request, tell)
            keep_plan_request(site, request, content, reply)
        _pass_back(partial(spool.put, name), reply)


def _reply(receive: Callable[[], Request], place: Place, tell: Teller) -> Answer:
    """Receive one request and answer it. If the bytes that were received are no request, return a
    failure. receive: waits for a request and returns it; place: the site, and how it takes part;
    tell: sends events to the process that started this one."""
    try:
        request = receive()
    except RequestError as error:
        log.warning("%s", error)
        return failure()
    return answer_and_tell(place, request, tell)


def _pass_back(put: Callable[[Answer], None], reply: Answer) -> None:
    """Pass an answer to the courier. Pass a failure if the answer is longer than a courier reads,
    such as an update of more than 4 GiB. put: sends an answer, or writes it to a file."""
    try:
        put(reply)
    except RequestError as error:
        log.warning("%s", error)
        put(failure())


def answer_and_tell(place: Place, request: Request, tell: Teller) -> Answer:
    """Answer a request and return the answer; also send a description of the answer to this site's
    screen. If answering fails with an unexpected error, return `failure()`; the screen gets the
    error's name. place: the site, and how it takes part; tell: sends events to the process that
    started this one."""
    from fedtune.core.vault.answers import answer
    from fedtune.core.vault.reply_facts import answer_facts

    try:
        reply = answer(place, request)
    except BaseException as error:
        if not is_fault(error):
            raise
        name = type(error).__name__
        tell("failed", {"kind": request.kind, "error": name, "text": f"{request.kind}: {name}"})
        return failure()
    try:
        facts = answer_facts(place, request, reply)
    except Exception as error:  # its description fails; the answer does not
        log.warning("this answer cannot be described: %s", describe(error))
        text = f"{request.kind}: {reply.status}; {describe(error)}"
        facts = {"status": reply.status, "error": type(error).__name__, "text": text}
    tell("answered", facts)
    return reply


def failure() -> Answer:
    """Return an answer that says that there was a failure, but not which."""
    return Answer("", {"status": "failed", "reason": FAILED})
