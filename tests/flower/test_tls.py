"""A federation of real processes on loopback: TLS, node keys, and no code but the installed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from fedtune.core import processes
from fedtune.core.config import load_study
from fedtune.core.errors import ConfigError, InfrastructureError, Stopped
from fedtune.core.processes import is_reachable
from fedtune.core.wire.requests import FAILED
from fedtune.courier import executor as site_executor
from fedtune.flower import api, certs, enrol
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.ports import free_port
from fedtune.launch import coordinator
from tests.clocks import Clock, needs_compiler
from tests.depth import long_but
from tests.expected import raises_only
from tests.flower import kit, tls_roles
from tests.flower.own_app import join_with

STUDY = """privacy = "off"
[study]
name = "tls"
[base]
model = "none"
[objective]
name = "causal_lm"
[training]
rounds = 2
sampling_rate = 1.0
learning_rate = 0.1
"""
ROOT = Path(__file__).resolve().parents[2]
SITES = ("a", "b", "c")


@contextmanager
def role(log: Path, *arguments: object, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of tls_roles.py, ended by its handle whatever happens in the block. more: of its
    environment."""
    nowhere = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    command = [sys.executable, str(Path(tls_roles.__file__)), *map(str, arguments)]
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def hostile_bundle(path: Path, marker: Path) -> Path:
    """An app bundle that brings settings, and modules that leave a mark when they are imported."""
    code = f"open({str(marker)!r}, 'w').close()\napp = None\n"
    with zipfile.ZipFile(io.BytesIO(coordinator.bundle())) as archive:
        assert archive.namelist() == ["pyproject.toml"]
        project = archive.read("pyproject.toml").decode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pyproject.toml", project + 'site = "/etc/passwd"\n')
        for package in ("fedtune", "fedtune/launch", "fedtune/server", "client", "server"):
            archive.writestr(f"{package}/__init__.py", code)
        for name in ("fedtune/launch/in_one_process.py", "fedtune/server/app.py", "client/app.py"):
            archive.writestr(name, code)
    path.write_bytes(buffer.getvalue())
    return path


class World:
    """What is left of a federation that ran: one study, then a coordinator that came back."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.marker = root, free_port(), root / "marker"
        self.home = root / "coordinator"
        (root / "study.toml").write_text(STUDY)
        self.bundle = hostile_bundle(root / "hostile.fab", self.marker)
        self.files = {n: kit.site_file(root / "sites" / n, n, self.port) for n in SITES}
        for site in self.files.values():
            kit.join_up(self.home, site, self.port)
        self.body: dict[str, Any] = {}
        self.statuses: dict[str, int] = {}

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def joined(self, name: str) -> int:
        """How often the site has joined; one that was cut off joins once more within a study."""
        return self.log(name).count("joined {")

    def site(
        self, name: str, *once: str, **more: str
    ) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return role(self.root / f"{name}.log", "site", self.files[name], *once, **more)

    def coordinator(self, nodes: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
        out, log = self.root / "body.json", self.root / "coordinator.log"
        return role(log, "coordinator", self.root, self.port, nodes, out, self.bundle)

    def run(self) -> None:
        with ExitStack() as stack:
            names = {"a": (), "b": (), "c": ("once",)}
            with self.coordinator(nodes=3) as process:
                until(lambda: is_reachable("127.0.0.1", self.port))
                sites = {n: stack.enter_context(self.site(n, *once)) for n, once in names.items()}
                assert process.wait(240) == 0, self.log("coordinator")
            self.body = json.loads((self.root / "body.json").read_text())
            self.come_back()
            sites["a"].terminate()
            self.statuses |= {name: process.wait(30) for name, process in sites.items()}

    def come_back(self) -> None:
        """The coordinator starts anew; b is revoked, and comes back with new keys."""
        earlier = {name: self.joined(name) for name in ("a", "b")}
        digest = hashlib.sha256(b"").hexdigest()
        with coordinator.superlink(self.home) as link:
            api.start_run(link.address, link.ca, link.secret, coordinator.bundle(), digest)
            with coordinator.supervised_gateway(link, self.home, "127.0.0.1", self.port):
                until(lambda: all(self.joined(name) > earlier[name] for name in earlier))
                enrol.revoke(self.home, "b")
                until(lambda: "refuses this site (revoked)" in self.log("b"))
                self.files["b2"] = kit.site_file(self.root / "sites" / "b2", "b", self.port)
                kit.join_up(self.home, self.files["b2"], self.port)
                with self.site("b2") as process:
                    until(lambda: self.joined("b2") > 0)
                    process.terminate()
                    self.statuses["b2"] = process.wait(30)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("tls"))
    made.run()
    return made


def test_processes_equal_one_process(world: World) -> None:
    grid = InProcessGrid([world.files[n] for n in SITES], tls_roles.app)
    here = tls_roles.average(grid, load_study(world.root / "study.toml"), world.root)
    assert world.body["sites"] == here["sites"] == list(SITES)
    np.testing.assert_allclose(world.body["adapter"], here["adapter"], rtol=0, atol=1e-6)
    assert np.abs(here["adapter"]).max() > 0.1


def test_a_bundle_is_never_run_nor_unpacked(world: World) -> None:
    assert world.body["settings"] == ["{}"]
    assert not world.marker.exists()
    assert not [p for p in world.root.rglob("*") if p.name == "apps" or p.suffix == ".py"]


def test_a_site_outlives_the_coordinator_and_rejoins(world: World) -> None:
    assert world.log("a").count("joined") == 2
    assert world.statuses == {"a": 0, "b": 4, "b2": 0, "c": 0}


def test_a_gateway_that_is_killed_costs_no_answer(world: World) -> None:
    assert world.body["again"] == 3


def test_a_site_that_is_revoked_while_it_waits_ends_and_says_why(world: World) -> None:
    assert world.statuses["b"] == InfrastructureError.exit_code
    assert "refuses this site (revoked)" in world.log("b") and "fedtune enroll" in world.log("b")


def test_another_kind_of_message_is_refused(world: World) -> None:
    assert world.body["evaluate"] == 3 * [[True, site_executor.REFUSAL]]


def test_an_exception_tells_nothing_of_itself_not_even_its_class(world: World) -> None:
    assert world.body["train"] == 3 * [[True, FAILED]]
    assert not [p for p in world.root.rglob("*.log") if "holds a secret" in p.read_text()]


def test_a_task_is_for_the_holder_of_the_secret(world: World) -> None:
    assert world.body["stranger"] == 401


def test_nothing_is_left_running(world: World) -> None:
    assert not is_reachable("127.0.0.1", world.port)
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(world.root) not in lines


def test_secrets_are_for_their_owner_alone(world: World) -> None:
    secret = [p for p in world.root.rglob("*") if p.suffix in {".key", ".secret", ".pem"}]
    assert len(secret) >= 8
    assert {stat.S_IMODE(p.stat().st_mode) for p in secret} == {0o600}


# ------------------------------------------------------------------------------- one part at a time


def test_a_task_that_is_not_a_clientapp_is_refused() -> None:
    called = []
    executor = site_executor.Executor(lambda m, c: called.append(m) or m, lambda *_: None)
    message = api.create_message(1, 1, RecordDict({"round": ConfigRecord({})}), "train", 2, "")
    reply = executor.reply(api.AGENT_APP, message, Context(1, 2, {}, RecordDict(), {}))
    assert reply.has_error() and reply.error.reason == site_executor.REFUSAL
    assert not called


@pytest.fixture()
def alone(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.long
def test_a_superlink_that_dies_ends_the_study_with_a_reason(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []

    class Watched(processes.Child):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

    monkeypatch.setattr(coordinator, "Child", Watched)

    def rounds(grid: Any, *_: Any, **__: Any) -> dict[str, Any]:
        os.kill(children[0].pid, signal.SIGKILL)
        until(lambda: not children[0].alive)
        return {"nodes": grid.get_node_ids()}

    with pytest.raises(InfrastructureError, match="flower-superlink ended by itself"):
        coordinator.serve(
            alone.root / "study.toml", alone.root, port=alone.port, home=alone.home, run=rounds
        )
    assert not is_reachable("127.0.0.1", alone.port)


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]


@pytest.mark.long
@pytest.mark.parametrize("signum", long_but(SIGNALS[:1], SIGNALS))
def test_a_coordinator_that_is_stopped_takes_its_superlink_along(
    alone: World, signum: signal.Signals
) -> None:
    with alone.coordinator(nodes=9) as process:
        until(lambda: is_reachable("127.0.0.1", alone.port))
        process.send_signal(signum)
        status = process.wait(60)
        until(lambda: not is_reachable("127.0.0.1", alone.port), 60)
    if signum == signal.SIGINT:  # KeyboardInterrupt, as `fedtune` takes it for 130
        assert status == -signal.SIGINT
    if signum == signal.SIGTERM:
        assert status == InfrastructureError.exit_code
        assert f"stopped by {signum.name}" in alone.log("coordinator")
        assert "--resume" in alone.log("coordinator")


@pytest.mark.parametrize(
    ("signum", "kind"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, coordinator.Terminated)],
)
def test_a_person_who_stops_a_study_reads_of_no_error(
    signum: signal.Signals, kind: type[BaseException]
) -> None:
    with pytest.raises(BaseException) as found, coordinator.naming_stops():
        raise Stopped(signum)
    assert found.type is kind


@pytest.mark.long
def test_a_coordinator_with_another_ca_is_not_trusted(alone: World, tmp_path: Path) -> None:
    with (
        coordinator.superlink(alone.home) as link,
        coordinator.supervised_gateway(
            link, other_home(tmp_path / "other"), "127.0.0.1", alone.port
        ),
        pytest.raises(InfrastructureError, match="does not verify"),
    ):
        join_with(tls_roles.app, alone.files["a"])


@needs_compiler
def test_a_site_whose_clock_is_wrong_is_told_that(alone: World) -> None:
    """The SuperLink takes nothing that is signed at another time. Twin: a clock that is right."""
    clock = Clock(alone.root)
    with (
        coordinator.superlink(alone.home) as link,
        coordinator.supervised_gateway(link, alone.home, "127.0.0.1", alone.port),
    ):
        with alone.site("a", **clock.environment) as process:
            until(lambda: "joined" in alone.log("a"), 300)
            process.terminate()
            assert process.wait(300) == 0
        clock.set(hours=2)
        with alone.site("a", **clock.environment) as process:
            assert process.wait(300) == InfrastructureError.exit_code
    told = alone.log("a")
    assert "s ahead of the coordinator's" in told and "(NTP)" in told and "FAILED" not in told, told


def other_home(home: Path) -> Path:
    certs.server_leaf(home)
    return home


def test_a_clock_that_was_set_back_is_named_before_anything_starts(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gateway would take no site's certificate, and its sites would not hear why."""
    six, right = timedelta(hours=6), certs.read_clock
    monkeypatch.setattr(certs, "read_clock", lambda: right() - six)
    with raises_only(ConfigError, r"UTC, but \w+ was written at .*a clock that never goes back"):
        coordinator.serve(alone.root / "study.toml", alone.root, port=alone.port, home=alone.home)
    assert not (alone.home / "flower" / "superlink.log").exists()


def test_a_taken_port_is_named_before_anything_starts(alone: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InfrastructureError, match=f"port {port} .* is taken"):
            study = alone.root / "study.toml"
            coordinator.serve(study, alone.root, port=port, home=alone.home)
