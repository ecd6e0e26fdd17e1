"""Several studies at one coordinator, of processes as their people would start them."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from fedtune.flower.ports import free_port
from tests.network.kit import PRIVATE, SITES, STUDY, Consortium, consortium, done, until

ROUND = re.compile(r"^(\w+) +(\d+)/\d+ ", re.MULTILINE)


def lay_out(made: Consortium, base: Path, names: list[str], rounds: int) -> None:
    """Write the files of the sites, and a plan NAME.toml for each study."""
    made.lay_out(base, PRIVATE, rounds)
    plan = (made.hub / "study.toml").read_text()
    for name in names:
        (made.hub / f"{name}.toml").write_text(plan.replace('name = "small"', f'name = "{name}"'))


def server(made: Consortium, names: list[str], *more: object) -> subprocess.Popen[bytes]:
    plans = [f"{name}.toml" for name in names]
    return made._started("hub", made.hub, "server", *plans, "--port", made.port, *more)


def order(made: Consortium) -> list[str]:
    """The studies in the order of their rounds, as the server printed them."""
    return [name for name, _ in ROUND.findall(made.log("hub").read_text())]


def join_all(made: Consortium) -> None:
    until(made.listens, 120, made.told)
    for name in SITES:
        made.join(name)
        made.client(name)


@pytest.mark.long
def test_one_that_a_site_refuses_does_not_touch_the_others(tmp_path: Path, tiny_base: Path) -> None:
    names = ["alpha", "beta", "greedy"]
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        lay_out(made, tiny_base, names, rounds=3)
        plan = made.hub / "greedy.toml"
        plan.write_text(plan.read_text().replace("noise_multiplier = 4.0", "noise_multiplier = 0.9"))
        policy = made.root / "east" / "site.toml"
        policy.write_text(policy.read_text().replace("per_study = 50.0", "per_study = 12.0"))
        running = server(made, names, "--at-once", 3)
        join_all(made)
        until(lambda: running.poll() is not None, 400, made.told)
        assert running.wait() == 3, made.told()
        print(made.log("hub").read_text())
        print(done(made.hub, "status", "coordinator", "--once"))
