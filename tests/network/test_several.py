"""Several studies at one coordinator, of processes as their people would start them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.several import STOPPED
from fedtune.core.dp.steplog import StepLog
from fedtune.flower.ports import free_port
from tests.network.kit import PRIVATE, SITES, Consortium, children, consortium, done, end, until

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


def end_all(made: Consortium) -> None:
    for process in made.running:
        end(process)


def join_all(made: Consortium) -> None:
    until(made.listens, 120, made.told)
    for name in SITES:
        made.join(name)
        made.client(name)


def check(made: Consortium, names: list[str], rounds: int) -> None:
    """Check that each run is whole, and that no site paid for a round that is not in it, or took
    part in one that it did not pay."""
    for name in names:
        done(made.hub, "verify", f"runs/{name}", "--trust", made.fingerprint)
        report = json.loads((made.hub / "runs" / name / "report.json").read_text())
        assert [entry["participants"] for entry in report["rounds"]] == rounds * [list(SITES)]
    for site in SITES:
        noised, paid = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
        for step in StepLog(made.root / site / "state" / "steps.jsonl").steps():
            noised[step.study, step.round] += 1
        for each in made.spending(site):
            paid[each.charge.study, each.charge.round] += each.charge.steps
        assert not noised - paid, f"under-charged: {site}"
        assert len({study for study, _ in paid}) == len(names)


def is_fair(rounds: list[str], under_way: int) -> bool:
    """Whether between two rounds of a study each other study has one round at most."""
    for name in {*rounds}:
        places = [at for at, found in enumerate(rounds) if found == name]
        for here, there in pairwise(places):
            between = Counter(rounds[here + 1 : there])
            if between.total() >= under_way or max(between.values(), default=0) > 1:
                return False
    return True


@pytest.mark.long
def test_one_that_a_site_refuses_does_not_touch_the_others(tmp_path: Path, tiny_base: Path) -> None:
    names = ["alpha", "greedy", "beta"]
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        lay_out(made, tiny_base, names, rounds=3)
        plan = made.hub / "greedy.toml"
        plan.write_text(plan.read_text().replace("multiplier = 4.0", "multiplier = 0.9"))
        policy = made.root / "east" / "site.toml"
        policy.write_text(policy.read_text().replace("per_study = 50.0", "per_study = 5.0"))
        running = server(made, names, "--at-once", 3)
        join_all(made)
        assert running.wait(400) == 3, made.told()
        told = made.log("hub").read_text()
        assert "fedtune: 1 of 3 studies failed: greedy" in told
        assert Counter(order(made)) == {"alpha": 3, "beta": 3} and is_fair(order(made), 2)
        shown = done(made.hub, "status", "coordinator", "--once")
        assert re.search(r"alpha +done +3/3", shown) and re.search(r"beta +done +3/3", shown)
        assert "stopped, Refused" in shown and "policy.max_epsilon_per_study" in shown
        end_all(made)
        check(made, ["alpha", "beta"], rounds=3)
        assert not (made.hub / "runs" / "greedy").exists()  # nobody paid, and nothing is kept


@pytest.mark.long
def test_a_killed_server_and_one_that_is_stopped_resume_all(
    tmp_path: Path, tiny_base: Path
) -> None:
    names = ["alpha", "beta", "gamma"]
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        lay_out(made, tiny_base, names, rounds=5)
        running = server(made, names, "--at-once", 2)
        join_all(made)
        until(lambda: len(order(made)) >= 3, 240, made.told)
        running.kill()
        running.wait()
        assert "gone" in done(made.hub, "status", "coordinator", "--once")
        running = server(made, names, "--at-once", 2, "--resume")
        until(lambda: len(order(made)) >= 6, 240, made.told)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130, made.told()
        assert f"fedtune: {STOPPED}" in made.log("hub").read_text()
        shown = done(made.hub, "status", "coordinator", "--once")
        assert re.search(r"alpha +stopped \(Ctrl-C\)", shown) and re.search(r"gamma +queued", shown)
        assert server(made, names, "--at-once", 2, "--resume").wait(400) == 0, made.told()
        end_all(made)
        check(made, names, rounds=5)
        assert max(order(made).index(name) for name in names[:2]) < order(made).index("gamma")
        assert server(made, names, "--at-once", 2).wait(60) == 0  # all are finished: nothing to do


MEMORY = 2 * 2**30  # bytes of each machine, at most


def memory(made: Consortium) -> Counter[str]:
    """The memory of each machine's processes, in bytes, by the name of its folder: what several
    processes share is divided among them (PSS)."""
    found = Counter[str]()
    for one in made.running:
        with suppress(OSError, IndexError):
            machine = Path(f"/proc/{one.pid}/cwd").readlink().name
            for pid in (one.pid, *children(one.pid).values()):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                found[machine] += int(re.findall(r"^Pss: +(\d+) kB", text, re.MULTILINE)[0]) << 10
    return found


@pytest.mark.long
def test_ten_studies_at_once_in_two_gibibytes_a_machine(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All finish, their rounds interleave, and a server that is killed in their midst resumes
    all."""
    names, rounds, most = [f"s{number}" for number in range(10)], 3, Counter[str]()
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        lay_out(made, tiny_base, names, rounds)

        def measure(true: Callable[[], Any]) -> Callable[[], Any]:
            def look() -> Any:
                nonlocal most
                most |= memory(made)
                return true()

            return look

        began = time.monotonic()
        running = server(made, names, "--at-once", 10)
        join_all(made)
        until(measure(lambda: len(order(made)) >= 12), 500, made.told)
        running.kill()
        running.wait()
        kept = Counter(order(made))
        again = server(made, names, "--at-once", 10, "--resume")
        until(measure(lambda: again.poll() is not None), 500, made.told)
        assert again.wait() == 0, made.told()
        seconds = time.monotonic() - began
        end_all(made)
        check(made, names, rounds)
        found = order(made)
        with capsys.disabled():
            sizes = ", ".join(f"{name} {size >> 20}" for name, size in sorted(most.items()))
            print(f"\nMiB: {sizes}; {seconds:.0f} s; rounds: {' '.join(found)}")
        assert Counter(found) == dict.fromkeys(names, rounds)
        assert is_fair(found[: kept.total()], 10) and is_fair(found[kept.total() :], 10)
        assert set(most) == {"hub", *SITES} and max(most.values()) < MEMORY
