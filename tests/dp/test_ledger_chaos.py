"""Kills at random moments, and power cuts at every moment: no update leaves the site unpaid."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.ledger import chain
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.core.wire.seal import receipt
from tests.dp.chaos import STUDY, charge, yes
from tests.dp.powercut import Disk, Op, images, put

CHAOS = Path(__file__).with_name("chaos.py")


class Sites:
    """Site processes, forked from one that is light, and what they said before they were killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained: dict[int, list[str]] = defaultdict(list)
        self.sent: dict[int, list[str]] = defaultdict(list)
        self.process = subprocess.Popen(
            [sys.executable, CHAOS, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Sites:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()

    def window(self, order: str = "right") -> float:
        """Seconds that three rounds take here: kills are drawn from it."""
        started = time.monotonic()
        self._start(order)
        while len(self.sent) < 4:
            self._read()
            if len(self.sent) == 1:
                started = time.monotonic()
        took = time.monotonic() - started
        self._kill()
        return max(took, 0.01)

    def killed_after(self, seconds: float, order: str = "right") -> None:
        """Run a site from the first round that it did not report as sent; kill it."""
        self._start(order)
        time.sleep(seconds)
        self._kill()

    def _start(self, order: str) -> None:
        round_ = max(self.sent, default=0) + 1
        self._pid = int(self._ask(f"{self.folder}\t{round_}\t{order}", "pid").split()[1])

    def _kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._ask("", "dead")

    def _ask(self, line: str, answer: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        while not (said := self._read()).startswith(answer):
            pass
        return said

    def _read(self) -> str:
        """One line; a report is also kept."""
        assert self.process.stdout
        said = self.process.stdout.readline()
        assert said, "the parent of the sites has died"
        if said[0] in "TS":
            what, round_, digest = said.split()
            (self.trained if what == "T" else self.sent)[int(round_)].append(digest)
        return said


def wrongs(sites: Sites) -> Iterator[str]:
    """What the ledger owes to what the sites did. Opening it may not fail."""
    ledger = Ledger(sites.folder)
    spent = ledger.spending("notes") if ledger.datasets else []
    charged: dict[int, int] = defaultdict(int)
    released: dict[int, int] = defaultdict(int)
    for one in spent:
        charged[one.charge.round] += 1
        released[one.charge.round] += one.released
    for round_, bodies in sites.trained.items():
        if charged[round_] < len(bodies):
            yield f"round {round_}: noise drawn {len(bodies)} times, charged {charged[round_]}"
    for round_, sent in sites.sent.items():
        if len(set(sent)) > 1:
            yield f"round {round_}: different updates were sent"
        if not released[round_]:
            yield f"round {round_}: sent, and no entry says so"
        is_newest = not any(released[later] for later in released if later > round_)
        if is_newest and ledger.released(STUDY, round_, "adapter") is None:
            yield f"round {round_}: cannot be sent again"


@pytest.mark.parametrize("kills", [100, pytest.param(1_000, marks=pytest.mark.long)])
def test_a_killed_site_is_never_undercharged(tmp_path: Path, kills: int) -> None:
    draw = random.Random()
    with Sites(tmp_path / "state") as sites:
        window = sites.window()
        for _ in range(kills):
            before = len(sites.sent)
            sites.killed_after(draw.uniform(0, window))
            assert list(wrongs(sites)) == []
            # The machine gets slower and faster: let one kill in about three come after a send.
            window *= 0.8 if len(sites.sent) > before else 1.12
        # The kills fell into every part of a round: some reservations were never released.
        ledger = Ledger(sites.folder)
        ledger.verify()
        spent = ledger.spending("notes")
        assert 0 < sum(not one.released for one in spent) < len(spent)
        assert len(sites.sent) > kills / 10


@pytest.mark.parametrize("order", ["reserve after sending", "send before release"])
def test_a_site_with_another_order_is_caught(tmp_path: Path, order: str) -> None:
    """The twins: one of 600 kills shows that something left unpaid or cannot be resent; the first
    did in 30 of 30 runs."""
    draw = random.Random()
    with Sites(tmp_path / "state") as sites:
        window = sites.window(order)
        for _ in range(600):
            before = len(sites.sent)
            sites.killed_after(draw.uniform(0, window), order)
            if list(wrongs(sites)):
                return
            window *= 0.8 if len(sites.sent) > before else 1.12  # as above
    raise AssertionError("600 kills found nothing wrong")


# ----------------------------------------------------------------------------------- power cuts


@dataclass
class Owed:
    """What the site had promised, and the receipts that the coordinator held, at the cut."""

    reserved: Counter[int]
    sent: dict[int, bytes]
    receipts: list[dict[str, Any]]


def owed(log: list[Op]) -> Owed:
    found = Owed(Counter(), {}, [])
    for op in log:
        if op[0] == "reserved":
            found.reserved[op[1]] += 1
        elif op[0] == "sent":
            found.sent[op[1]] = op[2]
            found.receipts.append(op[3])
    return found


COORDINATOR = SigningKey()


def recorded(folder: Path, patch: pytest.MonkeyPatch, pragmas: Sequence[str]) -> Disk:
    """Four rounds, the third interrupted once; the coordinator countersigns each update's head."""
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann", b"bob"])
    ledger.release(ledger.reserve("notes", charge(0), "adapter", yes), b"first")
    disk = Disk(folder, pragmas)
    with patch.context() as patched:
        disk.install(patched)
        ledger, last = Ledger(folder), None
        for round_ in (1, 2, 3, 3, 4):
            if last:
                ledger.accept_receipt(last, COORDINATOR.public)
            number = ledger.reserve("notes", charge(round_), "adapter", yes)
            disk.log.append(("reserved", round_))
            if round_ == 3 and disk.log.count(("reserved", 3)) == 1:
                continue
            body = os.urandom(1500)
            ledger.release(number, body)
            last = receipt(COORDINATOR, ledger.head_statement())
            disk.log.append(("sent", round_, body, last))
    return disk


def after_cut(image: dict[str, bytes], promised: Owed, folder: Path, receipts: bool) -> str:
    """ "paid", "noticed", or what is wrong, silently."""
    put(image, folder)
    try:
        ledger = Ledger(folder)
        for held in promised.receipts[-1:] if receipts else ():
            ledger.accept_receipt(held, COORDINATOR.public)
        charged = Counter(one.round for one in ledger.charges("notes"))
    except LedgerError:
        return "noticed"
    for round_, body in promised.sent.items():
        if not charged[round_]:
            return "sent and not charged"
        kept = ledger.released(STUDY, round_, "adapter")
        if receipts and kept != body:
            return "sent and not kept" if kept is None else "sent and altered"
    if promised.reserved - charged:
        return "reserved and not charged"
    return "paid"


def outcomes(
    disk: Disk, to: Path, lies: float = 0.0, each: int = 1, receipts: bool = True
) -> Counter[str]:
    """How often a cut ended how. Images that were seen before are left out."""
    draw, seen, found = random.Random(), set[bytes](), Counter[str]()
    for log, image in images(disk, draw, lies, each):
        promised = owed(log)
        name = canonical(
            {"image": {p: c.hex() for p, c in image.items()}, "owed": len(promised.sent)}
            | {"reserved": sum(promised.reserved.values())}
        )
        if (digest := hashlib.sha256(name).digest()) not in seen:
            seen.add(digest)
            found[after_cut(image, promised, to / str(len(seen)), receipts)] += 1
            shutil.rmtree(to / str(len(seen)))
    return found


EACH = [1, pytest.param(25, marks=pytest.mark.long)]


@pytest.mark.parametrize("each", EACH)
def test_a_power_cut_loses_nothing_that_was_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    disk = recorded(tmp_path / "state", monkeypatch, chain.PRAGMAS)
    found = outcomes(disk, tmp_path, each=each)
    assert set(found) == {"paid"} and found["paid"] > 100, found


def test_a_ledger_that_does_not_sync_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: the same with synchronous = OFF."""
    disk = recorded(tmp_path / "state", monkeypatch, ["synchronous = OFF"])
    assert set(outcomes(disk, tmp_path)) != {"paid"}


@pytest.mark.parametrize("each", EACH)
def test_a_disk_that_lies_about_syncs_is_noticed_or_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    disk = recorded(tmp_path / "state", monkeypatch, chain.PRAGMAS)
    found = Counter[str]()
    for lies in (0.5, 1.0):
        found += outcomes(disk, tmp_path, lies, each)
    # Such a disk may forget a reservation whose update was never sent (nothing left the site), and
    # the copy of an update that was sent (it is then trained, and paid, again).
    harmless = {"paid", "noticed", "reserved and not charged", "sent and not kept"}
    assert set(found) <= harmless and found["noticed"] > 0, found


def test_without_receipts_a_lying_disk_undercharges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: everything lost alike leaves nothing that this machine could notice."""
    disk = recorded(tmp_path / "state", monkeypatch, chain.PRAGMAS)
    assert outcomes(disk, tmp_path, lies=1.0, receipts=False)["sent and not charged"] > 0
