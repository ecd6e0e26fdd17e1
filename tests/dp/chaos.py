"""Processes that tests of the ledger start, race and kill. Light: nothing here imports torch.

python chaos.py race FOLDER CEILING           reserve until refused; prints how many succeeded
python chaos.py race-unlocked FOLDER CEILING  the same, the ceiling checked outside the lock
python chaos.py open FOLDER 0                 open a ledger that may not exist yet
python chaos.py fill FOLDER BYTES ...         two rounds under each limit on file size
python chaos.py serve                         forks a site per line of stdin, see `serve`
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sys
from pathlib import Path

from fedtune.core.errors import BudgetExceeded
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger, LedgerError

STUDY = "sha256:" + "5d" * 32


def charge(round_: int) -> Charge:
    return Charge(STUDY, "s", round_, 1.0, 0.1, 4, 1, 1.0, "record", "first", 8.0)


def yes(charges: list[Charge]) -> None:
    """A permit that allows everything."""


def race(folder: Path, ceiling: int, locked: bool) -> int:
    ledger, done = Ledger(folder), 0

    def permit(charges: list[Charge]) -> None:
        if len(charges) >= ceiling:
            raise BudgetExceeded("the ceiling")

    while True:
        try:
            if not locked:
                permit(ledger.charges("notes"))
                meet(folder, f"{ceiling}.{done}")
            ledger.reserve("notes", charge(done), "adapter", permit if locked else yes)
            done += 1
        except BudgetExceeded:
            return done


def meet(folder: Path, step: str) -> None:
    """Wait (at most ten seconds) until the other process stands at this step too, after its check:
    both then charge for what each of them saw."""
    import time

    (folder / f"met.{step}.{os.getpid()}").touch()
    end = time.monotonic() + 10
    while len(list(folder.glob(f"met.{step}.*"))) < 2 and time.monotonic() < end:
        time.sleep(0.001)


def fill(folder: Path, limit: int) -> None:
    """Print how many updates would have been sent, and what stopped it."""
    ledger, sent, stopped = Ledger(folder), 0, ""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        for round_ in (100, 101):
            number = ledger.reserve("notes", charge(round_), str(limit), yes)
            ledger.release(number, os.urandom(2048))
            sent += 1
    except LedgerError as error:
        stopped = f"LedgerError {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(sent, stopped)


def site(folder: Path, round_: int, order: str) -> None:
    """Rounds from `round_` on, for ever; a line before each noised training and each send.

    order: "reserve first" as the ledger wants it, or a twin that breaks it."""
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann", b"bob"])
    while True:
        body = ledger.released(STUDY, round_, "adapter")
        if body is None:
            body = _trained(ledger, round_, order)
        _say("S", round_, hashlib.sha256(body).hexdigest())
        round_ += 1


def _trained(ledger: Ledger, round_: int, order: str) -> bytes:
    number = ledger.reserve("notes", charge(round_), "adapter", yes) if order == "right" else 0
    body = os.urandom(2048)
    _say("T", round_, hashlib.sha256(body).hexdigest())
    if order == "reserve after sending":
        _say("S", round_, hashlib.sha256(body).hexdigest())
        number = ledger.reserve("notes", charge(round_), "adapter", yes)
    if order == "send before release":
        number = ledger.reserve("notes", charge(round_), "adapter", yes)
        _say("S", round_, hashlib.sha256(body).hexdigest())
    ledger.release(number, body)
    return body


def _say(what: str, round_: int, digest: str) -> None:
    os.write(1, f"{what} {round_} {digest}\n".encode())  # one write: whole or not at all


def serve() -> None:
    """For each line "FOLDER<tab>ROUND<tab>ORDER": fork a site, print its pid; then on the next
    line wait until it is dead and print "dead"."""
    for line in sys.stdin:
        folder, round_, order = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            site(Path(folder), int(round_), order)
        os.write(1, f"pid {child}\n".encode())
        sys.stdin.readline()
        os.waitpid(child, 0)
        os.write(1, b"dead\n")


def main(mode: str, *rest: str) -> None:
    if mode == "serve":
        serve()
    elif mode == "fill":
        for limit in rest[1:]:
            fill(Path(rest[0]), int(limit))
    elif mode == "open":
        Ledger(Path(rest[0]))
        print(0)
    else:
        print(race(Path(rest[0]), int(rest[1]), locked=mode == "race"))


if __name__ == "__main__":
    main(*sys.argv[1:])
