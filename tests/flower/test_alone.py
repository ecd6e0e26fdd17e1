"""One server to a home, one client to a state folder: the second says so and touches nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedtune.core import boot
from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.processes import alone
from fedtune.flower.ports import free_port
from fedtune.launch.coordinator import serve
from fedtune.launch.site import join
from tests.flower import kit

HOLDS = """
import sys
from pathlib import Path
from fedtune.core.processes import alone
with alone(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""
STUDY = """
[study]
name = "t"
[base]
model = "nowhere"
[objective]
name = "causal_lm"
[training]
rounds = 1
sampling_rate = 1.0
learning_rate = 0.1
[clipping]
[privacy]
epsilon = 1.0
delta = 1e-4
"""


class Holder:
    """Another process that holds a folder."""

    def __init__(self, folder: Path, who: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", HOLDS, str(folder), who],
            env=boot.environment() | {"PYTHONPATH": boot.PACKAGES},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout and self._process.stdout.readline() == b"held\n"
        self.pid = self._process.pid

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose server runs: what the second one must leave alone."""
    home = tmp_path / "home"
    (home / "flower").mkdir(parents=True)
    for name in ("flower/state.db", "flower/executor.secret", "address"):
        (home / name).write_text("the first one's")
    yield home


def test_a_second_server_on_a_home_says_so_and_touches_nothing(home: Path, study: Path) -> None:
    first = Holder(home / "flower", "fedtune server")
    try:
        with pytest.raises(InfrastructureError, match=f"server .process {first.pid}.") as refused:
            serve(study, home.parent / "run", port=free_port(), home=home, run=_never)
        assert str(home) in str(refused.value) and refused.value.exit_code == 4
        for name in ("flower/state.db", "flower/executor.secret", "address"):
            assert (home / name).read_text() == "the first one's"
        assert not (home / "ca.pem").exists()
    finally:
        first.kill()
    with alone(home / "flower", "fedtune server") as killed:
        assert killed  # and holds nothing any more
    with alone(home / "flower", "fedtune server") as killed:
        assert not killed  # the twin: the last one ended by itself


def test_a_second_client_on_a_state_folder_says_so(tmp_path: Path) -> None:
    site = kit.site_file(tmp_path / "a", "a", free_port())
    kit.join_up(tmp_path / "home", site, free_port())
    first = Holder(tmp_path / "a" / "state" / "flower", "fedtune client")
    try:
        with pytest.raises(InfrastructureError, match=f"client .process {first.pid}."):
            join(site, patience=0.0)
    finally:
        first.kill()


def test_a_start_removes_what_a_killed_process_left_half_written(
    home: Path, study: Path, tmp_path: Path
) -> None:
    """Each start ends at once, at what stands in its way, and that is after it has looked."""
    site = kit.site_file(tmp_path / "a", "a", free_port())
    kit.join_up(home, site, free_port())
    first = Holder(home / "flower", "fedtune server")
    state, run = tmp_path / "a" / "state", tmp_path / "run"
    (state / "keys" / "node.key").unlink()
    run.mkdir()
    left = [folder / f"x.json.0f1e2d3c.{first.pid}.new" for folder in (home, run, state / "keys")]
    for draft in left:
        draft.touch()
    with pytest.raises(InfrastructureError, match="another fedtune server"):
        serve(study, run, port=free_port(), home=home, run=_never)
    assert all(draft.exists() for draft in left)
    first.kill()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InfrastructureError, match="is taken"):
            serve(study, run, port=port, home=home, run=_never)
    with pytest.raises(ConfigError, match=r"node.key: no such file"):
        join(site)
    assert not any(draft.exists() for draft in left)


PARENT = """
import sys, time
from pathlib import Path
from fedtune.core.processes import Child
site, root = sys.argv[1], Path(sys.argv[2])
options = [site, "1", "2", str(root / "nobody-listens")]
print(Child("rank", options, home=root / "home", log=root / "log").pid, flush=True)
time.sleep(600)
"""


def test_a_child_ends_with_its_parent_whatever_ends_that(tmp_path: Path) -> None:
    site = kit.site_file(tmp_path / "a", "a", free_port())
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT, str(site), str(tmp_path)],
        env=boot.environment() | {"PYTHONPATH": boot.PACKAGES},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    try:
        time.sleep(1.0)
        assert runs(child)
        parent.kill()
        parent.communicate()
        deadline = time.monotonic() + 30
        while runs(child):
            assert time.monotonic() < deadline, "it outlives its parent"
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_what_a_lock_makes_is_this_users_alone(tmp_path: Path) -> None:
    with alone(tmp_path / "home" / "flower", "x"):
        for made in ("home", "home/flower", "home/flower/lock"):
            assert (tmp_path / made).stat().st_mode & 0o077 == 0


def _never(*_: object, **__: object) -> dict[str, object]:
    raise AssertionError("it must not come to this")
