"""Sites in several processes: the same study, and a process that ends is one site's failure."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from safetensors.numpy import load_file

from fedtune.core.errors import DataError
from fedtune.core.files import locks
from fedtune.flower import api
from fedtune.launch.process_pool import ProcessGrid, _lock_of
from fedtune.officer.site_files import sites_in
from tests.server.test_simulate import SITE, STUDY
from tests.server.test_simulate import world as world_of_two
from tests.simulated import simulate

world = world_of_two


@pytest.fixture
def open_world(world: Path) -> Path:
    """The same study without noise, of three sites and two held-out measurements."""
    study = STUDY.split("[privacy]")[0] + "[strategy]" + STUDY.split("[strategy]")[1]
    study = 'privacy = "off"\n' + study.replace("sampling_rate = 0.5", "sampling_rate = 1.0")
    text = (world / "study.toml").read_text()
    base = text.split('model = "')[1].split('"')[0]
    (world / "study.toml").write_text(study.format(base=base))
    (world / "c.jsonl").write_text((world / "a.jsonl").read_text().replace("does", "will"))
    for name in "abc":
        open_site = SITE.format(name=name) + "allow_privacy_off = true\n"
        (world / f"site-{name}.toml").write_text(open_site)
    return world


@pytest.mark.parametrize("how", ["forks", pytest.param("programs", marks=pytest.mark.long)])
def test_two_processes_make_what_one_makes(
    open_world: Path, how: str, request: pytest.FixtureRequest
) -> None:
    """σ = 0: every bit of the adapter and every measurement."""
    if how == "forks":
        request.getfixturevalue("forks")
    bodies, adapters = [], []
    for processes in (1, 2):
        out = open_world / f"out-{processes}"
        for name in "abc":  # each run has ledgers of its own
            site = open_world / f"site-{name}.toml"
            text = SITE.format(name=name) + "allow_privacy_off = true\n"
            site.write_text(text.replace(f"state-{name}", f"state-{name}-{processes}"))
        bodies.append(
            simulate(open_world / "study.toml", sites_in(open_world), out, processes=processes)
        )
        adapters.append(load_file(out / "adapter" / "adapter_model.safetensors"))
    assert bodies[0]["quality"] == bodies[1]["quality"]
    assert [r["participants"] for r in bodies[1]["rounds"]] == [["a", "b", "c"]] * 2
    assert adapters[0].keys() == adapters[1].keys()
    assert all((adapters[0][n] == adapters[1][n]).all() for n in adapters[0])
    assert any(a.any() for n, a in adapters[0].items() if "lora_B" in n)


@pytest.mark.usefixtures("forks", "without_self_test")
def test_a_private_study_keeps_its_ledgers(world: Path) -> None:
    body = simulate(world / "study.toml", sites_in(world), world / "out", processes=2)
    assert all(site["steps"] == 2 for site in body["privacy"]["sites"].values())
    for name in ("a", "b"):
        assert len((world / f"state-{name}" / "steps.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("forks")
def test_what_is_wrong_with_a_sites_records_is_said(world: Path) -> None:
    for name in ("a", "b"):
        (world / f"{name}.jsonl").write_text('{"q": "no answer"}\n')
    with pytest.raises(DataError):
        simulate(world / "study.toml", sites_in(world), world / "out", processes=2)


def ask(grid: ProcessGrid, node: int) -> Message:
    return grid.create_message(RecordDict(), "query.prepare", node, "1")


@pytest.mark.usefixtures("forks")
def test_a_process_that_ends_is_the_failure_of_the_site_it_worked_for(world: Path) -> None:
    files = sites_in(world)
    with ProcessGrid(files, 2, world / "logs") as grid:
        first, second = grid.get_node_ids()
        assert len(grid.send_and_receive([ask(grid, first), ask(grid, second)])) == 2
        with locks.hold_if_free(_lock_of(files[0], world / "logs")) as free:
            assert not free, "another process of this run could answer for the site too"
        pid = _pid(grid, first)
        os.kill(pid, signal.SIGSTOP)
        waiting = grid.push_messages([ask(grid, first), ask(grid, second)])
        replies = {r.metadata.src_node_id: r for r in grid.pull_messages(waiting)}
        assert first not in replies
        os.kill(pid, signal.SIGKILL)
        while len(replies) < 2:
            replies |= {r.metadata.src_node_id: r for r in grid.pull_messages(waiting)}
        assert replies[first].has_error() and not replies[second].has_error()
        assert replies[first].error.code == api.ErrorCode.CLIENT_APP_CRASHED
        (again,) = grid.send_and_receive([ask(grid, first)])
        assert not again.has_error()
        pids = [_pid(grid, node) for node in (first, second)]
    assert pid not in pids
    assert not any(_alive(each) for each in pids), "a process outlived the grid"


def test_the_processes_end_with_the_one_that_started_them(world: Path) -> None:
    """A parent that is killed closes no door behind it."""
    grid = ProcessGrid(sites_in(world), 1, world / "logs")
    grid.send_and_receive([ask(grid, grid.get_node_ids()[0])])
    (worker,) = grid._workers
    assert worker._child is not None and worker._child._process.stdin is not None
    pid = worker._child.pid
    worker._child._process.stdin.close()  # what the system does when the parent is gone
    deadline = time.monotonic() + 10
    while worker._child.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)
    worker.stop()


def _pid(grid: ProcessGrid, node: int) -> int:
    child = grid._of[node]._child
    assert child is not None
    return child.pid


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
