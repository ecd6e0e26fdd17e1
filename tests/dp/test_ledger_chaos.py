"""Kills at random moments, and power cuts at every moment: no update leaves the site unpaid."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.dp.ledger import Ledger
from tests.dp.chaos import STUDY

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

    def killed_after(self, seconds: float, order: str = "right") -> None:
        """Run a site from the first round that it did not report as sent; kill it."""
        round_ = max(self.sent, default=0) + 1
        pid = int(self._ask(f"{self.folder}\t{round_}\t{order}", "pid").split()[1])
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        self._ask("", "dead")

    def _ask(self, line: str, answer: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for said in self.process.stdout:
            if said.startswith(answer):
                return said
            what, round_, digest = said.split()
            (self.trained if what == "T" else self.sent)[int(round_)].append(digest)
        raise AssertionError("the parent of the sites has died")


def wrongs(sites: Sites) -> Iterator[str]:
    """What the ledger owes to what the sites did. Opening it may not fail."""
    ledger = Ledger(sites.folder)
    ledger.verify()
    spent = ledger.spending("notes") if ledger.datasets else []
    charged: dict[int, int] = defaultdict(int)
    released: dict[int, int] = defaultdict(int)
    for one in spent:
        charged[one.charge.round] += 1
        released[one.charge.round] += one.released
    for round_, bodies in sites.trained.items():
        if charged[round_] < len(bodies):
            yield f"round {round_}: noise drawn {len(bodies)} times, charged {charged[round_]} times"
    for round_, sent in sites.sent.items():
        if len(set(sent)) > 1:
            yield f"round {round_}: different updates were sent"
        if not released[round_]:
            yield f"round {round_}: sent, and no entry says so"
        if ledger.released(STUDY, round_, "adapter") is None:
            yield f"round {round_}: cannot be sent again"


@pytest.mark.parametrize("kills", [100, pytest.param(1_000, marks=pytest.mark.long)])
def test_a_killed_site_is_never_undercharged(tmp_path: Path, kills: int) -> None:
    draw = random.Random()
    with Sites(tmp_path / "state") as sites:
        for _ in range(kills):
            sites.killed_after(draw.uniform(0, 0.12))
            assert list(wrongs(sites)) == []
        # The kills fell into every part of a round: some reservations were never released.
        spent = Ledger(sites.folder).spending("notes")
        assert 0 < sum(not one.released for one in spent) < len(spent)
        assert len(sites.sent) > kills / 10


@pytest.mark.parametrize("order", ["reserve after sending", "send before release"])
def test_a_site_with_another_order_is_caught(tmp_path: Path, order: str) -> None:
    """The twins: at least one of 150 kills shows that something left unpaid or cannot be resent."""
    draw = random.Random()
    with Sites(tmp_path / "state") as sites:
        for _ in range(150):
            sites.killed_after(draw.uniform(0, 0.12), order)
            if list(wrongs(sites)):
                return
    raise AssertionError("150 kills found nothing wrong")
