"""Clocks of a consortium that jump by hours in mid-study, one machine's or everybody's."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from fedtune.flower.ports import free_port
from tests.clocks import Clock, needs_compiler
from tests.network.kit import PRIVATE, SITES, Consortium, consortium
from tests.network.test_kills import Campaign

MACHINES = ("hub", *SITES)


@dataclass(frozen=True)
class Jump:
    """whose: the machines that it befalls; hours: how far their clocks are then ahead of the true
    time; until: what is said somewhere before they are put right, "" where they stay so."""

    whose: Sequence[str]
    hours: int
    until: str = ""


WRONG, BACK = "set the clocks of both ends (NTP)", "set this machine's clock (NTP)"
JUMPS = (
    Jump(["hub"], -6, BACK),
    Jump(["hub"], +6, WRONG),
    Jump(["east"], +6, WRONG),
    Jump(["north"], -6, WRONG),
    Jump(MACHINES, +6),
    Jump(MACHINES, -3),
)


class Jumps(Campaign):
    """One jump after each round but the last; a clock that is wrong is put right once a program
    has said so, as by a person who reads that."""

    def __init__(self, made: Consortium, jumps: Sequence[Jump]) -> None:
        super().__init__(made, len(jumps) + 1, 0, ())
        self.jumps, self.begun = jumps, 0
        self.before: dict[str, int] | None = None  # the logs' lengths, while a clock is wrong
        self.clocks = {"hub": Clock(made.hub)}
        for name in SITES:
            readable = made.root / name / "state" / "keys"  # by its courier, and what that starts
            readable.mkdir(mode=0o700, parents=True)
            self.clocks[name] = Clock(readable)
        for name, clock in self.clocks.items():
            made.where[name] = ["env", *(f"{k}={v}" for k, v in clock.environment.items())]

    def turn(self, names: Sequence[str], hours: int) -> None:
        for name in names:
            self.clocks[name].set(hours)

    def disturb(self, machines: dict[str, subprocess.Popen[bytes]], seconds: float) -> None:
        if self.before is not None:
            jump = self.jumps[self.begun - 1]
            if jump.until in self.said_since(self.before):
                self.turn(jump.whose, 0)
                self.before = None
                self.tell(f"[{seconds:5.0f} s  put right; {self.told()}]")
        elif self.begun < min(self.made.rounds(), len(self.jumps)):
            jump = self.jumps[self.begun]
            self.begun += 1
            self.turn(jump.whose, jump.hours)
            if jump.until:
                self.before = {name: len(self.log(name)) for name in MACHINES}
            self.tell(f"[{seconds:5.0f} s  {jump}; {self.told()}]")

    def log(self, name: str) -> str:
        return " ".join(self.made.log(name).read_text(errors="replace").split())

    def said_since(self, before: dict[str, int]) -> str:
        return " ".join(self.log(name)[length:] for name, length in before.items())


@pytest.mark.long
@needs_compiler
def test_clocks_that_jump_by_hours_in_mid_study(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every round is whole and charged once; what is signed with other times verifies."""
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        campaign = Jumps(made, JUMPS)
        made.lay_out(tiny_base, PRIVATE, campaign.rounds, round_timeout=60)
        campaign.tell = partial(print, flush=True)
        with capsys.disabled():
            campaign.run()
        campaign.check(private=True)
